"""The suite is itself under test: every wrong backend is rejected by the property of its fault."""

import io
import runpy
import sys
from pathlib import Path

import pytest
import rewrites.table
from mutants import attention, caches, edges, experts, ffn, norms, routing, table, whole
from mutants.rejecting import accept, control, rejection
from mutants.table import (
    ATTENTION,
    CACHED,
    EXPERTS,
    FFN,
    LIMITED,
    MODEL,
    MUTANTS,
    RAGGED,
    REJECTED,
    ROUTE,
)
from rich.console import Console

from moge_hal.backend import Backend
from moge_hal.conformance.cases import PROPERTIES, parse
from moge_hal.conformance.judging import judge
from moge_hal.conformance.listing import every_case
from moge_hal.conformance.properties import whole_model
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure
from moge_hal.errors import UserError
from moge_hal.registry import check


@pytest.mark.parametrize(
    ("mutant", "case"), REJECTED, ids=[f"{mutant.__name__}-{case}" for mutant, case in REJECTED]
)
def test_a_mutant_is_rejected(mutant: type[Backend], case: str) -> None:
    accept(control(mutant), case)
    assert rejection(mutant, case)


def test_mutants_are_rejected_by_cases_of_the_list() -> None:
    """Which is what users run."""
    assert {case for _, case in REJECTED} <= {case.id for case in every_case()}


def test_mutants_say_what_their_fault_is_and_keep_all_other_promises() -> None:
    """So that each can be named on the command line, to see it fail."""
    by_hand = [mutant for mutant in MUTANTS if mutant.__module__ != edges.__name__]
    assert len(by_hand) >= 200
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert mutant.__doc__ and check(mutant()) is None


def test_every_property_of_every_operation_rejects_something() -> None:
    """Else it may be one that nothing can fail. No backend can break `dtype`: see below."""
    rejects = {(parse(case).op, parse(case).prop) for _, case in REJECTED}
    judged = {(op, name) for op, names in PROPERTIES.items() for name in names.split()}
    assert judged - rejects == {("model", "dtype")}


@pytest.mark.parametrize(
    ("spelled", "case"),
    [
        (attention.Spelled, f"{ATTENTION}/value"),
        (attention.Spelled, f"{ATTENTION}/masked"),
        (attention.Spelled, f"{ATTENTION}/gradients"),
        (attention.Spelled, f"{CACHED}/decode"),
        (attention.Spelled, f"{CACHED}/unwritten"),
        (attention.Spelled, f"{RAGGED}/ragged"),
        (attention.Spelled, "attention/bf16/B1-S300-H2-Hkv1-d128/scale1/value"),
        (routing.Spelled, f"{ROUTE}/route.valid"),
        (routing.Spelled, f"{ROUTE}/route.ties"),
        (routing.Spelled, f"{ROUTE}/route.close"),
        (routing.Spelled, f"{ROUTE}/gradients"),
        (routing.Spelled, f"{LIMITED}/route.valid"),
        (routing.Spelled, "route/f32/T64-E20-G4-K8-limit2/scale30/route.valid"),
        (experts.Spelled, f"{EXPERTS}/value"),
        (experts.Spelled, f"{EXPERTS}/nan"),
        (experts.Spelled, f"{EXPERTS}/gradients"),
        (experts.Spelled, f"{EXPERTS}/expert-parallel"),
        (experts.Spelled, "experts/bf16/T17-D40-F24-E15-G3-K6-cancel/scale1/value"),
        (ffn.Spelled, f"{FFN}/value"),
        (ffn.Spelled, "swiglu_ffn/f16/T17-D40-F24/scale30/value"),
        (whole.Wrapped, f"{MODEL}/last-only"),
        (whole.Altered, f"{MODEL}/one-pass"),
    ],
)
def test_what_mutants_are_made_of_is_right(spelled: type[Backend], case: str) -> None:
    accept(spelled, case)


@pytest.mark.parametrize(
    ("mutant", "case"),
    [
        (attention.DecodeOffByOne, f"{ATTENTION}/value"),
        (attention.Window, f"{MODEL}/chunks"),
        (attention.FiniteMask, f"{ATTENTION}/value"),
        (attention.BlockOfEight, f"{MODEL}/ragged"),
        (caches.StaleCache, f"{MODEL}/decode"),
        (caches.OneBuffer, f"{MODEL}/decode"),
        (caches.RingOf64, f"{MODEL}/decode"),
        (routing.ByBfloat16Logits, f"{ROUTE}/route.ties"),
        (routing.TiesToTheHighest, f"{ROUTE}/route.valid"),
        (experts.NarrowSum, f"{EXPERTS}/value"),
        (experts.DetachedWeights, f"{EXPERTS}/value"),
        (whole.FirstInsteadOfLast, f"{MODEL}/decode"),
        (norms.EpsilonOutside, "rms_norm/f32/T17-D40/scale30/value"),
    ],
)
def test_some_faults_show_in_one_property_only(mutant: type[Backend], case: str) -> None:
    """Why there are so many of them."""
    assert rejection(mutant, case) is None


def test_an_epsilon_error_is_invisible_at_unit_scale() -> None:
    """Why every operation is judged at three scales."""
    with pytest.raises(Failure) as small:
        judge(Subject(norms.EpsilonOutside()), parse("rms_norm/f32/T17-D40/scale0.01/value"))
    assert small.value.error is not None and small.value.limit is not None
    assert small.value.error > 200 * small.value.limit


@pytest.mark.parametrize("answer", ["accept", "another reason"])
def test_an_unsupported_dtype_must_be_refused_by_name(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Narrow(Backend):
        name = "narrow"
        dtypes = (parse(f"{MODEL}/dtype").dtype,)

    def bind(*args: object, **options: object) -> None:
        if answer != "accept":
            raise UserError("something is wrong")

    case = parse(f"{MODEL}/dtype")
    judge(Subject(Narrow()), case)
    monkeypatch.setattr(whole_model, "bind", bind)
    with pytest.raises(Failure):
        judge(Subject(Narrow()), case)


def test_the_score_counts_and_names_survivors_and_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`ci/score.py`, with a mutant that is none and a rewrite that is wrong."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # it puts tests/ there
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as it does itself
    score = runpy.run_path(str(Path(__file__).parent.parent / "ci" / "score.py"))
    monkeypatch.setattr(table, "MUTANTS", [norms.EpsilonOutside, norms.EpsilonForgotten])
    wrong = score["judge_mutants"](0)
    monkeypatch.setattr(norms.EpsilonForgotten, "rms_norm", Backend.rms_norm)
    none = score["judge_mutants"](1)
    case = parse("rms_norm/f32/T17-D40/scale0.01/value")
    monkeypatch.setattr(rewrites.table, "REWRITES", (norms.EpsilonOutside,))
    monkeypatch.setattr(
        rewrites.table, "cases", lambda offsets: iter([(case, [norms.EpsilonOutside])])
    )
    right = score["judge_rewrites"](0)
    console = Console(record=True, width=200, file=io.StringIO())
    assert not score["report"]([*wrong, *none], right, console)
    said = console.export_text()
    assert "mutants rejected 2 of 3 (67%)" in said and "1 failures in 1 cases" in said
    assert f"EpsilonForgotten survives {case.id}" in said
    assert f"EpsilonOutside fails {case.id}: the output is wrong in its worst row (" in said
    assert score["report"](wrong, [], Console(file=io.StringIO()))
