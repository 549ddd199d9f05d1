"""Everything at once, for whole models."""

from typing import Any

from torch import Tensor

from moge_hal import ops
from rewrites.experts import ArgmaxPasses, GatherBmm, WeightsEarly
from rewrites.sums import FusedNorm, NormByDivision, SequentialSums, SplitSums


class AllInLoops(GatherBmm, ArgmaxPasses, SequentialSums, NormByDivision):
    """As a plain C kernel would do it."""

    name = "all-in-loops"

    def swiglu_ffn(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        return ops.swiglu_ffn(x, gate_up, down, linear=self.linear)


class AllInParts(WeightsEarly, SplitSums, FusedNorm):
    """As a parallel device would do it."""

    name = "all-in-parts"
