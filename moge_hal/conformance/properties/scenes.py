"""Runs of a whole model as data: texts, how they are cut into steps, and what caches they write.

`whole_model.py` has those that the suite judges. As data, a scene can be played again with another
backend, with one that is watched, or in part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moge_hal.conformance.forced import Oracle, Transcript, transcribe
from moge_hal.conformance.judge import worst
from moge_hal.conformance.properties.caching import spoil
from moge_hal.conformance.subject import same_bits
from moge_hal.conformance.verdict import Failure, Verdict
from moge_hal.errors import CacheFullError
from moge_hal.runtime import Model


@dataclass(frozen=True)
class Text:
    """ids and positions [B, S], -1 = padding."""

    ids: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Move:
    """The next columns of a text, in one step; 0 columns: its cache is made, and that is all.

    refused: they do not fit into the cache, and must be an error that writes nothing.
    """

    text: int
    columns: int
    refused: bool = False


@dataclass(frozen=True)
class Scene:
    """capacity: of every text's cache, None = no caches. spoiled: fresh caches are full of NaN."""

    name: str
    texts: tuple[Text, ...]
    moves: tuple[Move, ...]
    capacity: int | None = None
    spoiled: bool = False
    last_only: bool = False

    @staticmethod
    def of(
        name: str, text: Text, sizes: Sequence[int], capacity: int | None = None, **more: bool
    ) -> "Scene":
        """One text in steps of these sizes."""
        return Scene(name, (text,), tuple(Move(0, size) for size in sizes), capacity, **more)

    @property
    def longest(self) -> int:
        """How many positions of the context it needs."""
        return max(int(text.positions.max()) for text in self.texts) + 1

    def begins(self, number: int) -> bool:
        """Whether a move is the first step of its text."""
        text = self.moves[number].text
        return not any(m.columns for m in self.moves[:number] if m.text == text and not m.refused)

    def part(self, number: int) -> slice:
        """The columns of a move in its text."""
        move = self.moves[number]
        before = [m.columns for m in self.moves[:number] if m.text == move.text and not m.refused]
        return slice(sum(before), sum(before) + move.columns)

    def alone(self, text: int) -> "Scene":
        """One of its texts, as if the others were not there."""
        moves = tuple(replace(move, text=0) for move in self.moves if move.text == text)
        return replace(self, texts=(self.texts[text],), moves=moves)


# Told before a step: the number of the move, and what is played in it.
Observe = Callable[[int, Scene], None]


def perform(
    model: Model, scene: Scene, observe: Observe = lambda number, scene: None
) -> list[Transcript]:
    """Plays a scene -> what came out of each text."""
    caches: dict[int, object] = {}
    given: list[tuple[Tensor, Tensor]] = []  # what steps returned, and copies
    written: dict[int, Transcript] = {}
    for number, move in enumerate(scene.moves):
        text, part = scene.texts[move.text], scene.part(number)
        if move.text not in caches:
            caches[move.text] = new_cache(model, scene, move.text)
        if not move.columns:
            continue
        now = Text(text.ids[:, part].clone(), text.positions[:, part].clone())
        cache = caches[move.text]
        observe(number, scene)
        if move.refused:
            _must_be_refused(model, now, cache)
            continue
        out = model.step(now.ids, now.positions, cache, scene.last_only)
        step = transcribe(model, text.ids[:, part], text.positions[:, part], out, scene.last_only)
        if not torch.equal(now.ids, step.ids) or not torch.equal(now.positions, step.positions):
            raise Failure("the ids or positions of a step were written to")
        caches[move.text] = out.cache
        given += [(output, output.clone()) for output in (out.logits, out.routes)]
        before = written.get(move.text)
        written[move.text] = step if before is None else before.then(step)
    if not all(same_bits(output, copy) for output, copy in given):
        raise Failure("a later step wrote over the logits or routes that a step returned")
    return [written[text] for text in range(len(scene.texts))]


def new_cache(model: Model, scene: Scene, text: int) -> object:
    """A fresh cache for a text. Raises `Skip` if it cannot be spoiled."""
    if scene.capacity is None:
        return None
    cache = model.new_cache(len(scene.texts[text].ids), scene.capacity)
    if scene.spoiled:
        spoil(cache)
    return cache


def _must_be_refused(model: Model, text: Text, cache: object) -> None:
    try:
        model.step(text.ids, text.positions, cache)
    except CacheFullError:
        return
    raise Failure("a step beyond the capacity of the cache is no error")


def verdict(
    model: Model, oracle: Oracle, scene: Scene, observe: Observe = lambda number, scene: None
) -> Verdict:
    """The judgement of a model on a scene; raises `Failure`, and what the backend raises."""
    return worst([oracle.check(text) for text in perform(model, scene, observe)])
