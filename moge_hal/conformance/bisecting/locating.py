"""Which part of a backend makes scenes fail: by watching, then by exchange.

The backend plays the scenes not compiled and watched (`recording.py`), and every call of an
operation is judged (`evidence.py`). A graph backend has nothing to watch: there the calls of the
specification are repeated (`replaying.py`). Then every suspect is exchanged for its default.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree

from moge_hal.backend import Backend
from moge_hal.bind import bind, bind_operations
from moge_hal.config import Config
from moge_hal.conformance.bisecting.evidence import Evidence, Suspect
from moge_hal.conformance.bisecting.recording import Watch
from moge_hal.conformance.bisecting.replaying import Replay
from moge_hal.conformance.forced import Oracle
from moge_hal.conformance.properties.scenes import Scene, verdict
from moge_hal.conformance.verdict import Failure, Skip
from moge_hal.runtime import Model

METHODS = ("compile", "new_cache", "pack")  # of a backend that are no operations
Observer = Callable[[str], None]  # told what is being done


class Bench:
    """A model's weights and the oracle, to try backends on."""

    def __init__(self, config: Config, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self.weights = {name: weight.to(dtype) for name, weight in weights.items()}
        self.oracle = Oracle(config, self.weights, dtype)

    def bind(self, backend: Backend) -> Model:
        """Bound to copies of the weights, which a wrong backend may spoil."""
        copies = {name: weight.clone() for name, weight in self.weights.items()}
        return bind(self.config, copies, backend, dtype=self.dtype)

    def fault(
        self,
        backend: Backend,
        scenes: Iterable[Scene],
        observe: Callable[[Scene], None] = lambda scene: None,
    ) -> tuple[list[Scene], Exception] | None:
        """Plays scenes one after the other: those up to the first that fails, and how it does.

        A backend may raise anything; whatever it is, it is the outcome.
        """
        played: list[Scene] = []
        model: Model | None = None
        for scene in scenes:
            played.append(scene)
            observe(scene)
            try:
                model = model or self.bind(backend)
                verdict(model, self.oracle, scene)
            except Skip:
                played.pop()
            except Exception as error:
                return played, error
        return None

    def shortest(
        self, backend: Backend, played: list[Scene]
    ) -> tuple[list[Scene], Exception] | None:
        """The shortest run of scenes that ends with the last one and fails on a fresh instance."""
        for start in reversed(range(len(played))):
            found = self.fault(fresh(backend), played[start:])
            if found is not None:
                return found
        return None

    def own(self, backend: Backend) -> set[str]:
        """The operations that the backend runs itself."""
        sizes, route = self.config.sizes, self.config.route
        choices = bind_operations(fresh(backend), sizes, route, self.dtype, "infer")[1]
        return {choice.op for choice in choices if choice.own}

    def watch(self, backend: Backend, scenes: list[Scene]) -> Evidence:
        """What the operations do in these scenes."""
        if not backend.graph:
            return self._watch(backend, scenes)
        evidence = self._replay(backend, scenes)
        if not evidence.wrong:
            # Lowerings that run eagerly, too, may show what hangs on the place in the step. That
            # they raise says nothing, since nobody asks them to run.
            eager = self._watch(backend, scenes)
            for op, suspect in eager.wrong.items():
                if not isinstance(suspect.call.out, Exception):
                    evidence.wrong[op] = suspect
        return evidence

    def _replay(self, backend: Backend, scenes: list[Scene]) -> Evidence:
        evidence = Evidence(self.own(backend))
        replay = Replay(self.config, self.weights, self.dtype, fresh(backend))
        try:
            model = self.bind(fresh(backend))
        except Exception as error:
            evidence.raised = error
            replay.play(scenes, None, evidence.examine)
        else:
            replay.play(scenes, model, evidence.examine)
        return evidence

    def _watch(self, backend: Backend, scenes: list[Scene]) -> Evidence:
        evidence = Evidence(self.own(backend))
        at: list[tuple[Scene, int]] = []

        def begin(number: int, scene: Scene) -> None:
            at.append((scene, number))
            text = (id(scene), scene.moves[number].text)
            watch.begin(text, scene.begins(number), scene.capacity is not None)

        try:
            model = self.bind(without(backend, "compile"))
            watch = Watch(model, self.weights, lambda call: evidence.examine(call, *at[-1]))
            for scene in scenes:
                verdict(model, self.oracle, scene, begin)
        except Exception as error:
            evidence.raised = error
        return evidence


def fresh(backend: Backend) -> Backend:
    """Another instance, which remembers nothing."""
    return type(backend)(backend.index)


def without(backend: Backend, *names: str) -> Backend:
    """A fresh instance with the contract's default for these methods."""
    other = fresh(backend)
    kind = type(other)
    defaults = {name: getattr(Backend, name) for name in names}
    other.__class__ = type(kind.__name__, (kind,), defaults)
    return other


def overrides(backend: Backend, name: str) -> bool:
    return getattr(type(backend), name) is not getattr(Backend, name)


@dataclass(frozen=True)
class Answer:
    """place: an operation, one of METHODS, or "" if nothing was found out. passes: whether the
    scenes pass with defaults for `exchanged`; None = these cannot run."""

    place: str
    passes: bool | None
    suspect: Suspect | None
    exchanged: tuple[str, ...]
    notes: tuple[str, ...]


def locate(
    bench: Bench,
    backend: Backend,
    scenes: list[Scene],
    observe: Observer,
) -> Answer:
    """Which part of the backend makes the scenes fail."""
    evidence = bench.watch(backend, scenes)

    def passes(*names: str) -> bool | None:
        observe(f"without {' and '.join(names)}")
        found = bench.fault(without(backend, *names), scenes)
        return True if found is None else False if isinstance(found[1], Failure) else None

    wrong = list(evidence.wrong)
    first = next(iter(evidence.wrong.values()), None)
    notes: list[str] = []

    def answer(place: str, suspect: Suspect | None, *exchanged: str) -> Answer:
        names = exchanged or (place,)
        return Answer(place, passes(*names), suspect, names, tuple(notes))

    if first is not None and _outlives(bench, backend, scenes, first):
        notes.append("that text alone, on a fresh instance, is right: something outlives a text")
        if overrides(backend, "new_cache") and shares_memory(bench, backend):
            notes.append("new_cache hands out the memory of a cache that is in use")
            return answer("new_cache", first)
    if first is not None and backend.graph:
        return answer(first.call.op, first)
    for name in _candidates(backend, evidence):
        if passes(name):
            suspect = _suspect(name, evidence)
            if suspect is None and name not in METHODS:
                share = f"at most {evidence.share.get(name, 0.0):.0%} of it"
                notes.append(f"alone, no call of it leaves its limit ({share}): errors add up")
            return Answer(name, True, suspect, (name,), tuple(notes))
    if first is None:
        state = f"fails ({evidence.raised})" if evidence.raised else "passes"
        notes.append(f"not compiled, the scene {state}, and every call of an operation is right")
        return Answer("", None, None, (), tuple(notes))
    place = first.call.op
    if place == "attention" and place not in evidence.own and overrides(backend, "new_cache"):
        place = "new_cache"  # the specification's attention fails on its caches
    return answer(place, first, *dict.fromkeys([place, *wrong]))


def _outlives(bench: Bench, backend: Backend, scenes: list[Scene], suspect: Suspect) -> bool:
    """Whether the text of a wrong call is right if it is all that a fresh instance sees."""
    if len(scenes) == 1 and len(suspect.scene.texts) == 1:
        return False
    text = suspect.scene.moves[suspect.number].text
    return bench.fault(fresh(backend), [suspect.scene.alone(text)]) is None


def _suspect(name: str, evidence: Evidence) -> Suspect | None:
    """The call that shows that this part of a backend is wrong."""
    if name in ("new_cache", "pack"):
        return next(iter(evidence.wrong.values()), None)
    written = evidence.written
    if name not in evidence.wrong and written is not None and written.call.op == name:
        return written
    return evidence.wrong.get(name)


def _candidates(backend: Backend, evidence: Evidence) -> Iterator[str]:
    """What may be at fault, the likeliest first."""
    likely: list[str] = []
    for op, suspect in evidence.wrong.items():
        if op == "attention" and suspect.call.cached:
            likely.append("new_cache")
        if suspect.call.weight:
            likely.append("pack")
        likely.append(op)
    if evidence.written is not None:
        likely.append(evidence.written.call.op)
    likely += METHODS
    likely += sorted(evidence.own, key=lambda op: -evidence.share.get(op, 0.0))
    for name in dict.fromkeys(likely):
        if overrides(backend, name) and (name in METHODS or name in evidence.own):
            yield name


def shares_memory(bench: Bench, backend: Backend) -> bool:
    """Whether two caches that are in use at once lie in the same memory."""
    model = bench.bind(without(backend, "compile"))
    caches = [model.new_cache(2, 16) for _ in range(2)]
    memory = [
        {
            leaf.untyped_storage().data_ptr()
            for leaf in _pytree.tree_leaves(cache)
            if isinstance(leaf, Tensor) and leaf.numel()
        }
        for cache in caches
    ]
    return bool(memory[0] & memory[1])
