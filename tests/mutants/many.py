"""Experts with a fault that shows only where there are many, or idle ones."""

from typing import Any

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from mutants.experts import Spelled


class EightPerToken(Spelled):
    """A token's first eight experts are computed."""

    name = "eight-per-token"

    def weigh(self, weights: Tensor, ids: Tensor, count: int) -> Tensor:
        return weights * (torch.arange(weights.shape[1]) < 8)


class ExpertsOf7Bits(Spelled):
    """Expert ids as signed numbers of 8 bits: from 128 on they are negative, and left out."""

    name = "experts-of-7-bits"

    def local(self, ids: Tensor, first: int, count: int) -> Tensor:
        return ids.to(torch.int8).int() - first


class IdleGradient(Backend):
    """An expert that nobody chose gets a gradient all the same: memory that nobody cleared."""

    name = "idle-gradient"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        out = ops.experts(x, gate_up, down, ids, weights, first)
        idle = ~torch.isin(torch.arange(len(gate_up)) + first, ids)
        left = gate_up[idle].sum()
        return out.add(left - left.detach())
