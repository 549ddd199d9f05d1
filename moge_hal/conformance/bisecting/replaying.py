"""The calls of a model that cannot be watched: a graph backend's operations run in its graph alone.

The specification plays the scenes, on the routes that the backend took, and every call that it
makes is repeated with the backend's operation, compiled by itself as the suite does it, over the
backend's own caches.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.bind import bind
from moge_hal.config import Config
from moge_hal.conformance.bisecting.recording import Call, Watch
from moge_hal.conformance.cases import Case
from moge_hal.conformance.golden.store import case_of
from moge_hal.conformance.inputs import Args
from moge_hal.conformance.oracle import Follow, Outputs
from moge_hal.conformance.properties.caching import spoil
from moge_hal.conformance.properties.scenes import Scene, perform
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Skip
from moge_hal.router import RouteSpec
from moge_hal.runtime import Model


class Guided(Follow):
    """Follows routes where it is given any, and goes its own way otherwise."""

    name = "guided"

    def route(
        self,
        logits: Tensor,
        spec: RouteSpec,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if len(self.router) < len(self.routes):
            return super().route(logits, spec, scale, bias)
        return ops.route(logits, spec, scale, bias)


class Replay:
    """Plays scenes with the specification and repeats its calls with `backend`."""

    def __init__(
        self, config: Config, weights: Mapping[str, Tensor], dtype: torch.dtype, backend: Backend
    ) -> None:
        self.config, self.weights, self.dtype = config, weights, dtype
        self.subject = Subject(backend)
        self.caches: dict[tuple[Any, int | None], Any] = {}  # by text and layer
        self.refused: set[str] = set()  # operations that the default serves in the model, too

    def play(self, scenes: list[Scene], model: Model | None, seen: Any) -> None:
        """model: the backend's own, which shows the routes, if it could be bound. seen: told of
        every call that was repeated, with the scene and the number of the move."""
        at: list[tuple[Scene, int]] = []

        def repeat(call: Call) -> None:
            for again in self._again(call, at[-1][0]):
                seen(again, *at[-1])

        guided = bind(self.config, self.weights, Guided(), dtype=self.dtype)
        guide = guided.backend
        assert isinstance(guide, Guided)
        guide.follow([])
        watch = Watch(guided, self.weights, repeat)
        for scene in scenes:
            routes = _routes(model, scene)

            def begin(number: int, scene: Scene, routes: list[Tensor] = routes) -> None:
                at.append((scene, number))
                text = scene.moves[number].text
                new, cached = scene.begins(number), scene.capacity is not None
                watch.begin((id(scene), text), new, cached)
                self.text = (id(scene), text)
                if new and cached:
                    self._new_caches(scene, text)
                part = routes[text][:, :, scene.part(number)] if routes else None
                guide.follow([] if part is None else list(part.flatten(1, 2)))

            perform(guided, scene, begin)

    def _new_caches(self, scene: Scene, text: int) -> None:
        assert scene.capacity is not None
        batch = len(scene.texts[text].ids)
        cache = self.subject.backend.new_cache(self.config, batch, scene.capacity, self.dtype)
        if scene.spoiled:
            spoil(cache)
        for layer, held in enumerate(cache.layers):
            self.caches[self.text, layer] = held

    def _again(self, call: Call, scene: Scene) -> list[Call]:
        """The call with the backend's outputs, behind its parts if the backend leaves it to
        them."""
        args: Args = call.args
        case = case_of(call.op, args)
        key = (self.text, call.layer)
        if call.cached:
            assert scene.capacity is not None
            args = {**args, "cache": self.caches[key]}
            case = _with_room(case, scene.capacity)
        parts: list[Call] = []
        if not self.subject.bound(case).choices[call.op].own:
            parts = [again for part in call.inner for again in self._again(part, scene)]
        out: Outputs | Exception
        try:
            found = self.subject.call(case, args)
        except Skip:  # the model runs the default in the graph, and nothing can be compiled
            return parts
        except Exception as error:  # whatever a backend raises is the outcome
            out = error
        else:
            if call.op == "attention":
                found, held = found
                if call.cached:
                    self.caches[key] = held
            out = tuple(part.cpu() for part in (found if isinstance(found, tuple) else (found,)))
        return [*parts, replace(call, out=out, inner=())]


def _with_room(case: Case, capacity: int) -> Case:
    """The suite compiles attention for caches of S + 2 positions."""
    size = case.sizes
    sizes = f"B{size['B']}-S{capacity - 2}-H{size['H']}-Hkv{size['Hkv']}-d{size['d']}"
    return replace(case, shape=sizes)


def _routes(model: Model | None, scene: Scene) -> list[Tensor]:
    """Those that the backend took in each text, [L, B, S, K]; none if it cannot say, or if they
    lead nowhere."""
    if model is None:
        return []
    try:
        routes = [text.routes for text in perform(model, scene)]
    except Exception:  # the scene is played because something is wrong with it
        return []
    experts = model.config.num_experts
    valid = all(int(ids.min()) >= 0 and int(ids.max()) < experts for ids in routes)
    return routes if valid else []
