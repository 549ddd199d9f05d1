"""Checks a report that somebody handed over: `moge-hal verify report.json`.

Three steps. (1) The report is whole and does not contradict itself (`consistency.py`). (2) Of every
backend some cases are drawn, and their inputs are made here: the digests must be equal, or other
things were judged. (3) They are judged here again, and must come to the same word.

The word is all that is compared. Errors and limits differ in their last digits between machines,
since a limit is measured on the very torch that runs here; and an error that was only written down
as smaller than it is shows in the word, because a case that does not pass does not pass here.

What that proves: a report in which one outcome in ten is untrue gets through a draw of 25 in 7 of
100 tries, one in which a single outcome is untrue nearly always. The draw is random and its seed
is printed after the fact, so nobody can know before which cases will be drawn. A backend that
cannot run here is not confirmed, whatever else is right about its report.
"""

import random
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from moge_hal.conformance.digest import digest
from moge_hal.conformance.reports.consistency import expected, faults, held
from moge_hal.conformance.reports.report import Report, Reported, read
from moge_hal.conformance.result import Judged, Outcome
from moge_hal.conformance.runner import run
from moge_hal.errors import UserError, require_whole


@dataclass
class Verification:
    """What came of it."""

    path: str
    seed: int
    draw: int
    wrong: list[str] = field(default_factory=list)  # why the report is rejected
    open: list[str] = field(default_factory=list)  # what could not be run here
    told: list[str] = field(default_factory=list)  # what was confirmed, a line a backend

    @property
    def exit_code(self) -> int:
        """0 if every backend of the report was run here and nothing was wrong, else 1."""
        return 1 if self.wrong or self.open or not self.told else 0

    def report(self) -> str:
        """For a person. The last line says what came of it."""
        lines = [*self.told, *(f"not run here: {sentence}" for sentence in self.open)]
        lines += [f"wrong: {sentence}" for sentence in self.wrong]
        again = f"draw {self.draw}, seed {self.seed}"
        if self.wrong:
            last = f"REJECTED: {self.path} ({again})"
        elif self.exit_code:
            last = (
                f"NOT CONFIRMED: nothing in {self.path} is contradictory, but what it says of a "
                f"backend that does not run here rests on the word of whoever made it ({again})"
            )
        else:
            last = f"VERIFIED: {self.path} ({again})"
        return "\n".join([*lines, last])


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


def _check(report: Report, backend: Reported, found: Verification, allow_import: bool) -> None:
    """Draws cases of one backend, and judges them again."""
    cases = expected(report)
    outcomes = {o.id: o for o in report.of_backend(backend.name) if held(backend, cases[o.id])}
    # A string as the seed: backends of one report get draws of their own.
    chance = random.Random(f"{found.seed} {backend.name}")
    drawn = chance.sample(sorted(outcomes), min(found.draw, len(outcomes)))
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
    found.wrong += _differences(backend, judged)
    for outcome in again:
        said = outcomes[outcome.id]
        # The list of known deviations stayed with whoever made the report.
        word = "failed" if said.outcome == "deviates" else said.outcome
        if outcome.outcome != word:
            why = f" ({outcome.reason})" if outcome.reason else ""
            found.wrong.append(
                f"{backend.name}: {said.id} {said.outcome}, and {outcome.outcome} here{why}"
            )
    counts = ", ".join(f"{count} {word}" for word, count in backend.counts.items() if count)
    offset = report.suite.selection.seed_offset
    inputs = f" on the inputs of --seed-offset {offset}" if offset else ""
    if not found.wrong:
        found.told.append(
            f"{backend.name} ({backend.device}, {backend.level}): {counts}{inputs}; "
            f"{len(drawn)} cases came to the same here"
        )


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
        f"{said.name}: its {name} were {getattr(said, name)}, and here they are {it}"
        for name in ("claims", "dtypes")
        if (it := getattr(here, name)) != getattr(said, name)
    ]


def _line(error: UserError) -> str:
    """A refusal's first line: behind it comes the table of all backends."""
    return str(error).partition("\n")[0]
