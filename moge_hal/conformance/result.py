"""What came of a run: the table for a person, data for a machine, an exit code for the shell."""

import math
import shlex
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moge_hal.conformance.cases import PROPERTIES, parse

SHOWN = 20  # failures that are told in full
# A known deviation is a failure that the backend's author has listed (`deviations.py`).
Word = Literal["passed", "failed", "skipped", "deviates"]
WORDS: tuple[Word, ...] = ("passed", "failed", "skipped", "deviates")


@dataclass(frozen=True)
class Outcome:
    """One case on one backend."""

    id: str
    backend: str
    outcome: Word
    error: float | None = None  # where it was measured, and is a number
    limit: float | None = None
    reason: str = ""  # of a failure, a skip or a deviation
    level: str = "real"  # what it ran on (`levels.py`)
    seconds: float = 0.0
    inputs: str = ""  # digest of the case's inputs
    simulate: bool = False  # the backend's code, on the CPU (`--simulate`)

    @staticmethod
    def of(
        id: str,
        backend: str,
        outcome: Word,
        error: float | None = None,
        limit: float | None = None,
        reason: str = "",
        **more: Any,
    ) -> "Outcome":
        """With an infinite error, that of a NaN, said in words: JSON has no such number. A reason
        may be any exception's text: it becomes one line that no terminal obeys."""
        reason = "".join(letter for letter in " ".join(reason.split()) if letter.isprintable())
        if error is not None and not math.isfinite(error):
            return Outcome(id, backend, outcome, None, limit, f"{reason}: it is not finite", **more)
        return Outcome(id, backend, outcome, error, limit, reason, **more)

    @property
    def margin(self) -> float | None:
        """The error in units of the limit, where both were measured."""
        return self.error / self.limit if self.error is not None and self.limit else None

    @property
    def profile(self) -> str:
        """What a backend must claim to be held to this case."""
        return parse(self.id).profile

    @property
    def replay(self) -> str:
        """The command that runs this case alone."""
        simulate = " --simulate" if self.simulate else ""
        backend = shlex.quote(self.backend)
        return f"moge-hal conformance --backend {backend}{simulate} --filter '{self.id}'"


@dataclass(frozen=True)
class Judged:
    """A backend as it was judged."""

    name: str  # as it was asked for
    kind: str  # package.module:Class
    source: str  # the distribution that it comes from, or its import path
    device: str  # in words
    level: str
    claims: list[str]
    dtypes: list[str]
    graph: bool
    # Who serves each operation and why: {"float32 infer": {"linear": "cpu: the backend's own"}}
    operations: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Selection:
    """Which part of the list was run; as it is, all of it."""

    filters: list[str] = field(default_factory=list)
    profile: str | None = None
    quick: bool = False
    seed_offset: int = 0


@dataclass(frozen=True)
class Result:
    """All outcomes of a run. refused: why a backend could not be judged at all, by name. broken:
    what else makes the run a failure, such as a known deviation that was not met."""

    backends: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    judged: tuple[Judged, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    selection: Selection = Selection()
    broken: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 if nothing failed and every backend passed something, else 1: no run proves nothing."""
        counts = Counter((o.backend, o.outcome) for o in self.outcomes)
        failed = any(counts[backend, "failed"] for backend in self.backends)
        idle = not all(counts[backend, "passed"] for backend in self.backends)
        wrong = failed or idle or not self.backends or self.refused or self.broken
        return 1 if wrong else 0

    def data(self) -> list[dict[str, Any]]:
        """For JSON: a dictionary of its fields an outcome."""
        return [asdict(outcome) for outcome in self.outcomes]

    def report(self) -> str:
        """Failures with the commands that replay them, skips with their reasons, then the table."""
        parts = (
            self._failures(),
            self._deviations(),
            self._skips(),
            self._table(),
            self._refused(),
            self._idle(),
        )
        return "\n".join(line for part in parts for line in part)

    def _failures(self) -> list[str]:
        """The first ones of every backend in full; of the rest how many, by operation and
        property."""
        lines, rest = [], Counter[tuple[str, str, str]]()
        shown = max(1, SHOWN // max(1, len(self.backends)))
        for backend in self.backends:
            failed = [o for o in self.outcomes if o.outcome == "failed" and o.backend == backend]
            for o in failed[:shown]:
                lines.append(f"FAILED on {o.backend}: {o.id}")
                measured = o.error is not None and o.limit is not None
                size = f": error {o.error:.2g}, limit {o.limit:.2g}" if measured else ""
                lines += [f"    {o.reason}{size}", f"    {o.replay}", ""]
            for o in failed[shown:]:
                op, *_, prop = o.id.split("/")
                rest[backend, op, prop] += 1
        lines += [f"and on {b}: {n} more of {op}/*/{prop}" for (b, op, prop), n in rest.items()]
        return [*lines, ""] if rest else lines

    def _skips(self) -> list[str]:
        return self._grouped("skipped", "skipped on")

    def _deviations(self) -> list[str]:
        return self._grouped("deviates", "known deviation of")

    def _grouped(self, word: Word, said: str) -> list[str]:
        """Outcomes of one word, one line a backend and reason."""
        why: dict[tuple[str, str], list[str]] = defaultdict(list)
        for o in self.outcomes:
            if o.outcome == word:
                why[o.backend, o.reason].append(o.id)
        lines = []
        for (backend, reason), ids in why.items():
            more = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
            lines.append(f"{said} {backend}: {ids[0]}{more}: {reason}")
        return [*lines, ""] if lines else []

    def _table(self) -> list[str]:
        """Operations down, backends across, passed/failed/skipped (and /deviates if there are
        any)."""
        counts = Counter((o.id.split("/")[0], o.backend, o.outcome) for o in self.outcomes)
        used = WORDS if any(word == "deviates" for *_, word in counts) else WORDS[:3]
        rows = [["/".join(used), *self.backends]]
        for op in [*PROPERTIES, "all"]:
            ops = PROPERTIES if op == "all" else [op]
            cells = [
                [sum(counts[o, backend, word] for o in ops) for word in used]
                for backend in self.backends
            ]
            if any(any(cell) for cell in cells):
                rows.append([op, *("/".join(map(str, cell)) for cell in cells)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]

    def _refused(self) -> list[str]:
        said = [f"{name} was not judged: {reason}" for name, reason in self.refused.items()]
        return [*said, *self.broken]

    def _idle(self) -> list[str]:
        passed = {o.backend for o in self.outcomes if o.outcome == "passed"}
        idle = [backend for backend in self.backends if backend not in passed]
        return [f"nothing passed on {', '.join(idle)}: that is a failure"] if idle else []
