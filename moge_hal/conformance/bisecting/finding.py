"""What a bisection found, for a person and for a machine."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from moge_hal.conformance.bisecting.evidence import Suspect
from moge_hal.conformance.verdict import Failure


@dataclass(frozen=True)
class Wrong:
    """A call that left its limit. step counts from 1; positions are those of the step's tokens."""

    operation: str
    layer: int | None  # None: before or behind the layers
    weight: str  # canonical name of its (first) weight, [e] for one of stacked ones; or ""
    scene: str
    step: int
    steps: int
    rows: int
    positions: tuple[int, int]  # first and last
    reason: str
    error: float | None
    limit: float | None

    @staticmethod
    def of(suspect: Suspect) -> "Wrong":
        call, scene, number = suspect.call, suspect.scene, suspect.number
        text = scene.texts[scene.moves[number].text]
        positions = text.positions[:, scene.part(number)]
        real = positions[positions >= 0]
        span = (int(real.min()), int(real.max())) if real.numel() else (-1, -1)
        steps = [i for i, move in enumerate(scene.moves) if move.columns]
        reason, error, limit = measured(suspect.failure)
        return Wrong(
            call.op,
            call.layer,
            call.weight,
            scene.name,
            steps.index(number) + 1,
            len(steps),
            len(positions),
            span,
            reason,
            error,
            limit,
        )

    def lines(self) -> list[str]:
        """For a person."""
        where = "outside the layers" if self.layer is None else f"layer {self.layer}"
        which = f" ({self.weight})" if self.weight else ""
        first, last = self.positions
        tokens = f"position {first}" if first == last else f"positions {first} to {last}"
        tokens = tokens if first >= 0 else "padding"
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return [
            f"{self.operation}, {where}{which}",
            f"step {self.step} of {self.steps} of the scene {self.scene}: {tokens} of {rows}",
            told(self.reason, self.error, self.limit),
        ]


@dataclass(frozen=True)
class Finding:
    """A model that is wrong. place: an operation, `compile`, `new_cache`, `pack`, or "" if nothing
    could be blamed. passes: whether the scene passes with the default in its place; None = it
    cannot be exchanged."""

    backend: str
    level: str  # what it ran on: real, simulated or emulated
    model: str
    scene: str
    after: list[str]  # scenes that must be played before it, or it passes
    reason: str
    error: float | None
    limit: float | None
    place: str
    passes: bool | None
    wrong: Wrong | None
    others: list[str]  # further operations that are wrong by themselves
    notes: list[str]
    workaround: str  # what to set to get right results meanwhile, or ""
    replay: str  # a command
    file: str | None  # what was saved for it

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def report(self) -> str:
        """For a person."""
        after = f", behind {', '.join(self.after)}" if self.after else ""
        on = "" if self.level == "real" else f" ({self.level})"
        lines = [f"WRONG: {self.backend}{on} on {self.model}, scene {self.scene}{after}"]
        lines.append(f"    {told(self.reason, self.error, self.limit)}")
        lines += ["", f"PLACE: {self.place or 'not found'}"]
        lines += [f"    {line}" for line in (self.wrong.lines() if self.wrong else [])]
        if self.place:
            lines.append(f"    {self._exchange()}")
        lines += [f"    {note}" for note in self.notes]
        if self.workaround:
            lines += ["", f"UNTIL IT IS MENDED: {self.workaround} gives right results"]
        return "\n".join([*lines, "", f"REPLAY: {self.replay}"])

    def _exchange(self) -> str:
        names = " and ".join([self.place, *self.others])
        if self.passes is None:
            return "it cannot be exchanged for the default, so this rests on its own inputs alone"
        if self.passes:
            return f"with the default {names} the scene passes"
        return f"with the default {names} the scene still fails: there is more"


def told(reason: str, error: float | None, limit: float | None) -> str:
    """A reason with its numbers."""
    size = "" if error is None else f": error {error:.2g}"
    return f"{reason}{size}" + (f", limit {limit:.2g}" if error is not None and limit else "")


def measured(fault: Exception) -> tuple[str, float | None, float | None]:
    """Reason, error and limit; an infinite error is said in words, since JSON has no number."""
    if not isinstance(fault, Failure):
        return f"raised {type(fault).__name__}: {fault}", None, None
    if fault.error is not None and not math.isfinite(fault.error):
        words = "" if "finite" in fault.reason else ": it is not finite"
        return f"{fault.reason}{words}", None, fault.limit
    return fault.reason, fault.error, fault.limit
