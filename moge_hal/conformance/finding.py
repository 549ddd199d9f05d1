"""What a bisection found, for a person and for a machine, and how to see it again."""

import math
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.conformance.cases import DTYPES, PROPERTIES, parse
from moge_hal.conformance.evidence import Suspect
from moge_hal.conformance.golden import write
from moge_hal.conformance.golden_check import judge_file
from moge_hal.conformance.judging import judge
from moge_hal.conformance.listing import every_case
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure, Skip
from moge_hal.errors import UserError
from moge_hal.files import write_file


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
        steps = [i for i, move in enumerate(scene.moves) if move.columns and not move.refused]
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
    replay: str  # a command
    file: str | None  # what was saved for it

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def report(self) -> str:
        """For a person."""
        after = f", behind {', '.join(self.after)}" if self.after else ""
        lines = [f"WRONG: {self.backend} on {self.model}, scene {self.scene}{after}"]
        lines.append(f"    {told(self.reason, self.error, self.limit)}")
        lines += ["", f"PLACE: {self.place or 'not found'}"]
        lines += [f"    {line}" for line in (self.wrong.lines() if self.wrong else [])]
        if self.place:
            lines.append(f"    {self._exchange()}")
        lines += [f"    {note}" for note in self.notes]
        swapped = [self.place, *self.others]
        if self.passes and set(swapped) <= set(ops.NAMES):
            way = ",".join(f"{op}=default" for op in swapped)
            lines += ["", f"UNTIL THEN: MOGE_HAL_OPS={way} gives right results"]
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


def listed_case(
    make: Callable[[], Backend], ops: list[str], dtype: torch.dtype, models: list[str]
) -> str | None:
    """The id of the first case of the suite that fails, alone, on the backend. ops: operations to
    look through; models: ids of whole models to try behind them."""
    names = {kind: name for name, kind in DTYPES.items()}
    cases = [
        case
        for case in every_case()
        if case.op in ops and case.dtype_name == names[dtype] and case.profile == "core"
    ]
    subject = Subject(make())
    for case in [*cases, *map(parse, models)]:
        if _fails(subject, case) and _fails(Subject(make()), case):
            return case.id
    return None


def _fails(subject: Subject, case: Any) -> bool:
    try:
        judge(subject, case)
    except Skip:
        return False
    except Exception:  # a backend may raise anything, and it is a failure, too
        return True
    return False


def save(make: Callable[[], Backend], suspect: Suspect, out: Path, note: str) -> bool:
    """Saves the inputs of a call as a golden case, if they fail by themselves.

    Raises `UserError` if the file cannot be written.
    """
    call = suspect.call
    with TemporaryDirectory(prefix="moge_hal.") as folder:
        file = Path(folder) / "case.npz"
        try:
            write(file, call.op, [*call.past, call.args] if call.cached else call.args, note=note)
        except UserError:  # its right outputs are not finite: no file can say what they must be
            return False
        try:
            judge_file(Subject(make()), file)
        except Skip:
            return False
        except Exception:  # as above
            write_file(out, file.read_bytes())
            return True
    return False


def command(*words: str) -> str:
    """A line for the shell."""
    return shlex.join(["moge-hal", *words])


def is_property(scene: str) -> bool:
    """Whether the suite judges a scene of this name."""
    return scene in PROPERTIES["model"].split()
