"""Other attentions. Without a cache: what differs is the arithmetic."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend


class Sdpa(Backend):
    """torch's fused attention."""

    name = "sdpa"

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        heads = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2), None


class Float32Attention(Backend):
    """Neither scores nor probabilities are rounded to the dtype."""

    name = "float32-attention"

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        mixed, _ = ops.attention(ops.up(q), ops.up(k), ops.up(v), None, positions)
        return mixed.to(q.dtype), None


class OnlineSoftmax(Backend):
    """Keys in blocks, with a running maximum and sum, as flash attention does it."""

    name = "online-softmax"

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        times = q.shape[2] // k.shape[2]
        wide_q = ops.up(q).transpose(1, 2) / math.sqrt(q.shape[-1])
        keys, values = (ops.up(x).repeat_interleave(times, 2).transpose(1, 2) for x in (k, v))
        best = wide_q.new_full((*wide_q.shape[:-1], 1), -1e30)
        total, mixed = torch.zeros_like(best), torch.zeros_like(wide_q)
        for start in range(0, k.shape[1], 4):
            part = slice(start, start + 4)
            scores = wide_q @ keys[:, :, part].transpose(-1, -2)
            seen = positions[:, None, None, part] <= positions[:, None, :, None]
            scores = scores.masked_fill(~seen, -math.inf)
            higher = torch.maximum(best, scores.amax(-1, keepdim=True))
            weights, shrink = (scores - higher).exp(), (best - higher).exp()
            total = total * shrink + weights.sum(-1, keepdim=True)
            mixed, best = mixed * shrink + weights @ values[:, :, part], higher
        return (mixed / total).transpose(1, 2).to(q.dtype), None
