"""Other orders of summation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend


class SequentialSums(Backend):
    """One float32 accumulator an output, one term after the other: the plainest loop there is."""

    name = "sequential-sums"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        wide, columns = x.float(), w.float().T.contiguous()
        out = torch.zeros(len(x), len(w))
        for i, row in enumerate(columns):
            out.addcmul_(wide[:, i : i + 1], row)
        return (out if b is None else out + b.float()).to(x.dtype)


class SplitSums(Backend):
    """A reduction in four parts, added up at the end."""

    name = "split-sums"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        parts = zip(x.float().chunk(4, 1), w.float().chunk(4, 1), strict=True)
        out = torch.stack([F.linear(*part) for part in parts]).sum(0)
        return (out if b is None else out + b.float()).to(x.dtype)

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        parts = zip(x.float().chunk(4, 1), w.float().chunk(4, 1), strict=True)
        return torch.stack([F.linear(*part) for part in parts]).sum(0)


class FusedNorm(Backend):
    """torch's own fused norm."""

    name = "fused-norm"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        return F.rms_norm(ops.up(x), w.shape, ops.up(w), eps).to(x.dtype)


class NormByDivision(Backend):
    """A square root and a division instead of a reciprocal square root."""

    name = "norm-by-division"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        wide = ops.up(x)
        root = (wide.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()
        return (wide * ops.up(w) / root).to(x.dtype)
