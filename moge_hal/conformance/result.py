"""What came of a run: the table for a person, data for a machine, an exit code for the shell."""

import math
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moge_hal.conformance.cases import PROPERTIES

SHOWN = 20  # failures that are told in full
Word = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """One case on one backend."""

    id: str
    backend: str
    outcome: Word
    error: float | None = None  # where it was measured, and is a number
    limit: float | None = None
    reason: str = ""  # of a failure or a skip

    @staticmethod
    def of(
        id: str,
        backend: str,
        outcome: Word,
        error: float | None = None,
        limit: float | None = None,
        reason: str = "",
    ) -> "Outcome":
        """With an infinite error, that of a NaN, said in words: JSON has no such number."""
        if error is not None and not math.isfinite(error):
            return Outcome(id, backend, outcome, None, limit, f"{reason}: it is not finite")
        return Outcome(id, backend, outcome, error, limit, reason)

    @property
    def replay(self) -> str:
        """The command that runs this case alone."""
        return f"moge-hal conformance --backend {self.backend} --filter '{self.id}'"


@dataclass(frozen=True)
class Result:
    """All outcomes of a run."""

    backends: tuple[str, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def exit_code(self) -> int:
        """0 if nothing failed and every backend passed something, else 1: no run proves nothing."""
        counts = Counter((o.backend, o.outcome) for o in self.outcomes)
        failed = any(counts[backend, "failed"] for backend in self.backends)
        idle = not all(counts[backend, "passed"] for backend in self.backends)
        return 1 if failed or idle or not self.backends else 0

    def data(self) -> list[dict[str, Any]]:
        """For JSON: a dictionary of id, backend, outcome, error, limit and reason an outcome."""
        return [asdict(outcome) for outcome in self.outcomes]

    def report(self) -> str:
        """Failures with the commands that replay them, skips with their reasons, then the table."""
        return "\n".join([*self._failures(), *self._skips(), *self._table(), *self._idle()])

    def _failures(self) -> list[str]:
        """The first ones in full; of the rest how many, by backend, operation and property."""
        lines = []
        failed = [o for o in self.outcomes if o.outcome == "failed"]
        for o in failed[:SHOWN]:
            lines.append(f"FAILED on {o.backend}: {o.id}")
            measured = o.error is not None and o.limit is not None
            size = f": error {o.error:.2g}, limit {o.limit:.2g}" if measured else ""
            lines += [f"    {o.reason}{size}", f"    {o.replay}", ""]
        rest = Counter((o.backend, *o.id.split("/")[::4]) for o in failed[SHOWN:])
        lines += [f"and on {b}: {n} more of {op}/*/{prop}" for (b, op, prop), n in rest.items()]
        return [*lines, ""] if rest else lines

    def _skips(self) -> list[str]:
        why: dict[tuple[str, str], list[str]] = defaultdict(list)
        for o in self.outcomes:
            if o.outcome == "skipped":
                why[o.backend, o.reason].append(o.id)
        lines = []
        for (backend, reason), ids in why.items():
            more = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
            lines.append(f"skipped on {backend}: {ids[0]}{more}: {reason}")
        return [*lines, ""] if lines else []

    def _table(self) -> list[str]:
        """Operations down, backends across, passed/failed/skipped."""
        counts = Counter((o.id.split("/")[0], o.backend, o.outcome) for o in self.outcomes)
        rows = [["passed/failed/skipped", *self.backends]]
        for op in [*PROPERTIES, "all"]:
            cells = []
            for backend in self.backends:
                ops = PROPERTIES if op == "all" else [op]
                words: tuple[Word, ...] = ("passed", "failed", "skipped")
                cells.append("/".join(str(sum(counts[o, backend, w] for o in ops)) for w in words))
            if any(cell != "0/0/0" for cell in cells):
                rows.append([op, *cells])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]

    def _idle(self) -> list[str]:
        passed = {o.backend for o in self.outcomes if o.outcome == "passed"}
        idle = [backend for backend in self.backends if backend not in passed]
        return [f"nothing passed on {', '.join(idle)}: that is a failure"] if idle else []
