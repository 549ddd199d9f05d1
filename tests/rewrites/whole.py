"""Everything at once, for whole models."""

from typing import Any

from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from rewrites.attention import (
    AttentionPowersOfTwo,
    Float32Attention,
    HeadMajor,
    OnlineSoftmax,
    SplitKeys,
)
from rewrites.experts import Float32Experts, GatherBmm, ScatterInto, SortedRows, WeightsEarly
from rewrites.norms import (
    Float32Ffn,
    FusedAddNorm,
    FusedNorm,
    NormByDivision,
    NormInBlocks,
    SiluByTanh,
)
from rewrites.rotary import RotaryByComplex, RotaryByHalves, RotaryByMatrix
from rewrites.routing import ArgmaxPasses, LogSumExp, PowersOfTwo, RankByCounting
from rewrites.sums import DoubleSums, SequentialSums, SplitSums, TransposedWeights


class AllInLoops(
    GatherBmm, ArgmaxPasses, SequentialSums, NormByDivision, OnlineSoftmax, RotaryByComplex
):
    """As a plain C kernel would do it."""

    name = "all-in-loops"

    def swiglu_ffn(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        return ops.swiglu_ffn(x, gate_up, down, linear=self.linear)


class AllInParts(
    WeightsEarly, SplitSums, FusedNorm, FusedAddNorm, SplitKeys, RotaryByHalves, LogSumExp
):
    """As a parallel device would do it."""

    name = "all-in-parts"


class AllPacked(
    SortedRows, TransposedWeights, NormInBlocks, HeadMajor, RotaryByMatrix, RankByCounting
):
    """As a compiler for another chip would lay it out."""

    name = "all-packed"


class AllWide(Float32Experts, Float32Ffn, DoubleSums, Float32Attention, PowersOfTwo, FusedAddNorm):
    """As exactly as may be: rounds to the dtype only where an operation ends."""

    name = "all-wide"


class AllOtherwise(ScatterInto, SiluByTanh, AttentionPowersOfTwo, ArgmaxPasses):
    """What the others leave out."""

    name = "all-otherwise"


MODELS: tuple[type[Backend], ...] = (AllInLoops, AllInParts, AllPacked, AllWide, AllOtherwise)
