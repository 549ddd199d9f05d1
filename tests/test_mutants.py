"""The suite is itself under test: every wrong backend is rejected by the property of its fault."""

import pytest
import torch
from mutants import attention, experts, layers, routing

from moge_hal.backend import Backend
from moge_hal.conformance import whole_model
from moge_hal.conformance.cases import PROPERTIES, parse
from moge_hal.conformance.judging import judge
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure
from moge_hal.errors import UserError

ROUTE = "route/f32/T17-E15-G3-K6/scale1"
EXPERTS = "experts/f32/T17-D40-F24-E15-G3-K6/scale1"
ATTENTION = "attention/f32/B3-S7-H6-Hkv2-d8/scale1"
CACHED = "attention/f32/B2-S17-H6-Hkv2-d8/scale1"
MODEL = "model/f32/tiny-seed0/random"

# A wrong backend, and the case whose property must reject it; the specification passes the same
# case.
REJECTED: list[tuple[type[Backend], str]] = [
    (routing.GlobalTopK, f"{ROUTE}/route.valid"),
    (routing.GlobalTopK, f"{MODEL}/one-pass"),
    (routing.GroupsAndMembersSwapped, f"{ROUTE}/route.valid"),
    (routing.OffsetsByK, f"{ROUTE}/route.valid"),
    (routing.Renormalised, f"{ROUTE}/route.valid"),
    (routing.Renormalised, f"{MODEL}/one-pass"),
    (routing.SoftmaxInsideGroups, f"{ROUTE}/route.valid"),
    (routing.ScaleBeforeSelection, f"{ROUTE}/route.valid"),
    (routing.ScaleBeforeSelection, f"{MODEL}/one-pass"),
    (routing.ScaleForgotten, f"{ROUTE}/route.valid"),
    (routing.ScaleForgotten, f"{MODEL}/one-pass"),
    (routing.ScaleSignLost, f"{ROUTE}/route.valid"),
    (routing.ScaleSignLost, f"{MODEL}/one-pass"),
    (routing.MaximumForgotten, "route/f32/T64-E24-G4-K4/scale30/route.valid"),
    (routing.TiesToTheHighest, f"{ROUTE}/route.ties"),
    (routing.BestOfTheBatch, f"{ROUTE}/rows"),
    (routing.NaNOutOfRange, f"{ROUTE}/nan"),
    (routing.LowPrecisionRouter, "router_logits/f32/T17-D40-E15/scale1/value"),
    (routing.LowPrecisionRouter, f"{MODEL}/one-pass"),
    (experts.CapacityDrops, "experts/f32/T64-D40-F24-E15-G3-K6-crowded/scale1/value"),
    (experts.LastTokenFaint, f"{EXPERTS}/value"),
    (experts.NegativeSkipped, f"{EXPERTS}/value"),
    (experts.FirstIgnored, f"{EXPERTS}/expert-parallel"),
    (experts.ClampedIds, f"{EXPERTS}/expert-parallel"),
    (experts.DenseTimesZero, "experts/f32/T7-D40-F24-E64-G8-K8/scale1/unselected"),
    (experts.OneHotGather, f"{EXPERTS}/nan"),
    (experts.DetachedWeights, f"{EXPERTS}/gradients"),
    (layers.EpsilonOutside, "rms_norm/f32/T17-D40/scale0.01/value"),
    (layers.ResidualInPlace, "add_rms_norm/f32/T17-D40/scale1/value"),
    (layers.OutputBiasForgotten, f"{MODEL}/one-pass"),
    (layers.IgnoresStrides, "linear/f32/T17-I40-O56-strided/scale1/value"),
    (layers.RotaryInterleaved, "rotary/f32/B3-S7-H6-Hkv2-d8/scale1/value"),
    (layers.GateAndUpSwapped, "swiglu_ffn/f32/T17-D40-F24/scale1/value"),
    (layers.LeavesSomethingBehind, "linear/f32/T17-I40-O56/scale1/repeat"),
    (attention.HeadsTiled, f"{ATTENTION}/value"),
    (attention.MaskOffByOne, f"{ATTENTION}/value"),
    (attention.DecodeOffByOne, f"{CACHED}/decode"),
    (attention.DecodeOffByOne, f"{MODEL}/decode"),
    (attention.CausalTopLeft, "attention/f32/B2-S64-H6-Hkv2-d8/scale1/chunks"),
    (attention.CausalTopLeft, f"{MODEL}/chunks"),
    (attention.Window, f"{MODEL}/long"),
    (attention.ContextEndsEarly, "model/f32/shipped/trained/long"),
    (attention.UnwrittenSeen, f"{CACHED}/unwritten"),
    (attention.UnwrittenSeen, f"{MODEL}/unwritten"),
    (attention.PaddingInSlotZero, "attention/f32/B4-S17-H6-Hkv2-d8/scale1/ragged"),
    (attention.PaddingInSlotZero, f"{MODEL}/ragged"),
    (attention.PaddingIsNaN, "attention/f32/B4-S17-H6-Hkv2-d8/scale1/ragged"),
    (attention.FiniteMask, f"{ATTENTION}/masked"),
    (attention.BlockOfEight, f"{MODEL}/batch"),
    (attention.OneBuffer, f"{MODEL}/two-caches"),
    (layers.FirstInsteadOfLast, f"{MODEL}/last-only"),
    (attention.StaleCache, f"{MODEL}/stale"),
    (attention.CapacityOffByOne, f"{MODEL}/cache-full"),
]


@pytest.mark.parametrize(("mutant", "case"), REJECTED, ids=lambda v: getattr(v, "name", v))
def test_a_mutant_is_rejected(mutant: type[Backend], case: str) -> None:
    judge(Subject(Backend()), parse(case))
    with pytest.raises(Failure):
        judge(Subject(mutant()), parse(case))


def test_every_property_rejects_something() -> None:
    """Else it may be one that nothing can fail. No backend can break `dtype`: see below."""
    rejects = {parse(case).prop for _, case in REJECTED}
    assert rejects == {name for names in PROPERTIES.values() for name in names.split()} - {"dtype"}


def test_what_the_attention_mutants_are_made_of_is_right() -> None:
    for case in (f"{ATTENTION}/value", f"{CACHED}/decode", f"{CACHED}/unwritten"):
        judge(Subject(attention.Spelled()), parse(case))
    # Faults that show in one property only: prefill is right, and so are the first prompt and the
    # first 512 tokens.
    judge(Subject(attention.DecodeOffByOne()), parse(f"{ATTENTION}/value"))
    judge(Subject(attention.StaleCache()), parse(f"{MODEL}/decode"))
    judge(Subject(attention.Window()), parse(f"{MODEL}/chunks"))
    judge(Subject(attention.FiniteMask()), parse(f"{ATTENTION}/value"))
    judge(Subject(attention.Spelled()), parse(f"{ATTENTION}/masked"))
    judge(Subject(attention.OneBuffer()), parse(f"{MODEL}/decode"))
    judge(Subject(attention.BlockOfEight()), parse(f"{MODEL}/ragged"))
    judge(Subject(layers.FirstInsteadOfLast()), parse(f"{MODEL}/decode"))


def test_an_epsilon_error_is_invisible_at_unit_scale() -> None:
    """Why every operation is judged at three scales."""
    with pytest.raises(Failure) as small:
        judge(Subject(layers.EpsilonOutside()), parse("rms_norm/f32/T17-D40/scale0.01/value"))
    assert small.value.error is not None and small.value.limit is not None
    assert small.value.error > 200 * small.value.limit
    judge(Subject(layers.EpsilonOutside()), parse("rms_norm/f32/T17-D40/scale30/value"))


@pytest.mark.parametrize("answer", ["accept", "another reason"])
def test_an_unsupported_dtype_must_be_refused_by_name(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Narrow(Backend):
        name = "narrow"
        dtypes = (torch.float32,)

    def bind(*args: object, **options: object) -> None:
        if answer != "accept":
            raise UserError("something is wrong")

    case = parse(f"{MODEL}/dtype")
    judge(Subject(Narrow()), case)
    monkeypatch.setattr(whole_model, "bind", bind)
    with pytest.raises(Failure):
        judge(Subject(Narrow()), case)
