"""Attention and its cache, each with a fault."""

import math
from typing import Any

import torch
from torch import Tensor

from moge_hal.backend import Backend
from moge_hal.cache import Cache
from moge_hal.config import Config


class Spelled(Backend):
    """A right attention, a method for every decision. Each mutant takes one of them wrongly."""

    name = "spelled"

    def slots(self, positions: Tensor, spare: int) -> Tensor:
        """Where tokens are written: padding into the spare slot."""
        return torch.where(positions < 0, spare, positions)

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        """held [B, 1, N], positions [B, S, 1] -> [B, S, N]."""
        return (held >= 0) & (held <= positions)

    def clean(self, v: Tensor, visible: Tensor) -> Tensor:
        """v without what nobody sees."""
        return v.masked_fill(~visible.any(1)[:, :, None, None], 0)

    def spread(self, x: Tensor, times: int) -> Tensor:
        """[B, N, Hkv, d] -> [B, N, H, d]."""
        return x.repeat_interleave(times, 2)

    def hide(self, scores: Tensor, visible: Tensor) -> Tensor:
        """[B, H, S, N]."""
        return scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)

    def scale(self, q: Tensor) -> float:
        return 1 / math.sqrt(q.shape[-1])

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        held = positions
        if cache is not None:
            rows = torch.arange(len(q))[:, None]
            slots = self.slots(positions, cache.k.shape[1] - 1)
            cache.k[rows, slots], cache.v[rows, slots] = k, v
            k, v = cache.k[:, :-1], cache.v[:, :-1]
            held = torch.arange(k.shape[1]).expand(len(q), -1)
        visible = self.visible(held[:, None], positions[:, :, None], cache is not None)
        v = self.clean(v, visible)
        times = q.shape[2] // k.shape[2]
        k, v = self.spread(k, times), self.spread(v, times)
        scores = torch.einsum("bshd,bnhd->bhsn", q, k) * self.scale(q)
        weights = self.hide(scores, visible).softmax(-1)
        return torch.einsum("bhsn,bnhd->bshd", weights, v), cache


class HeadsTiled(Spelled):
    """Query head h reads key-value head h mod Hkv instead of h // (H/Hkv)."""

    name = "heads-tiled"

    def spread(self, x: Tensor, times: int) -> Tensor:
        return x.repeat(1, 1, times, 1)


class MaskOffByOne(Spelled):
    """A token does not see itself."""

    name = "mask-off-by-one"

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        return (held >= 0) & ((held < positions) | (positions == 0) & (held == 0))


class DecodeOffByOne(Spelled):
    """A token alone, with a cache, does not see the one before it: prefill is right."""

    name = "decode-off-by-one"

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        seen = super().visible(held, positions, cached)
        return seen & (held != positions - 1) if cached and positions.shape[1] == 1 else seen


class CausalTopLeft(Spelled):
    """In a later chunk the causal mask starts at slot 0, as `is_causal` means it."""

    name = "causal-top-left"

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        if cached and positions.shape[1] > 1:
            positions = torch.where(positions < 0, -1, torch.arange(positions.shape[1])[:, None])
        return super().visible(held, positions, cached)


class Window(Spelled):
    """Nothing older than 512 tokens is seen."""

    name = "window"

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        return super().visible(held, positions, cached) & (held > positions - 512)


class ContextEndsEarly(Spelled):
    """Of a cache, the first 1,000 slots are seen: right for 97 % of the shipped model's context."""

    name = "context-ends-early"

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        seen = super().visible(held, positions, cached)
        return seen & (held < 1000) if cached else seen


class UnwrittenSeen(Spelled):
    """Only the scores are masked: 0 * NaN of a slot that nobody wrote."""

    name = "unwritten-seen"

    def clean(self, v: Tensor, visible: Tensor) -> Tensor:
        return v


class PaddingInSlotZero(Spelled):
    """Padding is written, over the first token."""

    name = "padding-in-slot-zero"

    def slots(self, positions: Tensor, spare: int) -> Tensor:
        return positions.clamp(min=0)


class PaddingIsNaN(Spelled):
    """A softmax over nothing but minus infinity."""

    name = "padding-is-nan"

    def hide(self, scores: Tensor, visible: Tensor) -> Tensor:
        return scores.masked_fill(~visible[:, None], -math.inf)


class StaleCache(Spelled):
    """Buffers are used again for the next prompt, and so is the mark of how far they are full."""

    name = "stale-cache"

    def __init__(self, index: int | None = None) -> None:
        super().__init__(index)
        self.buffers: dict[Any, Cache] = {}
        self.full = [0]

    def new_cache(self, config: Config, batch: int, capacity: int, dtype: torch.dtype) -> Cache:
        key = (batch, capacity)
        if key not in self.buffers:
            self.buffers[key] = super().new_cache(config, batch, capacity, dtype)
        return self.buffers[key]

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        if not cached:
            return super().visible(held, positions, cached)
        old = held < self.full[0]
        if positions.shape[1] == 1:
            self.full[0] = max(self.full[0], int(positions.max()) + 1)
        return super().visible(held, positions, cached) | old


class CapacityOffByOne(Backend):
    """Promises one slot more than it has."""

    name = "capacity-off-by-one"

    def new_cache(self, config: Config, batch: int, capacity: int, dtype: torch.dtype) -> Cache:
        cache: Cache = super().new_cache(config, batch, capacity - 1, dtype)
        cache.capacity = capacity
        return cache


class FiniteMask(Spelled):
    """What must not be seen is pushed down by a number that a large score outweighs."""

    name = "finite-mask"

    def hide(self, scores: Tensor, visible: Tensor) -> Tensor:
        return scores - 1e4 * ~visible[:, None]


class BlockOfEight(Backend):
    """Of a batch, only the first eight rows are computed; the next block repeats the first row."""

    name = "block-of-eight"

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        mixed, cache = super().attention(q, k, v, cache, positions)
        if len(q) > 8:
            mixed = torch.cat([mixed[:8], mixed[:1].expand(len(q) - 8, -1, -1, -1)])
        return mixed, cache


class OneBuffer(Backend):
    """One buffer for all caches of a size."""

    name = "one-buffer"

    def __init__(self, index: int | None = None) -> None:
        super().__init__(index)
        self.buffers: dict[Any, Cache] = {}

    def new_cache(self, config: Config, batch: int, capacity: int, dtype: torch.dtype) -> Cache:
        key = (config, batch, capacity, dtype)
        if key not in self.buffers:
            self.buffers[key] = super().new_cache(config, batch, capacity, dtype)
        return self.buffers[key]
