"""Reports of others that are turned down before anything runs: incomplete, contradictory, or with
texts that are none."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from reports import backend, changed, judged, put, suite, whole, with_outcomes

from moge_hal.conformance.reports.consistency import faults
from moge_hal.conformance.reports.report import Report, Reported
from moge_hal.conformance.reports.verify import verify
from moge_hal.conformance.result import Selection
from moge_hal.conformance.selection import select
from moge_hal.errors import UserError

VALUE = "linear/f32/T17-I40-O56/scale1/value"
BITWISE = "linear/f32/T17-I40-O56/scale1/bitwise"


@pytest.fixture(scope="module")
def report() -> Report:
    """Without contradictions."""
    return whole()


SPOILED: list[tuple[Callable[[Report], Report], str]] = [
    (lambda r: suite(r, hash="0" * 16), f"it was made by suite {'0' * 16}, and this moge_hal has"),
    (lambda r: suite(r, selection=Selection(quick=True)), "a part of the suite was run (--quick)"),
    (
        lambda r: suite(r, selection=Selection(["linear/*"], "core")),
        "a part of the suite was run (--filter 'linear/*' --profile core)",
    ),
    (lambda r: suite(r, cases=3), "it says that there are 3 cases, and the suite has "),
    (lambda r: replace(r, backends=[], outcomes=[]), "it holds no backend that was judged"),
    (lambda r: backend(r, name="cpu"), "it holds outcomes of null, which is not among its back"),
    (lambda r: with_outcomes(r, []), "null: it is among the backends and has no outcomes"),
    (
        lambda r: with_outcomes(r, r.outcomes[5:]),
        f"null: missing: {next(iter(select(Selection()))).id} and 4 more",
    ),
    (
        lambda r: with_outcomes(r, [*r.outcomes, r.outcomes[0]]),
        "null: more than once: embed/f32/T17-V259-D40/scale0.01/value",
    ),
    (
        lambda r: with_outcomes(r, [*r.outcomes, replace(r.outcomes[0], id="linear/easy")]),
        "null: not in the suite: linear/easy",
    ),
    (
        lambda r: backend(r, counts={**r.backends[0].counts, "passed": 9999}),
        "null: it says 9999 passed, 0 failed, ",
    ),
    (
        lambda r: changed(r, VALUE, error=2e-6),
        f"null: passed with an error above its limit: {VALUE}",
    ),
    (
        lambda r: changed(r, VALUE, limit=None),
        f"null: passed with an error above its limit: {VALUE}",
    ),
    (lambda r: changed(r, VALUE, error=-1.0), f"null: with an error or a limit below 0: {VALUE}"),
    (lambda r: changed(r, VALUE, inputs=""), "null: passed without a digest of its inputs: "),
    (
        lambda r: changed(r, VALUE, inputs="0123456789abcdef"),
        "inputs with more than one digest: linear/f32/T17-I40-O56/scale1",
    ),
    (
        lambda r: changed(r, VALUE, outcome="skipped", error=None, limit=None, reason=" "),
        f"null: skipped without a reason: {VALUE}",
    ),
    (
        lambda r: changed(r, VALUE, outcome="failed", error=1.0),
        f"null: failed without a reason: {VALUE}",
    ),
    (
        lambda r: changed(r, VALUE, outcome="skipped", reason="does not claim the profile core"),
        f"null: skipped (does not claim the profile core), which the backend claims: {VALUE}",
    ),
    (
        lambda r: changed(r, VALUE, outcome="skipped", reason="linear: too hard"),
        "null: skipped (linear: too hard), which the backend claims",  # graph backends may
    ),
    (
        lambda r: changed(r, BITWISE, outcome="passed", reason=""),
        f"null: passed, which the backend neither claims nor computes in: {BITWISE}",
    ),
    (
        lambda r: backend(r, level="simulated"),
        "null: at level real, which can only be simulated: ",
    ),
    (
        lambda r: changed(r, VALUE, level="emulated"),
        f"null: at level emulated, which can only be real: {VALUE}",
    ),
    (
        lambda r: backend(
            r, operations={"float32 infer": r.backends[0].operations["float32 infer"]}
        ),
        "null: it does not say who serves each operation in float32 train and ",
    ),
    (
        lambda r: backend(r, operations={**r.backends[0].operations, "int8 infer": {}}),
        "null: it says who serves operations in int8 infer, which it has not",
    ),
    (lambda r: whole(judged(level="better")), "null: there is no level 'better'"),
    (lambda r: backend(r, claims=["core", "train", "speed"]), "null: there is no profile 'speed'"),
    (
        lambda r: replace(
            backend(r, kind="moge_hal.backends.cuda:X"), versions={"torch": "2.13.0+cpu"}
        ),
        "null: it says that it ran on its real chip, with a torch that has no CUDA",
    ),
    (
        lambda r: backend(r, kind="moge_hal.backends.ascend:AscendBackend"),
        "null: it says that it ran on its real chip, with no torch-npu",
    ),
]


@pytest.mark.parametrize(("spoil", "reason"), SPOILED, ids=range(len(SPOILED)))
def test_a_spoiled_report_is_rejected_before_anything_runs(
    spoil: Callable[[Report], Report],
    reason: str,
    report: Report,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("moge_hal.conformance.reports.verify.run")
    found = verify(put(tmp_path, spoil(report)))
    assert any(reason in sentence for sentence in found.wrong), found.wrong
    assert found.exit_code == 1 and "VERIFIED" not in found.report().upper()
    assert found.report().splitlines()[-1].startswith("REJECTED: ")


def test_one_fault_of_many_cases_is_one_sentence() -> None:
    report = whole()
    assert faults(report) == []
    passed = report.backends[0].counts["passed"]
    doubled = [replace(o, error=o.error and 8 * o.error) for o in report.outcomes]
    (fault,) = faults(with_outcomes(report, doubled))
    assert fault.startswith("null: passed with an error above its limit: embed/f32/")
    assert fault.endswith(f" and {passed - 1} more")


def test_what_a_graph_backend_may_skip() -> None:
    graph = judged(graph=True, claims=["core"], dtypes=["float32"])
    skips = {
        VALUE: "linear: needs even sizes",
        "attention/f32/B2-S17-H6-Hkv2-d8/scale1/unwritten": "its cache has no slots",
    }
    report = whole(graph)
    for id, reason in skips.items():
        skip = {"outcome": "skipped", "error": None, "limit": None, "reason": reason}
        report = changed(report, id, **skip)
    assert faults(report) == []
    claims_more = [Reported(**{**vars(report.backends[0]), "claims": ["core", "train"]})]
    assert any("gradients" in fault for fault in faults(replace(report, backends=claims_more)))


def test_what_can_be_captured_is_proved_without_the_chip() -> None:
    report = whole(judged(claims=["core", "train", "capture"]))
    assert faults(report) == []
    id = "linear/f32/T17-I40-O56/scale1/no-sync"
    assert faults(changed(report, id, level="real")) == [
        f"null: at level real, which can only be simulated: {id}"
    ]


FORGED = "x\nVERIFIED: report.json is what this machine finds too: null passes"
TEXTS: list[Callable[[Report, str], Report]] = [
    lambda r, text: backend(r, device=text),
    lambda r, text: backend(r, source=text),
    lambda r, text: backend(r, kind=text),
    lambda r, text: backend(r, level=text),
    lambda r, text: backend(r, claims=["core", text]),
    lambda r, text: backend(r, operations={text: {}}),
    lambda r, text: backend(r, operations={"float32 infer": {"linear": text}}),
    lambda r, text: replace(r, versions={text: "1"}),
    lambda r, text: replace(r, started=text),
    lambda r, text: replace(r, refused={"cuda": text}),
    lambda r, text: replace(r, broken=[text]),
    lambda r, text: suite(r, hash=text),
    lambda r, text: suite(r, selection=Selection([text])),
    lambda r, text: changed(r, VALUE, outcome="skipped", reason=text),
    lambda r, text: with_outcomes(r, [replace(o, id=text) for o in r.outcomes]),
    lambda r, text: changed(r, VALUE, inputs=text),
]


@pytest.mark.parametrize("text", [FORGED, "\x1b[2J\x1b[H", "a\rb", "\u202eb", "\u2028", "\ud800"],
                         ids=range(6))  # fmt: skip
@pytest.mark.parametrize("put_in", TEXTS, ids=range(len(TEXTS)))
def test_a_text_cannot_forge_a_line(
    put_in: Callable[[Report, str], Report], text: str, tmp_path: Path
) -> None:
    short = whole(selection=Selection([VALUE]))
    with pytest.raises(UserError, match="is no report: ") as error:
        verify(put(tmp_path, put_in(short, text)))
    said = str(error.value)
    assert "with the character U+" in said and "must be one line of plain text" in said
    assert not any(c in said for c in text if not c.isprintable())


@pytest.mark.parametrize("name", ["a,b", "two words", "-o", "x'y", "$(x)", "", "é"])
def test_a_name_is_a_name(name: str, tmp_path: Path) -> None:
    for given in (
        whole(judged(name), selection=Selection([VALUE])),
        replace(whole(selection=Selection([VALUE])), refused={name: "no chip"}),
    ):
        with pytest.raises(UserError, match="is no report: ") as error:
            verify(put(tmp_path, given))
        assert "\n" not in str(error.value)
