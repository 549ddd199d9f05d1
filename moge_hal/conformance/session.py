"""One run of the suite: which backends and cases, and what each of them came to."""

import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from moge_hal.bind import bind_operations
from moge_hal.config import PRESETS
from moge_hal.conformance.cases import Case
from moge_hal.conformance.deviations import Deviations
from moge_hal.conformance.digest import digest
from moge_hal.conformance.levels import simulated
from moge_hal.conformance.result import Judged, Outcome, Result, Selection, Word
from moge_hal.conformance.selection import select
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure, Skip, Verdict
from moge_hal.errors import UserError
from moge_hal.registry import (
    TABLE_FOLLOWS,
    UnknownBackendError,
    find,
    get_backend,
    source_of,
    table,
)


@dataclass(frozen=True)
class Options:
    """What a run was asked for. backends: None = the one that MOGE_HAL_BACKEND names."""

    backends: tuple[str, ...] | None = None
    selection: Selection = field(default_factory=Selection)
    simulate: bool = False
    deviations: Path | None = None

    @staticmethod
    def of(given: Any) -> "Options":
        """From the plugin's options."""
        names = None if given.moge_backend is None else split(given.moge_backend)
        return Options(
            names,
            Selection(
                list(given.moge_filter),
                given.moge_profile,
                given.moge_quick,
                given.moge_seed_offset,
            ),
            given.moge_simulate,
            None if given.moge_deviations is None else Path(given.moge_deviations),
        )


def split(names: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(name.strip() for name in names.split(",") if name.strip())


class Session:
    """One run in one process. Raises `UserError` for a name that does not exist, for a selection
    without cases, and if none of the backends can be judged."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.cases = select(options.selection)
        self.deviations = (
            Deviations() if options.deviations is None else Deviations.read(options.deviations)
        )
        self.subjects, self.refused = subjects(options.backends, options.simulate)
        if not self.subjects:
            reasons = "\n".join(self.refused.values())
            raise UserError(f"{reasons}\n{TABLE_FOLLOWS}\n{table()}" if reasons else _NONE_NAMED)
        self.deviations.check([subject.label for subject in self.subjects])

    def tests(self) -> list[Any]:
        """pytest's parameters: a case on every backend, side by side, since its inputs and oracle
        are the same for all; one worker of pytest-xdist gets what shares graphs and oracles."""
        return [
            pytest.param(
                subject,
                case,
                id=f"{subject.label}:{case.id}",
                marks=pytest.mark.xdist_group(f"{subject.label}:{_group(case)}"),
            )
            for case in self.cases
            for subject in self.subjects
        ]

    def outcome(
        self, subject: Subject, case: Case, verdict: Verdict | BaseException, seconds: float
    ) -> Outcome:
        """What a case came to, known deviations included. verdict: or what was raised instead."""
        word, error, limit, reason, level = _word(verdict)
        deviation = self.deviations.match(subject.label, case.id)
        if deviation is not None and word == "failed":
            word, reason = "deviates", f"{deviation.reason} ({reason})"
        elif deviation is not None and word == "passed":
            word = "failed"
            reason = (
                f"is listed as a deviation in {self.options.deviations}, but passes: take it out"
            )
        return Outcome.of(
            case.id,
            subject.label,
            word,
            error,
            limit,
            reason,
            level=level or subject.level,
            seconds=round(seconds, 4),
            inputs=digest(case),
            simulate=self.options.simulate,
        )

    def killed(self, test: str) -> list[Outcome]:
        """The outcome of a case that took its process with it; test: pytest's name of it."""
        return [
            Outcome.of(
                case.id,
                subject.label,
                "failed",
                reason="the process that judged it died",
                level=subject.level,
                inputs=digest(case),
                simulate=self.options.simulate,
            )
            for subject in self.subjects
            for case in self.cases
            if f"[{subject.label}:{case.id}]" in test
        ]

    def result(self, outcomes: Iterable[Outcome], broken: Iterable[str] = ()) -> Result:
        """Of these outcomes, put into the order of the list, whichever worker was faster. broken:
        what ended the run before its time.
        """
        place = {case.id: i for i, case in enumerate(self.cases)}
        labels = [subject.label for subject in self.subjects]
        ordered = sorted(outcomes, key=lambda o: (place[o.id], labels.index(o.backend)))
        return Result(
            tuple(subject.label for subject in self.subjects),
            tuple(ordered),
            tuple(_judged(subject) for subject in self.subjects),
            self.refused,
            self.options.selection,
            (*broken, *self.deviations.unused(ordered)),
        )

    @property
    def size(self) -> int:
        """How many outcomes there will be."""
        return len(self.cases) * len(self.subjects)


def subjects(
    backends: Iterable[str] | None, simulate: bool
) -> tuple[list[Subject], dict[str, str]]:
    """The backends of these names, and why others of them cannot be judged, by name.

    backends: None = the one that MOGE_HAL_BACKEND names. simulate: their code on the CPU. Raises
    `UnknownBackendError` for a name that does not exist: a slip of the pen is not a backend's
    fault.
    """
    found, refused = [], {}
    for name in [None] if backends is None else dict.fromkeys(backends):
        try:
            backend = simulated(find(name)) if simulate else get_backend(name)
            found.append(Subject(backend, name))
        except UnknownBackendError:
            raise
        except UserError as error:
            refused[name or "auto"] = str(error).partition(f"\n{TABLE_FOLLOWS}")[0]
    return found, refused


_NONE_NAMED = "no backend was named to be judged: give one or more names"


def _group(case: Case) -> str:
    return f"model/{case.shape}/{case.dtype_name}" if case.op == "model" else case.op


def _word(
    verdict: Verdict | BaseException,
) -> tuple[Word, float | None, float | None, str, str | None]:
    """word, error, limit, reason and level of a verdict or of what was raised instead."""
    if isinstance(verdict, Verdict):
        return "passed", verdict.error, verdict.limit, "", verdict.level
    if isinstance(verdict, Skip):
        return "skipped", None, None, str(verdict), None
    if isinstance(verdict, Failure):
        return "failed", verdict.error, verdict.limit, verdict.reason, None
    last = traceback.extract_tb(verdict.__traceback__)[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"  # a report goes to others: no folders
    return "failed", None, None, f"raised {type(verdict).__name__}: {verdict} ({place})", None


def _judged(subject: Subject) -> Judged:
    backend, tiny = subject.backend, PRESETS["tiny"]
    operations = {}
    for dtype in backend.dtypes:
        for mode in ("infer",) if backend.graph else ("infer", "train"):
            _, choices = bind_operations(backend, tiny.sizes, tiny.route, dtype, mode)  # type: ignore[arg-type]
            operations[f"{str(dtype).removeprefix('torch.')} {mode}"] = {
                choice.op: f"{choice.implementation}: {choice.reason}" for choice in choices
            }
    kind = type(backend)
    return Judged(
        name=subject.label,
        kind=f"{kind.__module__}:{kind.__qualname__}",
        source=source_of(backend),
        device=subject.probe.device,
        level=subject.level,
        claims=list(backend.claims),
        dtypes=[str(dtype).removeprefix("torch.") for dtype in backend.dtypes],
        graph=backend.graph,
        operations=operations,
    )
