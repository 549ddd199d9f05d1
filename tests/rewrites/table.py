"""Which cases a rewrite must pass: all of the list that it can answer otherwise than the
specification, on the list's own inputs and on others of the same shapes."""

from collections.abc import Iterator

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.conformance.cases import Case
from moge_hal.conformance.judging import judge
from moge_hal.conformance.listing import every_case
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure
from rewrites import attention, experts, norms, rotary, routing, sums, whole

OPERATIONS: tuple[type[Backend], ...] = (
    sums.SequentialSums,
    sums.ReversedSums,
    sums.SplitSums,
    sums.BlocksOf16,
    sums.PairwiseSums,
    sums.SeparateProducts,
    sums.DoubleSums,
    sums.TransposedWeights,
    sums.PaddedRows,
    norms.FusedNorm,
    norms.NormByDivision,
    norms.NormByLogarithm,
    norms.NormInBlocks,
    norms.FusedAddNorm,
    norms.TwoProducts,
    norms.SiluByTanh,
    norms.SiluByDivision,
    norms.Float32Ffn,
    rotary.RotaryByComplex,
    rotary.RotaryByMatrix,
    rotary.RotaryByHalves,
    routing.ArgmaxPasses,
    routing.RankByCounting,
    routing.RankByScores,
    routing.LogSumExp,
    routing.PowersOfTwo,
    routing.ByTheReciprocal,
    experts.GatherBmm,
    experts.WeightsEarly,
    experts.Float32Experts,
    experts.LastExpertFirst,
    experts.SortedRows,
    experts.ScatterInto,
    experts.DenseWhere,
    attention.Sdpa,
    attention.Float32Attention,
    attention.OnlineSoftmax,
    attention.SplitKeys,
    attention.LateDivision,
    attention.ScaleInTheKeys,
    attention.ScaleInBoth,
    attention.AttentionPowersOfTwo,
    attention.HeadMajor,
)
REWRITES = (*OPERATIONS, *whole.MODELS)
# What calls what, so that a rewrite of the part is one of the whole.
_PARTS = {
    "add_rms_norm": ("rms_norm",),
    "swiglu_ffn": ("linear",),
    "experts": ("swiglu_ffn", "linear"),
}


def answers(rewrite: type[Backend]) -> frozenset[str]:
    """The operations, or `model`, that it answers otherwise than the specification."""
    if rewrite in whole.MODELS:
        return frozenset(["model"])
    own = {op for op in ops.NAMES if getattr(rewrite, op) is not getattr(Backend, op)}
    return frozenset(own | {op for op, parts in _PARTS.items() if own & {*parts}})


def cases(offsets: range) -> Iterator[tuple[Case, list[type[Backend]]]]:
    """A case, and who must pass it; side by side, since the oracle is the same for all."""
    for case in every_case():
        if case.profile not in Backend.claims or case.prop == "dtype":
            continue
        concerned = [rewrite for rewrite in REWRITES if case.op in answers(rewrite)]
        for offset in offsets:
            if offset == 0 or "shipped" not in case.words:
                yield case.shifted(offset), concerned


def nearness(subject: Subject, case: Case) -> float:
    """error/limit of a rewrite, 0 if none is measured; raises what `judge` raises."""
    verdict = judge(subject, case)
    return verdict.error / verdict.limit if verdict.error and verdict.limit else 0.0


def ratio(error: Exception) -> str:
    """By how much a failure is beyond its limit, in words, if that was measured."""
    if isinstance(error, Failure) and error.error and error.limit:
        return f" ({error.error / error.limit:.2f} times its limit)"
    return ""
