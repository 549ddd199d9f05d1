"""Checks a report that somebody handed over: `moge-hal verify report.json`.

Three steps. (1) The report is whole and does not contradict itself (`consistency.py`). (2) Of every
backend some cases are drawn, and their inputs are made here: the digests must be equal, or other
things were judged. (3) They are judged here again, and must come to the same.

VERIFIED means that the report is true, not that a backend is right: the line says which of them
failed. Whether a failure is called "failed" or "deviates" is up to its author, whose list of known
deviations stayed at home; here it must fail in either case.

What "the same" is. The word must be the same. Of a case that passed, what was measured must have
been measured; the numbers themselves differ between machines, since a limit is measured on the very
torch that runs here, and so

- a limit must be within a factor of 4 of the one found here, and 0 where that is 0;
- where the error here is more than a fifth of its limit, the reported one must be at least a
  quarter of that, in units of its own limit. An error of 0 is fine where it is next to nothing.

These numbers are measured, too: `cpu` and `onnx` were judged on one processor as it is, without
AVX-512, without AVX2, and by its BLAS's oldest kernels. The limits of an operation then differed by
1.7 times at most, those of a whole model by 2.5; the smallest error was 0.4 of another's.
Of a failure the word alone is compared: how wrong a wrong backend is may change from run to run.

Besides the outcomes, what decides them is compared: claims, dtypes, and whether it is a graph
backend. If its class, its level, or who serves an operation in some dtype is another here, then
something else runs here, and the report is neither wrong nor confirmed. So it is where a processor
decides: `cpu` has no bfloat16 kernels of its own without AVX-512 or its like. Nothing else is
compared: neither what device, machine, versions, commit and times it names, nor its reasons.

What that proves: a report in which one outcome in ten is untrue gets through a draw of 25 in 7 of
100 tries, one in which a single outcome is untrue nearly always; and errors that are all told three
times smaller than they are get through as well. The draw is random and its seed is printed after
the fact, so nobody can know before which cases will be drawn. A backend that cannot run here is not
confirmed, whatever else is right about its report.
"""

import random
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from moge_hal.conformance.cases import Case
from moge_hal.conformance.digest import digest
from moge_hal.conformance.reports.consistency import expected, faults, held
from moge_hal.conformance.reports.form import one_line
from moge_hal.conformance.reports.report import Report, Reported, read
from moge_hal.conformance.result import Judged, Outcome
from moge_hal.conformance.runner import run
from moge_hal.errors import UserError, require_whole

_LIMITS = 4.0  # how many times one may be the other
_TELLING = 0.2  # from which part of its limit on an error is compared
_ERRORS = 0.25  # what part of it the report must say at least
_LENGTH = 400  # of a sentence


@dataclass
class Verification:
    """What came of it."""

    path: str
    seed: int
    draw: int
    wrong: list[str] = field(default_factory=list)  # why the report is rejected
    open: list[str] = field(default_factory=list)  # what could not be run here
    told: list[str] = field(default_factory=list)  # what was confirmed, a line a backend
    came_to: list[str] = field(default_factory=list)  # what that is, in a few words a backend

    @property
    def exit_code(self) -> int:
        """0 if every backend of the report was run here and nothing was wrong, else 1. That a
        backend fails, and the report says so, is nothing wrong."""
        return 1 if self.wrong or self.open or not self.told else 0

    def report(self) -> str:
        """For a person, one line a sentence. The last line says what came of it."""
        lines = [*self.told, *(f"not confirmed: {sentence}" for sentence in self.open)]
        lines += [f"wrong: {sentence}" for sentence in self.wrong]
        path, again = one_line(self.path), f"draw {self.draw}, seed {self.seed}"
        if self.wrong:
            last = f"REJECTED: {path} ({again})"
        elif self.exit_code:
            last = (
                f"NOT CONFIRMED: nothing in {path} is contradictory, but what it says of a "
                f"backend that does not run here, or not in the same way, rests on the word of "
                f"whoever made it ({again})"
            )
        else:
            lines.append(
                "not compared: the device, machine, versions, commit and times that it names, and "
                "its reasons are its author's word"
            )
            came_to = "; ".join(self.came_to)
            last = f"VERIFIED: {path} is what this machine finds too: {came_to} ({again})"
        return "\n".join([*(_short(line) for line in lines), last])


def verify(
    path: str | Path, draw: int = 25, seed: int | None = None, allow_import: bool = False
) -> Verification:
    """Checks the report in a file.

    draw: how many cases of every backend are run again. seed: of the draw; None = a new one.
    allow_import: run a backend that the report names `package.module:Class` too, which imports that
    module; a backend that is installed under a name needs no leave. Raises `UserError` if the file
    is no report.
    """
    require_whole("draw", draw)
    report = read(path)
    found = Verification(str(path), secrets.randbelow(2**32) if seed is None else seed, draw)
    found.wrong += faults(report)
    if not found.wrong:
        for backend in report.backends:
            _check(report, backend, found, allow_import)
    return found


def draw_of(report: Report, backend: Reported, count: int, seed: int) -> list[str]:
    """The ids of so many cases that the backend must answer for, or of all; a backend of the same
    report gets others."""
    cases = expected(report)
    ids = {o.id for o in report.of_backend(backend.name) if held(backend, cases[o.id])}
    return random.Random(f"{seed} {backend.name}").sample(sorted(ids), min(count, len(ids)))


def _check(report: Report, backend: Reported, found: Verification, allow_import: bool) -> None:
    """Draws cases of one backend, and judges them again."""
    cases = expected(report)
    outcomes = {outcome.id: outcome for outcome in report.of_backend(backend.name)}
    drawn = draw_of(report, backend, found.draw, found.seed)
    others = [id for id in drawn if outcomes[id].inputs != digest(cases[id])]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        found.wrong.append(f"{backend.name}: {others[0]}{more} had other inputs than here")
        return
    same = f"{backend.name}: the inputs of {len(drawn)} cases are those of this machine"
    try:
        judged, again = _again(backend, drawn, allow_import)
    except UserError as error:
        found.open.append(f"{same}, but no outcome was seen again ({_line(error)})")
        return
    elsewhere = _other_kernels(backend, judged)
    wrong = _differences(backend, judged)
    compared = [o for o in again if _dtype(cases[o.id]) not in elsewhere]
    for outcome in compared:
        if untrue := _untrue(outcomes[outcome.id], outcome):
            wrong.append(f"{backend.name}: {outcome.id} {untrue}")
    found.wrong += wrong
    came = "cases that were drawn came to the same here"
    if elsewhere and not wrong:
        kernels = "; ".join(f"in {dtype} {said}" for dtype, said in elsewhere.items())
        rest = f"; of the other types {len(compared)} {came}" if compared else ""
        found.open.append(f"{backend.name}: {kernels}{rest}")
    if elsewhere or wrong:
        return
    offset = report.suite.selection.seed_offset
    inputs = f" on the inputs of --seed-offset {offset}" if offset else ""
    found.told.append(
        f"{backend.name} (here: {judged.device}, {judged.level}): {_counts(backend)}{inputs}; "
        f"{len(drawn)} {came}"
    )
    found.came_to.append(_came_to(report, backend))


def _dtype(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


def _counts(backend: Reported) -> str:
    counts, deviating = backend.counts, "failed as its author lists"
    parts = [f"{n} {word}" for word, n in counts.items() if n and word != "deviates"]
    return ", ".join([*parts, *([f"{n} {deviating}"] if (n := counts["deviates"]) else [])])


def _came_to(report: Report, backend: Reported) -> str:
    """What a true report says of a backend: the word FAILS stands in it unless all is well."""
    counts, level = backend.counts, "" if backend.level == "real" else f" ({backend.level})"
    name = f"{backend.name}{level}"
    if failed := counts["failed"]:
        listed = f", and {n} more that its author lists" if (n := counts["deviates"]) else ""
        return f"{name} FAILS {_cases(failed)}{listed}"
    if not counts["passed"]:
        return f"{name} FAILS, since nothing passed"
    if deviating := counts["deviates"]:
        return f"{name} FAILS {_cases(deviating)} that its author lists"
    if report.broken:
        return f"{name} passes, and the run FAILS for another reason that it names"
    return f"{name} passes"


def _cases(n: int) -> str:
    return f"{n} case{'s' if n > 1 else ''}"


def _untrue(said: Outcome, here: Outcome) -> str | None:
    """What is untrue in what a report says of a case, for behind its id."""
    word = "failed" if said.outcome == "deviates" else said.outcome
    if here.outcome != word:
        why = f" ({here.reason})" if here.reason else ""
        return f"{said.outcome}, and {here.outcome} here{why}"
    if word != "passed":
        return None
    for name in ("error", "limit"):
        theirs, ours = getattr(said, name), getattr(here, name)
        if (theirs is None) != (ours is None):
            return f"says {_number(theirs)} for its {name}, and here it is {_number(ours)}"
    theirs, ours = said.limit or 0.0, here.limit or 0.0
    if not ours / _LIMITS <= theirs <= ours * _LIMITS:
        return f"says {_number(theirs)} for its limit, and here it is {_number(ours)}"
    their, our = said.margin or 0.0, here.margin or 0.0
    if our > _TELLING and their < our * _ERRORS:
        return f"says that its error was {their:.1%} of its limit, and here it is {our:.1%}"
    return None


def _number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.2g}"


def _again(
    backend: Reported, ids: list[str], allow_import: bool
) -> tuple[Judged, tuple[Outcome, ...]]:
    """The backend and the outcomes of these cases, on this machine and at the report's level.

    Raises `UserError` that says why that cannot be.
    """
    if not ids:
        raise UserError("it claims no case of the suite")
    _, colon, device = backend.name.partition(":")
    if colon and not device.isdecimal() and not allow_import:
        raise UserError("it is named by its class, and a report decides on no import: allow it")
    refusals = []
    for simulate in (False, True) if backend.level == "simulated" else (False,):
        try:
            result = run([backend.name], ids, simulate=simulate, echo=False)
        except UserError as error:
            refusals.append(_line(error))
            continue
        judged = result.judged[0]
        if judged.kind != backend.kind:
            refusals.append(f"it was {backend.kind}, and here it is {judged.kind}")
        elif judged.level != backend.level:
            refusals.append(f"it ran at level {backend.level}, and here it is {judged.level}")
        else:
            return judged, result.outcomes
    raise UserError("; ".join(refusals))


def _differences(said: Judged, here: Judged) -> list[str]:
    """What decides which cases a backend must answer for."""
    return [
        f"{said.name}: it says {name} = {getattr(said, name)}, and here that is {it}"
        for name in ("claims", "dtypes", "graph")
        if (it := getattr(here, name)) != getattr(said, name)
    ]


def _other_kernels(said: Judged, here: Judged) -> dict[str, str]:
    """Where another implementation serves an operation than the report says, by dtype."""
    theirs, ours = _who(said), _who(here)
    found: dict[str, str] = {}
    for key in sorted(theirs.keys() & ours.keys()):  # what differs in dtypes is told as such
        (mode, op), (there, _), (where, why) = key, theirs[key], ours[key]
        if there != where:
            dtype = mode.partition(" ")[0]
            because = f" ({why})" if why else ""
            found.setdefault(dtype, f"{op} was served by {there!r}, and here by {where!r}{because}")
    return found


def _who(judged: Judged) -> dict[tuple[str, str], tuple[str, str]]:
    """By mode and operation, who serves it and why."""
    found = {}
    for mode, operations in judged.operations.items():
        for op, text in operations.items():
            who, _, why = text.partition(": ")
            found[mode, op] = who, why
    return found


def _line(error: UserError) -> str:
    """A refusal's first line: behind it comes the table of all backends."""
    return str(error).partition("\n")[0]


def _short(sentence: str) -> str:
    """One line, of what may be somebody else's words."""
    line = one_line(sentence)
    return line if len(line) <= _LENGTH else f"{line[: _LENGTH - 3]}..."
