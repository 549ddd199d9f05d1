"""A run as a file: report.json, which a machine reads, beside report.html, which a person reads.

    moge-hal conformance --backend cpu --report out

The dataclasses here and in `result.py` are the format, in JSON by the names of their fields. A
report tells enough to be checked by somebody else (`verify.py`): which suite, which cases, which
inputs, and what each of them came to.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moge_hal.conformance.reports.form import build, cleaned, load
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
        report = Report(
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
        return cleaned(report)  # an exception's message may have any number of lines

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
        for fault in _unlike(report):
            raise UserError(fault)
    except UserError as error:
        advice = "give a report.json as `moge-hal conformance --report` wrote it"
        raise UserError(f"{path} is no report: {error}; {advice}") from None
    return report


# A name as a shell, a table and a list with commas take it; what else stands in a report is either
# a text that is shown as such, or looks like one of these.
_NAME = r"[A-Za-z_][A-Za-z0-9_.:-]*"
_DIGEST = "[0-9a-f]{16}"


def _unlike(report: Report) -> Iterator[str]:
    """What the types of the fields do not say."""
    names = [backend.name for backend in report.backends]
    for name in dict.fromkeys([*names, *report.refused, *(o.backend for o in report.outcomes)]):
        if not re.fullmatch(_NAME, name):
            yield f"the name {name!r} must be a backend's: letters, digits and . : _ - alone"
    for name in names:
        if names.count(name) > 1:
            yield f"the backend {name!r} is in it twice"
    if not re.fullmatch(_DIGEST, report.suite.hash):
        yield f"the suite {report.suite.hash!r} must be 16 hexadecimal digits"
    if report.git and not re.fullmatch("[0-9a-f]{40,64}", report.git.commit):
        yield f"the commit {report.git.commit!r} must be one of git"
    try:
        aware = datetime.fromisoformat(report.started).tzinfo
    except ValueError:
        aware = None
    if aware is None:
        yield f"started = {report.started!r} must be an ISO 8601 time with its zone"
    if not 0 <= report.suite.selection.seed_offset < 10**9:
        yield f"the seed offset {report.suite.selection.seed_offset} must be of 0 to 999,999,999"
    for name, number in (
        ("seconds", min([report.seconds, *(o.seconds for o in report.outcomes)])),
        ("cases", report.suite.cases),
        ("threads", report.machine.threads),
        ("counts", min([0, *(n for b in report.backends for n in b.counts.values())])),
    ):
        if number < 0:
            yield f"{name} = {number} must not be below 0"
    for outcome in report.outcomes:
        if outcome.inputs and not re.fullmatch(_DIGEST, outcome.inputs):
            yield f"the digest {outcome.inputs!r} must be 16 hexadecimal digits"
