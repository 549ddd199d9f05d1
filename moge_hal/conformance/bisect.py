"""From a model that is wrong as a whole to the operation that is wrong in it.

1. The scenes of the suite (`scenes.py`) are played until one fails, and that one alone again, by an
   instance of its own: what only fails behind others is played with them.
2. The backend plays it once more, and every call of an operation is judged in order on the inputs
   that it really got (`locating.py`).
3. Every suspect is exchanged for its default: the one whose exchange makes the scene pass is the
   answer. A right kernel may leave a measured limit once in many calls, and a whole operation may
   call a wrong one of the same backend; neither passes this test. The operations of a graph cannot
   be exchanged: there the first wrong call is the answer.
4. The suite's own case that fails on it is looked up; if there is none, the inputs are saved as a
   golden case (`finding.py`).
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moge_hal.backend import Backend
from moge_hal.bind import bind_operations
from moge_hal.config import Config
from moge_hal.conformance.cases import DTYPES, Case
from moge_hal.conformance.finding import Finding, Replayed, Wrong, measured, see_again
from moge_hal.conformance.listing import every_case
from moge_hal.conformance.locating import METHODS, Answer, Bench, Observer, fresh, locate
from moge_hal.conformance.scenes import Scene, prompt_scene, scenes
from moge_hal.conformance.verdict import Skip
from moge_hal.conformance.weights import model_weights
from moge_hal.errors import UserError
from moge_hal.loading import load
from moge_hal.model import skeleton


@dataclass(frozen=True)
class Bisection:
    """What was played, and what was found."""

    backend: str
    scenes: dict[str, int]  # how many of each model
    finding: Finding | None  # None: nothing is wrong

    def report(self) -> str:
        """For a person."""
        if self.finding is not None:
            return self.finding.report()
        played = ", ".join(f"{count} of {name}" for name, count in self.scenes.items())
        return f"{self.backend} is right in every scene: {played}"

    def data(self) -> dict[str, Any]:
        """For JSON."""
        found = None if self.finding is None else self.finding.data()
        return {"backend": self.backend, "scenes": self.scenes, "finding": found}


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
            return scenes(self.config, self.weights)
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
    counts: dict[str, int] = {}
    for played in _models(model, prompt, dtype):
        name = played.name
        # What is wrong with the backend before anything runs is an error and no finding.
        bind_operations(backend, played.config.sizes, played.config.route, dtype, "infer")
        bench = Bench(played.config, played.weights, dtype)
        counts[name] = 0

        def count(scene: Scene, name: str = name) -> None:
            counts[name] += 1
            observe(f"{name}: scene {scene.name}")

        found = bench.fault(fresh(backend), played.scenes(), count)
        if found is not None:
            observe(f"{name}: scene {found[0][-1].name}, every operation")
            finding = _explain(bench, backend, label, found, observe)
            again = _see_again(...)
            return Bisection(label, counts, finding)
    if not any(counts.values()):
        raise UserError(f"{model}: its context is too short for every scene; give another model")
    return Bisection(label, counts, None)
