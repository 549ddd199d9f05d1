"""From a model that is wrong as a whole to the operation that is wrong in it.

1. The scenes of the suite (`properties/whole_model.py`) are played until one fails, and that one
   alone again, by an instance of its own: what only fails behind others is played with them.
2. The backend plays it once more, and every call of an operation is judged in order on the inputs
   that it really got (`locating.py`).
3. Every suspect is exchanged for its default: the one whose exchange makes the scene pass is the
   answer. A right kernel may leave a measured limit once in many calls, and a whole operation may
   call a wrong one of the same backend; neither passes this test. The operations of a graph cannot
   be exchanged: there the first wrong call is the answer.
4. The suite's own case that fails on it is looked up; if there is none, the inputs are saved as a
   golden case.
"""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.bind import bind_operations
from moge_hal.config import Config
from moge_hal.conformance.bisecting.evidence import Suspect
from moge_hal.conformance.bisecting.finding import Finding, Wrong, measured
from moge_hal.conformance.bisecting.locating import METHODS, Answer, Bench, Observer, fresh, locate
from moge_hal.conformance.bisecting.playlist import prompt_scene, scenes
from moge_hal.conformance.cases import DTYPES, PROPERTIES, Case, parse
from moge_hal.conformance.golden.check import judge_file
from moge_hal.conformance.golden.store import write
from moge_hal.conformance.judging import judge
from moge_hal.conformance.levels import level_of
from moge_hal.conformance.listing import every_case
from moge_hal.conformance.properties.scenes import Scene
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure, Skip
from moge_hal.conformance.weights import model_weights
from moge_hal.errors import UserError
from moge_hal.files import write_file
from moge_hal.loading import load
from moge_hal.model import skeleton


@dataclass(frozen=True)
class Bisection:
    """What was played, and what was found."""

    backend: str
    level: str  # what it ran on: real, simulated or emulated
    scenes: dict[str, int]  # how many of each model
    finding: Finding | None  # None: nothing is wrong

    def report(self) -> str:
        """For a person."""
        if self.finding is not None:
            return self.finding.report()
        played = ", ".join(f"{count} of {name}" for name, count in self.scenes.items())
        on = "" if self.level == "real" else f" ({self.level})"
        return f"{self.backend}{on} is right in every scene: {played}"

    def data(self) -> dict[str, Any]:
        """For JSON."""
        found = None if self.finding is None else self.finding.data()
        return {
            "backend": self.backend,
            "level": self.level,
            "scenes": self.scenes,
            "finding": found,
        }


@dataclass(frozen=True)
class Played:
    """A model to play. ids: of a prompt; None = the suite's scenes. key: the first part of the
    suite's cases of this model, "" if it is none of its models."""

    name: str
    config: Config
    weights: Mapping[str, Tensor]
    ids: list[int] | None = None
    key: str = ""

    def scenes(self) -> Iterator[Scene]:
        if self.ids is None:
            return scenes(self.config, self.weights, self.key)
        return iter([prompt_scene(self.config, self.weights, self.ids)])


def bisect(
    backend: Backend,
    label: str,
    model: str | Path | None = None,
    prompt: str | None = None,
    out: str | Path | None = None,
    observe: Observer = lambda stage: None,
) -> Bisection:
    """Finds the first operation that makes a whole model wrong on a backend.

    backend: not run itself, only further instances of its class. label: the name that it was asked
    for by. model: a folder; None = the suite's small random models, then the shipped one. prompt:
    judges the prompt and 8 tokens after it (by the shipped model, if no folder is given) instead of
    the suite's scenes. out: where inputs are saved if no listed case fails; None =
    bisect-OPERATION.npz here.

    Raises `UserError` for a model or prompt that cannot be used, a backend that cannot be bound or
    whose dtypes have no limits, and a file that cannot be written.
    """
    dtype = next((kind for kind in DTYPES.values() if kind in backend.dtypes), None)
    if dtype is None:
        able = ", ".join(str(kind).removeprefix("torch.") for kind in backend.dtypes)
        raise UserError(f"backend {label!r} computes in {able} only, which has no limits")
    if out is not None and (Path(out).is_dir() or not Path(out).absolute().parent.is_dir()):
        raise UserError(f"{out} cannot be written: it must be a file in a folder that exists")
    level = level_of(backend)
    counts: dict[str, int] = {}
    for played in _models(model, prompt, dtype):
        # What is wrong with a backend before anything runs is an error, and no finding.
        bind_operations(backend, played.config.sizes, played.config.route, dtype, "infer")
        bench = Bench(played.config, played.weights, dtype)
        name, counts[played.name] = played.name, 0

        def count(scene: Scene, name: str = name) -> None:
            counts[name] += 1
            observe(f"{name}: scene {scene.name}")

        failed = bench.fault(fresh(backend), played.scenes(), count)
        if failed is None:
            continue
        observe(f"{name}: scene {failed[0][-1].name}, every operation")
        again = bench.shortest(backend, failed[0])
        scenes, fault = again or failed
        answer = locate(bench, backend, scenes, observe) if again else _UNSTEADY
        observe("a case that shows it")
        search = Search(backend, label, dtype, None if out is None else Path(out), fault)
        asked = ["bisect", "--backend", label]
        asked += [] if model is None else ["--model", str(model)]
        asked += [] if prompt is None else ["--prompt", prompt]
        replay, file = search.find(answer, played, scenes[-1]) or (_command(*asked), None)
        reason, error, limit = measured(fault)
        finding = Finding(
            label,
            level,
            name,
            scenes[-1].name,
            [scene.name for scene in scenes[:-1]],
            reason,
            error,
            limit,
            answer.place,
            answer.passes,
            None if answer.suspect is None else Wrong.of(answer.suspect),
            [other for other in answer.exchanged if other != answer.place],
            list(answer.notes),
            _workaround(backend, answer),
            replay,
            file,
        )
        return Bisection(label, level, counts, finding)
    if not any(counts.values()):
        raise UserError(f"{model}: its context is too short for every scene; give another model")
    return Bisection(label, level, counts, None)


def _workaround(backend: Backend, answer: Answer) -> str:
    """What to set to get right results meanwhile, if anything helps."""
    if backend.graph or not answer.passes or not set(answer.exchanged) <= set(ops.NAMES):
        return ""
    return "MOGE_HAL_OPS=" + ",".join(f"{op}=default" for op in answer.exchanged)


def _models(model: str | Path | None, prompt: str | None, dtype: torch.dtype) -> Iterator[Played]:
    if model is None and prompt is None:
        for case in _whole_models(dtype):
            with suppress(Skip):  # a copy of the package without a model
                config, weights = model_weights(case)
                yield Played(case.shape, config, weights, key=case.key)
        return
    loaded = load(model, Backend(), torch.float32)
    ids = None
    if prompt is not None:
        if loaded.tokenizer is None:
            raise UserError(f"{model} has no tokenizer, so it cannot read a prompt")
        ids = loaded.tokenizer.encode(prompt)
    names = [name for name, _ in skeleton(loaded.config).named_parameters()]
    weights = {name: loaded.weights[name] for name in names}
    yield Played("shipped" if model is None else str(model), loaded.config, weights, ids)


def _whole_models(dtype: torch.dtype) -> list[Case]:
    """A case of each model of the suite in this dtype, the small ones first."""
    found = {case.key: case for case in every_case() if case.op == "model" and case.dtype == dtype}
    return sorted(found.values(), key=lambda case: "shipped" in case.words)


_UNSTEADY = Answer(
    "", None, None, (), ("played again, nothing fails: it does not compute the same every time",)
)


@dataclass(frozen=True)
class Search:
    """Looks for the smallest thing that shows a fault."""

    backend: Backend
    label: str
    dtype: torch.dtype
    out: Path | None
    fault: Exception  # of the whole model

    def find(self, answer: Answer, played: Played, scene: Scene) -> tuple[str, str | None] | None:
        """The command that shows it, and the file that it needs; None: nothing alone does.

        A case of the suite if one fails, else the inputs of the wrong call.
        """
        suspect = answer.suspect
        operations = {answer.place} | ({suspect.call.op} if suspect else set())
        cases = [
            case
            for case in every_case()
            if case.op in operations and (case.dtype, case.profile) == (self.dtype, "core")
        ]
        by_operation = answer.place not in ("", *METHODS)
        if not by_operation and played.key and scene.name in PROPERTIES["model"].split():
            cases.append(parse(f"{played.key}/{scene.name}"))
        subject = Subject(fresh(self.backend))
        for case in cases:
            # Once more by a fresh instance: it must fail alone, and not for what ran before it.
            if self._fails(subject, case) and self._fails(Subject(fresh(self.backend)), case):
                return _command("conformance", "--backend", self.label, "--filter", case.id), None
        if suspect is None:
            return None
        file = self.out or Path(f"bisect-{suspect.call.op}.npz")
        if not self._save(suspect, file, f"{self.label} on {played.name}"):
            return None
        return _command("conformance", "--backend", self.label, "--golden", str(file)), str(file)

    def _fails(self, subject: Subject, case: Case) -> bool:
        try:
            judge(subject, case)
        except Skip:
            return False
        except Exception as error:  # a backend may raise anything, and it is a failure, too
            # The same kind of failure, that is: a wrong number is not shown by a crash.
            return isinstance(error, Failure) == isinstance(self.fault, Failure)
        return False

    def _save(self, suspect: Suspect, out: Path, whose: str) -> bool:
        """Saves the inputs of a call as a golden case, if they fail by themselves."""
        call = suspect.call
        note = f"{whose}: {'; '.join(Wrong.of(suspect).lines())}"
        with TemporaryDirectory(prefix="moge_hal.") as folder:
            file = Path(folder) / "case.npz"
            try:
                write(
                    file, call.op, [*call.past, call.args] if call.cached else call.args, note=note
                )
            except UserError:  # the right outputs are not finite: no file can hold them
                return False
            try:
                judge_file(Subject(fresh(self.backend)), file)
            except Skip:
                return False
            except Exception:  # as above
                write_file(out, file.read_bytes())
                return True
        return False


def _command(*words: str) -> str:
    """A line for the shell."""
    return shlex.join(["moge-hal", *words])
