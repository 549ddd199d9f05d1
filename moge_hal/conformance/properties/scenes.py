"""Runs of a whole model as data: texts, how they are cut into steps, and what caches they write.

They are the scenes that `whole_model.py` judges, of the same names. As data, a scene can be played
again with another backend, with one that is watched, or in part.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moge_hal.backend import Backend
from moge_hal.bind import bind
from moge_hal.config import Config
from moge_hal.conformance.forced import Oracle, Transcript, play
from moge_hal.conformance.inputs import integers
from moge_hal.conformance.judge import worst
from moge_hal.conformance.properties.caching import chunk_sizes, ragged_positions, spoil
from moge_hal.conformance.verdict import Failure, Verdict
from moge_hal.errors import CacheFullError, UserError
from moge_hal.generate import tokens
from moge_hal.runtime import Model

NEW_TOKENS = 8  # that follow a prompt


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
    written: dict[int, Transcript] = {}
    for number, move in enumerate(scene.moves):
        text, part = scene.texts[move.text], scene.part(number)
        if move.text not in caches:
            caches[move.text] = new_cache(model, scene, move.text)
        if not move.columns:
            continue
        # Copies, since a wrong backend may write over what it is given.
        ids, positions = text.ids[:, part].clone(), text.positions[:, part].clone()
        cache = caches[move.text]
        observe(number, scene)
        if move.refused:
            _must_be_refused(model, ids, positions, cache)
            continue
        step, caches[move.text] = play(
            model, ids, positions, [move.columns], cache, scene.last_only
        )
        before = written.get(move.text)
        written[move.text] = step if before is None else before.then(step)
    return [written[text] for text in range(len(scene.texts))]


def new_cache(model: Model, scene: Scene, text: int) -> object:
    """A fresh cache for a text. Raises `Skip` if it cannot be spoiled."""
    if scene.capacity is None:
        return None
    cache = model.new_cache(len(scene.texts[text].ids), scene.capacity)
    if scene.spoiled:
        spoil(cache)
    return cache


def _must_be_refused(model: Model, ids: Tensor, positions: Tensor, cache: object) -> None:
    try:
        model.step(ids, positions, cache)
    except CacheFullError:
        return
    raise Failure("a step beyond the capacity of the cache is no error")


def verdict(
    model: Model, oracle: Oracle, scene: Scene, observe: Observe = lambda number, scene: None
) -> Verdict:
    """The judgement of a model on a scene; raises `Failure`, and what the backend raises."""
    return worst([oracle.check(text) for text in perform(model, scene, observe)])


def scenes(config: Config, weights: Mapping[str, Tensor]) -> Iterator[Scene]:
    """Every scene that fits into the model's context; a cheap one first."""
    for scene in _drawn(config):
        longest = max(int(text.positions.max()) for text in scene.texts) + 1
        if longest <= config.max_position_embeddings:
            yield scene
    if config.max_position_embeddings >= 75:
        ids = integers("bisect/generate/ids", 2, 11, low=0, high=config.vocab_size)
        yield _written(config, weights, "generate", [ids[0].tolist(), ids[1, :6].tolist()], 64, 5)


def _drawn(config: Config) -> Iterator[Scene]:
    def draw(name: str, batch: int, length: int) -> Text:
        ids = integers(f"bisect/{name}/ids", batch, length, low=0, high=config.vocab_size)
        return Text(ids, torch.arange(length).repeat(batch, 1))

    def one(name: str, text: Text, sizes: Sequence[int], capacity: int | None) -> Scene:
        return Scene(name, (text,), tuple(Move(0, size) for size in sizes), capacity)

    yield one("one-pass", draw("one-pass", 2, 33), [33], None)
    yield one("decode", draw("decode", 2, 21), [13, *[1] * 8], 24)
    yield one("chunks", draw("chunks", 1, 50), chunk_sizes(50), 64)
    last = draw("last-only", 2, 21)
    yield replace(one("last-only", last, [21], None), last_only=True)
    yield replace(one("last-only", last, [9, 8, 1, 1, 1, 1], 24), last_only=True)
    yield one("batch", draw("batch", 37, 7), [5, 1, 1], 8)
    padded = Text(draw("ragged", 4, 22).ids, ragged_positions(4, 22))
    yield one("ragged", padded, [11, 6, 1, 1, 1, 1, 1], 24)
    text = draw("two-caches", 2, 20)
    turns = [Move(i, size) for size in (0, 11, 7, 1, 1) for i in (0, 1)]
    yield Scene("two-caches", (text, Text(text.ids.flip(1), text.positions)), tuple(turns), 24)
    first = draw("stale", 2, 40)
    second = Text(first.ids.flip(1)[:, :15], first.positions[:, :15])
    moves = [*[Move(0, size) for size in (38, 1, 1)], *[Move(1, size) for size in (11, 1, 1, 2)]]
    yield Scene("stale", (first, second), tuple(moves), 48)
    yield replace(one("unwritten", draw("unwritten", 2, 19), [17, 1, 1], 24), spoiled=True)
    full = (Move(0, 8), Move(0, 4, refused=True), Move(0, 1))
    yield Scene("cache-full", (draw("cache-full", 2, 12),), full, 9)
    context = min(config.max_position_embeddings, 1024)
    sizes = [531, context - 533, 1, 1] if context > 533 else [context - 2, 1, 1]
    if context > 2:
        yield one("long", draw("long", 1, context), sizes, context)


def prompt_scene(config: Config, weights: Mapping[str, Tensor], prompt: Sequence[int]) -> Scene:
    """A prompt and the 8 tokens that the specification writes after it, whatever a backend would.

    Raises `UserError` if they do not fit into the context.
    """
    room = config.max_position_embeddings - NEW_TOKENS
    if not 0 < len(prompt) <= room:
        raise UserError(
            f"the prompt has {len(prompt)} tokens; it must have from 1 to {room}, so that "
            f"{NEW_TOKENS} more fit into the model's context"
        )
    return _written(config, weights, "prompt", [list(prompt)], NEW_TOKENS, len(prompt))


def _written(
    config: Config,
    weights: Mapping[str, Tensor],
    name: str,
    prompts: list[list[int]],
    count: int,
    chunk: int,
) -> Scene:
    """What `generate` does: prompts, padded on the left, in chunks; then the new tokens."""
    model = bind(config, weights, Backend(), dtype=torch.float32)
    found = tokens(model, prompts, max_new_tokens=count, chunk=chunk)
    new = [[token.id for token in step] for step in found]
    longest = max(map(len, prompts))
    rows = [
        [0] * (longest - len(p)) + p + list(n)
        for p, n in zip(prompts, zip(*new, strict=True), strict=True)
    ]
    column = torch.arange(longest + count)
    starts = torch.tensor([longest - len(prompt) for prompt in prompts])
    positions = (column - starts[:, None]).clamp(min=-1)
    sizes = [min(chunk, longest - start) for start in range(0, longest, chunk)] + [1] * count
    moves = tuple(Move(0, size) for size in sizes)
    return Scene(name, (Text(torch.tensor(rows), positions),), moves, len(column), last_only=True)
