"""A run as a file: report.json, which a machine reads, beside report.html, which a person reads.

    moge-hal conformance --backend cpu --report out

The dataclasses here and in `result.py` are the format, in JSON by the names of their fields. A
report tells enough to be checked by somebody else (`verify.py`): which suite, which cases, which
inputs, and what each of them came to.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moge_hal.conformance.reports.form import build, load
from moge_hal.conformance.reports.provenance import (
    Git,
    Machine,
    git,
    machine,
    suite_hash,
    versions,
)
from moge_hal.conformance.result import WORDS, Judged, Outcome, Result, Selection
from moge_hal.errors import UserError
from moge_hal.files import write_file

FORMAT = 1


@dataclass(frozen=True)
class Suite:
    """What was judged with."""

    hash: str
    cases: int  # that were selected
    selection: Selection


@dataclass(frozen=True)
class Reported(Judged):
    """A backend as it was judged, and how many of its cases came to what."""

    counts: dict[str, int]


@dataclass(frozen=True)
class Report:
    """The format."""

    format: int
    suite: Suite
    versions: dict[str, str]
    git: Git | None
    machine: Machine
    started: str  # ISO 8601, UTC
    seconds: float
    backends: list[Reported]
    refused: dict[str, str]  # backends that could not be judged, and why
    broken: list[str]  # what else makes the run a failure
    outcomes: list[Outcome]

    @staticmethod
    def of(result: Result, started: float, seconds: float) -> "Report":
        """Of a run in this process. started: seconds since 1970; seconds: how long it took."""
        counts = {name: _counts(result.outcomes, name) for name in result.backends}
        moment = datetime.fromtimestamp(started, timezone.utc)
        return Report(
            format=FORMAT,
            suite=Suite(suite_hash(), len({o.id for o in result.outcomes}), result.selection),
            versions=versions(),
            git=git(),
            machine=machine(),
            started=moment.isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
            backends=[Reported(**vars(j), counts=counts[j.name]) for j in result.judged],
            refused=dict(result.refused),
            broken=list(result.broken),
            outcomes=list(result.outcomes),
        )

    def of_backend(self, name: str) -> list[Outcome]:
        """The outcomes of one backend, in their order."""
        return [outcome for outcome in self.outcomes if outcome.backend == name]

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _counts(outcomes: tuple[Outcome, ...], name: str) -> dict[str, int]:
    found = Counter(outcome.outcome for outcome in outcomes if outcome.backend == name)
    return {word: found[word] for word in WORDS}


def document(result: Result, started: float, seconds: float) -> dict[str, Any]:
    """What report.json holds; see `Report.of`."""
    return Report.of(result, started, seconds).data()


def write(folder: Path, result: Result, started: float, seconds: float) -> None:
    """Writes report.json and report.html into a folder, each whole or not at all; see `Report.of`.

    Raises `UserError` if they cannot be written.
    """
    from moge_hal.conformance.reports.page import (
        render,  # which reads reports, and so imports this module
    )

    report = Report.of(result, started, seconds)
    text = json.dumps(report.data(), indent=1, allow_nan=False, ensure_ascii=False)
    write_file(folder / "report.json", f"{text}\n".encode())
    write_file(folder / "report.html", render(report).encode())


def read(path: str | Path) -> Report:
    """The report in a file.

    Raises `UserError` if there is none, or if it is not of this form. What it says may still be
    incomplete or untrue: that is for `verify.py` to find out.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"the report {path} cannot be read: {error.strerror}") from None
    try:
        value = load(data, "it")
        found = value.get("format") if isinstance(value, dict) else None
        if type(found) is int and found != FORMAT:
            raise UserError(f"it is of format {found}, and this moge_hal reads format {FORMAT}")
        report = build(Report, value, "it")
        names = [backend.name for backend in report.backends]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"the backend {name!r} is in it twice")
    except UserError as error:
        advice = "give a report.json as `moge-hal conformance --report` wrote it"
        raise UserError(f"{path} is no report: {error}; {advice}") from None
    return report
