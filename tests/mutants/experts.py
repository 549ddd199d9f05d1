"""Experts that compute for the wrong tokens, or for none."""

from typing import Any

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend


class CapacityDrops(Backend):
    """An expert takes twice its fair share of the tokens and drops the rest."""

    name = "capacity-drops"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        capacity = -(-ids.numel() * 2 // len(gate_up))
        chosen = ids.flatten().long()[:, None] == torch.arange(len(gate_up)) + first
        late = (chosen & (chosen.cumsum(0) > capacity)).any(1).view(ids.shape)
        return ops.experts(x, gate_up, down, ids, weights.masked_fill(late, 0.0), first)


class LastTokenFaint(Backend):
    """The last token's weights are 3 % too small."""

    name = "last-token-faint"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        last = torch.arange(len(x))[:, None] == len(x) - 1
        return ops.experts(x, gate_up, down, ids, torch.where(last, weights * 0.97, weights), first)


class NegativeSkipped(Backend):
    """A weight below zero is taken for none."""

    name = "negative-skipped"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        return ops.experts(x, gate_up, down, ids, weights.clamp(min=0), first)


class FirstIgnored(Backend):
    """Every rank takes its local experts for those from 0 on."""

    name = "first-ignored"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        return ops.experts(x, gate_up, down, ids, weights)


class ClampedIds(Backend):
    """Ids of other ranks are clamped to the nearest local expert instead of being left out."""

    name = "clamped-ids"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        local = ids.clamp(first, first + len(gate_up) - 1)
        return ops.experts(x, gate_up, down, local, weights, first)


class DenseTimesZero(Backend):
    """Every expert for every token, times a weight that is mostly zero."""

    name = "dense-times-zero"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        local = torch.arange(first, first + len(gate_up))
        dense = ((ids[..., None] == local) * weights[..., None]).sum(1)  # [T, El]
        parts = [
            ops.swiglu_ffn(x, a, b) * dense[:, e, None]
            for e, (a, b) in enumerate(zip(gate_up, down, strict=True))
        ]
        return torch.stack(parts).sum(0)


class OneHotGather(Backend):
    """Tokens are collected with a product by a matrix of zeros and ones, where 0 * NaN is NaN."""

    name = "one-hot-gather"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        out = torch.zeros_like(x)
        for e, (a, b) in enumerate(zip(gate_up, down, strict=True)):
            token, slot = torch.nonzero(ids == first + e, as_tuple=True)
            rows = torch.eye(len(x))[token] @ x
            out = out.index_add(0, token, ops.swiglu_ffn(rows, a, b) * weights[token, slot, None])
        return out


class DetachedWeights(Backend):
    """Right forward, but no gradient reaches the router."""

    name = "detached-weights"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        return ops.experts(x, gate_up, down, ids, weights.detach(), first)
