"""Reports of others that are run again: what is untrue is found, and nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reports import NULL, backend, judged, outcome, put, suite, true, whole, with_outcomes
from torch import Tensor

from moge_hal.backend import Backend
from moge_hal.conformance.reports.consistency import faults
from moge_hal.conformance.reports.report import Report
from moge_hal.conformance.reports.verify import Verification, draw_of, verify
from moge_hal.conformance.result import Judged, Selection
from moge_hal.conformance.selection import select
from moge_hal.errors import UserError
from moge_hal.registry import find


class Wrong(Backend):
    """Its linear layers are a thousandth off, and so is whatever is made of them."""

    name = "wrong"
    dtypes = (torch.float32,)
    claims = ("core",)

    def linear(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return super().linear(x, w, b) * (1 + 1e-3)


WRONG = f"{__name__}:Wrong"


@pytest.fixture(scope="module")
def report() -> Report:
    """A whole one without contradictions, of which the draw of 6 with the seed 1 is true."""
    return true(whole(), 6)


def test_an_honest_report_is_verified(report: Report, tmp_path: Path) -> None:
    found = verify(put(tmp_path, report), draw=6, seed=1)
    assert found.exit_code == 0 and not found.wrong and not found.open
    first, second, last = found.report().splitlines()
    assert first.startswith("null (here: CPU, plain torch, real): ")
    assert first.endswith("6 cases that were drawn came to the same here")
    assert second.startswith("not compared: the device, machine, versions, ")
    path = tmp_path / "report.json"
    assert last == (
        f"VERIFIED: {path} is what this machine finds too: null passes (draw 6, seed 1)"
    )


def test_the_seed_repeats_the_draw_and_a_new_one_is_another(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, ...]] = []

    def seen(*args: object, **more: object) -> object:
        drawn.append(tuple(args[1]))  # type: ignore[arg-type]
        raise UserError("seen enough")

    monkeypatch.setattr("moge_hal.conformance.reports.verify.run", seen)
    path = put(tmp_path, report)
    first = verify(path)
    verify(path, seed=first.seed)
    verify(path)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 25
    with pytest.raises(UserError, match="draw = 0 must be a whole number of at least 1"):
        verify(path, draw=0)


def test_other_inputs_of_the_same_list_are_a_whole_report(tmp_path: Path) -> None:
    report = true(whole(selection=Selection(seed_offset=7)), 3)
    assert faults(report) == []
    found = verify(put(tmp_path, report), draw=3, seed=1)
    assert found.exit_code == 0 and " on the inputs of --seed-offset 7; " in found.told[0]
    assert faults(suite(report, selection=Selection()))


def test_a_lie_is_found_when_its_case_is_drawn(tmp_path: Path) -> None:
    """A backend that is wrong in much of its work, and a report that says that it is not."""
    given = judged(WRONG, kind=WRONG, dtypes=["float32"], claims=["core"])
    honest = true(whole(given), 12)
    lie = with_outcomes(
        honest,
        [replace(o, outcome="passed", error=1e-7, limit=1e-6, reason="")
         if o.outcome == "failed" else o
         for o in honest.outcomes],
    )  # fmt: skip
    found = verify(put(tmp_path, lie), draw=12, seed=1, allow_import=True)
    assert found.exit_code == 1 and not found.open and not found.told
    assert all("passed, and failed here (" in sentence for sentence in found.wrong)
    ops = {sentence.split(" ")[1].split("/")[0] for sentence in found.wrong}
    assert ops <= {"linear", "experts", "swiglu_ffn", "model"} and ops
    assert "VERIFIED" not in found.report().upper()
    found = verify(put(tmp_path, honest), draw=12, seed=1, allow_import=True)
    failed = honest.backends[0].counts["failed"]
    assert found.exit_code == 0 and failed > 0
    assert f"too: {WRONG} FAILS {failed} case" in found.report().splitlines()[-1]


def test_what_is_called_a_deviation_is_a_failure_in_the_last_line(tmp_path: Path) -> None:
    honest = true(whole(judged(WRONG, kind=WRONG, dtypes=["float32"], claims=["core"])), 12)
    failed = [o.id for o in honest.outcomes if o.outcome == "failed"]
    assert len(failed) > 1

    def last(renamed: list[str]) -> str:
        listed = with_outcomes(
            honest,
            [replace(o, outcome="deviates", reason="a cosmic ray") if o.id in renamed else o
             for o in honest.outcomes],
        )  # fmt: skip
        found = verify(put(tmp_path, listed), draw=12, seed=1, allow_import=True)
        assert found.exit_code == 0
        assert f", {len(renamed)} failed as its author lists; " in found.told[0]
        return found.report().splitlines()[-1]

    assert f"{WRONG} FAILS {len(failed)} cases that its author lists (draw" in last(failed)
    rest = len(failed) - 1
    some = f"{WRONG} FAILS {rest} case{'s' if rest > 1 else ''}, and 1 more that its author lists"
    assert some in last(failed[:1])


def test_a_run_that_failed_for_another_reason_says_so(report: Report, tmp_path: Path) -> None:
    broken = replace(report, broken=["deviations.toml, deviation 1: every case was skipped"])
    last = verify(put(tmp_path, broken), draw=6, seed=1).report().splitlines()[-1]
    assert "too: null passes, and the run FAILS for another reason that it names (draw" in last


def every(report: Report, **fields: Any) -> Report:
    return with_outcomes(
        report,
        [replace(o, **{n: v for n, v in fields.items() if getattr(o, n) is not None})
         for o in report.outcomes],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"error": 0.0}, "says that its error was 0.0% of its limit, and here it is "),
        ({"limit": 1e9}, "says 1e+09 for its limit, and here it is "),
        ({"error": 0.0, "limit": 1e-30}, "says 1e-30 for its limit, and here it is "),
        ({"error": None, "limit": None}, "says nothing for its error, and here it is "),
        ({"error": 0.0, "limit": 0.0}, "says 0 for its limit, and here it is "),
    ],
    ids=range(5),
)
def test_invented_numbers_are_found(
    fields: dict[str, Any], reason: str, report: Report, tmp_path: Path
) -> None:
    forged = every(report, **fields)
    assert faults(forged) == []
    found = verify(put(tmp_path, forged), draw=6, seed=1)
    assert found.exit_code == 1 and not found.told
    assert found.report().splitlines()[-1].startswith("REJECTED: ")
    assert sum(reason in sentence for sentence in found.wrong) >= 1, found.wrong


def test_a_number_where_nothing_is_measured_is_found(tmp_path: Path) -> None:
    unmeasured = "/repeat"
    given = whole()
    draw, seed = 12, next(
        seed for seed in range(1000)
        if any(id.endswith(unmeasured) for id in draw_of(given, given.backends[0], 12, seed))
    )  # fmt: skip
    honest = true(given, draw, seed)
    assert verify(put(tmp_path, honest), draw, seed).exit_code == 0
    forged = with_outcomes(
        honest,
        [replace(o, error=0.0, limit=1.0) if o.id.endswith(unmeasured) else o
         for o in honest.outcomes],
    )  # fmt: skip
    found = verify(put(tmp_path, forged), draw, seed)
    assert all("says 0 for its error, and here it is nothing" in s for s in found.wrong)
    assert found.wrong


@pytest.mark.parametrize(
    ("error", "limit", "fits"),
    [(1.0, 1.0, True), (0.4, 1.0, True), (1.0, 2.5, True), (0.7, 0.4, True), (1.2, 1.5, True),
     (0.2, 1.0, False), (1.0, 4.5, False), (0.2, 0.2, False), (0.6, 2.9, False)],
)  # fmt: skip
def test_numbers_of_another_machine_fit(
    error: float, limit: float, fits: bool, tmp_path: Path
) -> None:
    report = true(whole(), 12)
    ids = draw_of(report, report.backends[0], 12, 1)
    assert sum((o.margin or 0) > 0.2 for o in report.outcomes if o.id in ids) >= 3
    other = with_outcomes(
        report,
        [replace(o, error=error * o.error, limit=limit * o.limit)
         if o.id in ids and o.error is not None and o.limit is not None else o
         for o in report.outcomes],
    )  # fmt: skip
    found = verify(put(tmp_path, other), draw=12, seed=1)
    assert (found.exit_code == 0) is fits, found.report()


def test_another_kernel_or_graph_is_not_confirmed(report: Report, tmp_path: Path) -> None:
    operations = report.backends[0].operations
    first = operations["float32 infer"]
    claimed = {**operations, "float32 infer": {**first, "linear": "null: its own"}}
    found = verify(put(tmp_path, backend(report, operations=claimed)), draw=6, seed=1)
    assert found.exit_code == 1 and not found.told and not found.wrong
    (sentence,) = found.open
    assert sentence.startswith(
        "null: in float32 linear was served by 'null', and here by 'default' ("
    )
    assert found.report().splitlines()[-1].startswith("NOT CONFIRMED: ")
    rest = sum(id.split("/")[1] != "f32" for id in draw_of(report, report.backends[0], 6, 1))
    assert sentence.endswith(
        f"; of the other types {rest} cases that were drawn came to the same here"
    )
    reasons = {
        mode: {op: who.partition(": ")[0] + ": because" for op, who in ops.items()}
        for mode, ops in operations.items()
    }
    path = put(tmp_path, backend(report, operations=reasons))
    assert verify(path, draw=6, seed=1).exit_code == 0
    infer = {mode: ops for mode, ops in operations.items() if mode.endswith(" infer")}
    graph = backend(report, graph=True, operations=infer)
    found = verify(put(tmp_path, graph), draw=6, seed=1)
    assert found.wrong == ["null: it says graph = True, and here that is False"]


def test_what_verify_prints_of_a_device_was_found_here(report: Report, tmp_path: Path) -> None:
    other = backend(report, device="NVIDIA H100", source="nvidia")
    text = verify(put(tmp_path, other), draw=6, seed=1).report()
    assert "(here: CPU, plain torch, real)" in text and "H100" not in text


def test_every_sentence_is_one_line_of_some_length() -> None:
    found = Verification("a\nb.json", 1, 2, wrong=["x\ny" + 1000 * " z"])
    first, second = found.report().splitlines()
    assert first.startswith("wrong: x y z z ") and len(first) == 400
    assert second == "REJECTED: a b.json (draw 2, seed 1)"


def test_a_known_deviation_must_fail_here(tmp_path: Path) -> None:
    """The list of deviations is not in the report, and a failure that is not there is untrue."""
    report = whole()
    deviating = [
        replace(o, outcome="deviates", reason="until firmware 3") if o.outcome == "passed" else o
        for o in report.outcomes
    ]
    found = verify(put(tmp_path, with_outcomes(report, deviating)), draw=3)
    assert found.exit_code == 1 and len(found.wrong) == 3
    assert all("deviates, and passed here" in sentence for sentence in found.wrong)


def test_other_inputs_are_found_even_where_nothing_can_run(tmp_path: Path) -> None:
    report = whole(judged("nowhere", kind="nowhere:Backend", level="simulated"))
    forged = with_outcomes(
        report, [replace(o, inputs=o.inputs[::-1].replace("0", "1")) for o in report.outcomes]
    )
    found = verify(put(tmp_path, forged))
    assert found.exit_code == 1 and "had other inputs than here" in found.wrong[0]


def unconfirmed(found: Verification, reason: str) -> None:
    assert found.exit_code == 1 and not found.wrong
    (sentence,) = found.open
    assert reason in sentence, sentence
    assert "inputs of 25 cases are those of this machine" in sentence
    text = found.report()
    assert "VERIFIED" not in text.upper()
    assert text.splitlines()[-1].startswith("NOT CONFIRMED: ")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (judged("nowhere"), "no backend 'nowhere'"),
        (judged(WRONG, kind=WRONG), "a report decides on no import"),
        (judged(kind="other.package:NullBackend"), f"here it is {NULL}"),
        (judged(level="emulated"), "it ran at level emulated, and here it is real"),
        (judged("ascend", kind="moge_hal.backends.ascend:AscendBackend", level="emulated"),
         "backend 'ascend' cannot run"),
    ],
    ids=range(5),
)  # fmt: skip
def test_what_cannot_run_here_is_not_confirmed(given: Judged, reason: str, tmp_path: Path) -> None:
    unconfirmed(verify(put(tmp_path, whole(given))), reason)


def test_one_backend_that_runs_does_not_speak_for_another(tmp_path: Path) -> None:
    one, other = true(whole(), 25, seed=3), whole(judged("nowhere"))
    both = replace(
        one, backends=one.backends + other.backends, outcomes=one.outcomes + other.outcomes
    )
    found = verify(put(tmp_path, both), draw=25, seed=3)
    assert len(found.told) == 1
    unconfirmed(found, "no backend 'nowhere'")


def test_a_report_from_a_simulation_is_run_again_as_one(tmp_path: Path) -> None:
    cuda = find("cuda")
    given = judged(
        "cuda",
        kind=f"{type(cuda).__module__}:{type(cuda).__qualname__}",
        level="simulated",
        claims=list(cuda.claims),
        dtypes=[str(dtype).removeprefix("torch.") for dtype in cuda.dtypes],
    )
    found = verify(put(tmp_path, true(whole(given), 4)), draw=4, seed=1)
    assert found.exit_code == 0, found.report()
    assert "cuda (here: CPU in place of cuda's chip, simulated): " in found.report()
    assert "too: cuda (simulated) passes (draw 4, seed 1)" in found.report()


def test_claims_are_those_of_the_backend(report: Report, tmp_path: Path) -> None:
    cases = select(Selection())
    claims_less = judged(claims=["core"])
    found = verify(
        put(tmp_path, with_outcomes(whole(claims_less), [outcome(c, claims_less) for c in cases])),
        draw=2,
    )
    assert "it says claims = ['core'], and here that is ['core', 'train']" in found.wrong[0]
