"""Other attentions, with and without a cache."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.config import Config


class Mixing(Backend):
    """The specification's cache and mask; how values are mixed is another's affair."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """q [B, H, S, d], k and v [B, H, N, d], visible [B, 1, S, N] -> [B, H, S, d]."""
        raise NotImplementedError

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        held = positions
        if cache is not None:
            rows = torch.arange(len(q), device=q.device)[:, None]
            slots = torch.where(positions < 0, cache.k.shape[1] - 1, positions)
            cache.k[rows, slots], cache.v[rows, slots] = k, v
            k, v = cache.k[:, :-1], cache.v[:, :-1]
            held = torch.arange(k.shape[1], device=q.device).expand(len(q), -1)
        return self.mixed(q, k.transpose(1, 2), v.transpose(1, 2), held, positions), cache

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, held: Tensor, positions: Tensor) -> Tensor:
        """q [B, S, H, d], k and v [B, Hkv, N, d], held [B, N] -> [B, S, H, d]."""
        visible = (held[:, None] >= 0) & (held[:, None] <= positions[:, :, None])
        unseen = ~visible.any(1)[:, None, :, None]
        k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
        times = q.shape[2] // k.shape[1]
        k, v = (x.repeat_interleave(times, 1) for x in (k, v))
        out = self.mix(q.transpose(1, 2), k, v, visible[:, None])
        return out.transpose(1, 2).to(q.dtype)


class Sdpa(Mixing):
    """torch's fused attention."""

    name = "sdpa"

    def mix(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        idle = ~visible.any(-1, keepdim=True)
        return F.scaled_dot_product_attention(q, k, v, visible | idle)


class Float32Attention(Mixing):
    """Neither scores nor probabilities are rounded to the dtype."""

    name = "float32-attention"

    def mix(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        scores = ops.up(q) @ ops.up(k).transpose(-1, -2) / math.sqrt(q.shape[-1])
        return scores.masked_fill(~visible, -1e30).softmax(-1) @ ops.up(v)


class OnlineSoftmax(Mixing):
    """Keys in blocks, with a running maximum and sum, as flash attention does it."""

    name = "online-softmax"
    block = 4

    def mix(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        wide_q, keys, values = ops.up(q) / math.sqrt(q.shape[-1]), ops.up(k), ops.up(v)
        best = wide_q.new_full((*wide_q.shape[:-1], 1), -1e30)
        total, mixed = torch.zeros_like(best), torch.zeros_like(wide_q)
        for start in range(0, k.shape[2], self.block):
            part = slice(start, start + self.block)
            scores = wide_q @ keys[:, :, part].transpose(-1, -2)
            scores = scores.masked_fill(~visible[..., part], -math.inf)
            higher = torch.maximum(best, scores.amax(-1, keepdim=True))
            weights, shrink = (scores - higher).exp(), (best - higher).exp()
            total = total * shrink + weights.sum(-1, keepdim=True)
            mixed, best = mixed * shrink + weights @ values[:, :, part], higher
        return mixed / total.clamp_min(1e-30)


class SplitKeys(Mixing):
    """Two halves of the keys by themselves, put together by their sums, as flash decoding does."""

    name = "split-keys"

    def mix(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        middle = k.shape[2] // 2
        parts, sums = [], []
        for part in (slice(0, middle), slice(middle, None)):
            scores = ops.up(q) @ ops.up(k[:, :, part]).transpose(-1, -2) / math.sqrt(q.shape[-1])
            scores = scores.masked_fill(~visible[..., part], -1e30)
            parts.append(scores.softmax(-1) @ ops.up(v[:, :, part]))
            sums.append(scores.logsumexp(-1, keepdim=True).clamp_min(-1e30))
        share = torch.sigmoid(sums[1] - sums[0])
        return parts[0] * (1 - share) + parts[1] * share


class LateDivision(Mixing):
    """Values are mixed by the powers, and divided by their sum at the end."""

    name = "late-division"

    def mix(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        scores = ops.up(q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2))
        scores = scores.masked_fill(~visible, -1e30)
        if not scores.numel():
            return q
        powers = (scores - scores.amax(-1, keepdim=True)).exp()
        return powers @ ops.up(v) / powers.sum(-1, keepdim=True)


class ScaleInTheKeys(Mixing):
    """Keys are divided by sqrt(d) instead of the queries."""

    name = "scale-in-the-keys"

    def mix(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        scores = q @ (k / math.sqrt(q.shape[-1])).transpose(-1, -2)
        lowest = torch.finfo(scores.dtype).min
        return ops.up(scores.masked_fill(~visible, lowest)).softmax(-1).to(v.dtype) @ v


class ScaleInBoth(Mixing):
    """Queries and keys each times the fourth root of 1/d, in float32."""

    name = "scale-in-both"

    def mix(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        root = math.pow(q.shape[-1], -0.25)
        scores = (ops.up(q) * root) @ (ops.up(k) * root).transpose(-1, -2)
        return scores.masked_fill(~visible, -1e30).softmax(-1).to(v.dtype) @ v


class AttentionPowersOfTwo(Mixing):
    """log2(e) is in the queries, and the softmax is one of powers of two."""

    name = "attention-powers-of-two"

    def mix(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        wide = ops.up(q) * (math.log2(math.e) / math.sqrt(q.shape[-1]))
        scores = (wide @ ops.up(k).transpose(-1, -2)).masked_fill(~visible, -1e30)
        if not scores.numel():
            return q
        powers = (scores - scores.amax(-1, keepdim=True)).exp2()
        return (powers / powers.sum(-1, keepdim=True)) @ ops.up(v)


@dataclass
class HeadCache:
    """Layers of (keys, values) [B, Hkv, N, d], and no spare slot."""

    layers: list[tuple[Tensor, Tensor]]
    capacity: int

    @property
    def batch(self) -> int:
        return len(self.layers[0][0])

    def with_layers(self, layers: list[tuple[Tensor, Tensor]]) -> "HeadCache":
        return HeadCache(layers, self.capacity)


_pytree.register_pytree_node(
    HeadCache,
    lambda cache: ([cache.layers], cache.capacity),
    lambda values, capacity: HeadCache(next(iter(values)), capacity),
    serialized_type_name="rewrites.HeadCache",
)


class HeadMajor(Sdpa):
    """A cache of heads first, which is not written in place: every step returns new tensors."""

    name = "head-major"

    def new_cache(self, config: Config, batch: int, capacity: int, dtype: torch.dtype) -> HeadCache:
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        empty = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))]
        return HeadCache(empty * config.num_hidden_layers, capacity)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if cache is None:
            return self.mixed(q, k, v, positions, positions), None
        if not positions.numel():
            return q, cache
        slots = torch.arange(cache[0].shape[2])
        new = positions[:, :, None] == slots  # [B, S, N]
        source = new.int().argmax(1)[:, None, :, None]  # [B, 1, N, 1]: who writes a slot
        written = new.any(1)[:, None, :, None]

        def after(x: Tensor, old: Tensor) -> Tensor:
            return torch.where(written, x.gather(2, source.expand_as(old)), old)

        keys, values = after(k, cache[0]), after(v, cache[1])
        held = slots.expand(len(q), -1)
        return self.mixed(q, keys, values, held, positions), (keys, values)
