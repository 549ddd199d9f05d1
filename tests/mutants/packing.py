"""Weights that are packed wrongly, or that an operation reads otherwise than they were packed."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend


class SquareTransposed(Backend):
    """Weights are packed transposed, and told apart from plain ones by their shape."""

    name = "square-transposed"

    def pack(self, role: str, weight: Tensor) -> Any:
        return weight.T.contiguous() if role == "linear.w" else weight

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return ops.linear(x, w if w.shape[1] == x.shape[1] else w.T, b)


class PackedInBfloat16(Backend):
    """Packing keeps bfloat16 of a weight."""

    name = "packed-in-bfloat16"

    def pack(self, role: str, weight: Tensor) -> Any:
        return weight.bfloat16().to(weight.dtype)

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return ops.linear(x, w, b)


class PackedOnce(Backend):
    """Packed weights are kept by their role and shape: every layer gets those of the first."""

    name = "packed-once"

    def __init__(self, index: int | None = None) -> None:
        super().__init__(index)
        self.kept: dict[Any, Tensor] = {}

    def pack(self, role: str, weight: Tensor) -> Any:
        return self.kept.setdefault((role, weight.shape), weight.clone())

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return ops.linear(x, w, b)


class PackedSwapped(Backend):
    """Packing puts the up rows first, and the operation does not know it."""

    name = "packed-swapped"

    def pack(self, role: str, weight: Tensor) -> Any:
        return weight.roll(weight.shape[1] // 2, 1) if role == "experts.gate_up" else weight

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        return ops.experts(x, gate_up, down, ids, weights, first)


class SquareExpertsTransposed(Backend):
    """Packs matrices transposed, and tells them from plain ones by their shape."""

    name = "square-experts-transposed"

    def pack(self, role: str, weight: Tensor) -> Any:
        return weight.mT.contiguous() if role == "experts.gate_up" else weight

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        plain = gate_up if gate_up.shape[2] == x.shape[1] else gate_up.mT
        return ops.experts(x, plain, down, ids, weights, first)


class LastGateAndUpSwapped(Backend):
    """The last expert's gate and up rows have changed places."""

    name = "last-gate-and-up-swapped"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        gate, up = gate_up[-1].chunk(2, 0)
        swapped = torch.cat([gate_up[:-1], torch.cat([up, gate])[None]])
        return ops.experts(x, swapped, down, ids, weights, first)


class _Halved(NamedTuple):
    w: Tensor


class HalvedInPlace(Backend):
    """Packing halves the caller's own weights; the operation doubles them again, and is right."""

    name = "halved-in-place"

    def pack(self, role: str, weight: Tensor) -> Any:
        if role != "linear.w":
            return weight
        weight *= 0.5
        return _Halved(weight.clone())

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return ops.linear(x, 2 * w.w if isinstance(w, _Halved) else w, b)
