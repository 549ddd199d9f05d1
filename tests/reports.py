"""Reports of whole runs as tests need them: made by hand in a moment, of cases that really pass.

Their numbers are made up; `true` puts those in that a draw will look at.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from moge_hal.backend import Backend
from moge_hal.conformance.cases import Case
from moge_hal.conformance.digest import digest
from moge_hal.conformance.reports.report import Report, Reported, Suite
from moge_hal.conformance.reports.verify import draw_of
from moge_hal.conformance.result import WORDS, Judged, Outcome, Result, Selection
from moge_hal.conformance.runner import run
from moge_hal.conformance.selection import select
from moge_hal.ops import NAMES

NULL = "moge_hal.backends.null:NullBackend"


def judged(name: str = "null", **more: Any) -> Judged:
    """The backend that passes everything that it claims, under any name."""
    given: dict[str, Any] = {
        "kind": NULL,
        "source": "moge-hal",
        "device": "CPU, plain torch",
        "level": "real",
        "claims": ["core", "train"],
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in Backend.dtypes],
        "graph": False,
        **more,
    }
    modes = ("infer",) if given["graph"] else ("infer", "train")
    table = dict.fromkeys(NAMES, "default: null does not override it")
    operations = {f"{dtype} {mode}": table for dtype in given["dtypes"] for mode in modes}
    return Judged(name=name, **{"operations": operations, **given})


def outcome(case: Case, backend: Judged, **more: Any) -> Outcome:
    """What it comes to on a right backend."""
    if str(case.dtype).removeprefix("torch.") not in backend.dtypes:
        given: dict[str, Any] = {"outcome": "skipped", "reason": "computes in other types"}
    elif case.profile not in backend.claims:
        given = {"outcome": "skipped", "reason": f"does not claim the profile {case.profile}"}
    else:
        given = {"outcome": "passed", "error": 2.5e-7, "limit": 1e-6}
        if case.profile == "capture":
            more = {"level": "simulated", **more}
    fields: dict[str, Any] = {"level": backend.level, "inputs": digest(case), **given, **more}
    return Outcome(case.id, backend.name, **fields)


def whole(*backends: Judged, selection: Selection | None = None, **more: Any) -> Report:
    """A report of the whole suite, or of a selection."""
    selection, backends = selection or Selection(), backends or (judged(),)
    outcomes = [outcome(case, b) for case in select(selection) for b in backends]
    names = tuple(b.name for b in backends)
    result = Result(names, tuple(outcomes), backends, selection=selection, **more)
    return Report.of(result, 1.7e9, 12.5)


def true(report: Report, draw: int, seed: int = 1) -> Report:
    """The report with what its (only) backend and the cases of this draw really come to here."""
    (backend,) = report.backends
    ids = draw_of(report, backend, draw, seed)
    result = run(backend.name, ids, simulate=backend.level == "simulated", echo=False)
    found = {outcome.id: outcome for outcome in result.outcomes}
    (here,) = result.judged
    described = replace(report, backends=[Reported(**vars(here), counts=backend.counts)])
    return with_outcomes(described, [found.get(o.id, o) for o in report.outcomes])


def with_outcomes(report: Report, outcomes: list[Outcome]) -> Report:
    """The report with these instead, and counts that fit them."""
    backends = [
        Reported(**{**vars(b), "counts": _counts(outcomes, b.name)}) for b in report.backends
    ]
    return replace(report, outcomes=outcomes, backends=backends)


def changed(report: Report, id: str, **fields: Any) -> Report:
    """The report with another outcome of one case."""
    assert any(o.id == id for o in report.outcomes)
    return with_outcomes(
        report, [replace(o, **fields) if o.id == id else o for o in report.outcomes]
    )


def _counts(outcomes: list[Outcome], name: str) -> dict[str, int]:
    found = Counter(o.outcome for o in outcomes if o.backend == name)
    return {word: found[word] for word in WORDS}


def put(folder: Path, report: Report) -> Path:
    """As a file in the folder."""
    path = folder / "report.json"
    path.write_text(json.dumps(report.data()), "utf-8")
    return path


def backend(report: Report, **fields: Any) -> Report:
    """The report with another description of its (only) backend."""
    (only,) = report.backends
    return replace(report, backends=[Reported(**{**vars(only), **fields})])


def suite(report: Report, **fields: Any) -> Report:
    """The report with another description of the suite."""
    return replace(report, suite=Suite(**{**vars(report.suite), **fields}))
