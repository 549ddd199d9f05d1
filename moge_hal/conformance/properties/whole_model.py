"""What a whole model must keep, through `Model.step` alone: eager and graph backends alike.

Most properties are scenes (`scenes.py`): the backend's model plays one, and the oracle follows it
(`forced.py`). However a text is cut into steps, its logits are those of one pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor

from moge_hal.backend import StepOut
from moge_hal.bind import bind
from moge_hal.config import Config, preset
from moge_hal.conformance.cases import Case
from moge_hal.conformance.forced import Oracle, Transcript, transcribe
from moge_hal.conformance.inputs import integers
from moge_hal.conformance.judge import worst
from moge_hal.conformance.properties.bitwise import bitwise
from moge_hal.conformance.properties.caching import chunk_sizes, ragged_positions
from moge_hal.conformance.properties.capture import no_sync
from moge_hal.conformance.properties.scenes import Move, Scene, Text, verdict
from moge_hal.conformance.properties.training import train_step
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure, Verdict
from moge_hal.conformance.weights import model_weights, random_weights
from moge_hal.errors import UserError
from moge_hal.generate import tokens
from moge_hal.runtime import Model

EMITTED = 64  # tokens of a generated text
FAR = 131072  # positions, the context of Pangu Pro MoE
OTHER_DTYPES = (torch.bfloat16, torch.float16, torch.float64, torch.int8)

Draw = Callable[[int, int], Text]  # rows, tokens -> random ids at positions 0, 1, ...


def one_pass(draw: Draw, context: int) -> list[Scene]:
    """Whole rows without a cache.

    Guards against what hangs on how a model uses the operations: the bias of the output projection
    left out, router_scale forgotten, a weight packed for another role than its own.
    """
    return [Scene.of("one-pass", draw(2, 33), [33])]


def decode(draw: Draw, context: int) -> list[Scene]:
    """A prompt, then a token at a time.

    Guards against: a decode path of its own (one row, another kernel) that drifts from prefill;
    positions that start at 0 again; logits in a buffer that the next step writes over.
    """
    return [Scene.of("decode", draw(2, 21), [13, *[1] * 8], 24)]


def chunks(draw: Draw, context: int) -> list[Scene]:
    """Prefill in chunks of odd sizes.

    Guards against: masks that suppose an empty cache; shapes that a compiled step was specialised
    to.
    """
    return [Scene.of("chunks", draw(1, 50), chunk_sizes(50), 64)]


def last_only(draw: Draw, context: int) -> list[Scene]:
    """What generation asks for: of a prompt, a chunk and single tokens, the last position alone;
    and of whole rows without a cache.

    Guards against: a shortcut before the output projection that takes the first row, or that of
    another sequence.
    """
    text = draw(2, 21)
    return [
        Scene.of("last-only", text, [21], last_only=True),
        Scene.of("last-only", text, [9, 8, 1, 1, 1, 1], 24, last_only=True),
    ]


def batch(draw: Draw, context: int) -> list[Scene]:
    """Thirty-seven rows at once: a prompt, then two tokens.

    Guards against: a kernel for up to 8, 16 or 32 rows whose next block is wrong.
    """
    return [Scene.of("batch", draw(37, 7), [5, 1, 1], 8)]


def two_caches(draw: Draw, context: int) -> list[Scene]:
    """Two texts, each with a cache of its own, written in turn.

    Guards against: buffers that belong to the model instead of the cache, which one text at a time
    never shows.
    """
    text = draw(2, 20)
    other = Text(text.ids.flip(1), text.positions)
    turns = [Move(which, size) for size in (0, 11, 7, 1, 1) for which in (0, 1)]
    return [Scene("two-caches", (text, other), tuple(turns), 24)]


def long(draw: Draw, context: int) -> list[Scene]:
    """A prompt of 531 tokens, another chunk up to the end of the context (1,024 positions at most),
    and the last 2 tokens that it holds.

    Guards against: rotary tables, masks or caches that end before the context does; angles computed
    in low precision, which are right for the first hundred positions; blocks of 512 whose second
    one is wrong.
    """
    length = min(context, 1024)
    sizes = [531, length - 533, 1, 1] if length > 533 else [length - 2, 1, 1]
    return [Scene.of("long", draw(1, length), sizes, length)]


def ragged(draw: Draw, context: int) -> list[Scene]:
    """Rows of different lengths, padded anywhere, in two chunks and then a token at a time, each
    row at its own position.

    Guards against: padding that takes a slot, a position, or an expert's capacity; a NaN of a
    padding row that the next layer spreads. Rows end at different times: a finished row is fed
    padding while the others go on.
    """
    text = Text(draw(4, 22).ids, ragged_positions(4, 22))
    return [Scene.of("ragged", text, [11, 6, 1, 1, 1, 1, 1], 24)]


def stale(draw: Draw, context: int) -> list[Scene]:
    """Two prompts one after the other, each with a new cache: the second, shorter one sees nothing
    of the first.

    Guards against: buffers that are handed out again without being cleared, and a length that is
    not reset.
    """
    first = draw(2, 40)
    second = Text(first.ids.flip(1)[:, :15], first.positions[:, :15])
    moves = [Move(0, size) for size in (38, 1, 1)] + [Move(1, size) for size in (11, 1, 1, 2)]
    return [Scene("stale", (first, second), tuple(moves), 48)]


def unwritten(draw: Draw, context: int) -> list[Scene]:
    """A cache full of NaN instead of zeros: a slot that nobody wrote must not reach the logits.

    Guards against: 0 * NaN in an attention that masks the scores and multiplies all values.
    """
    return [Scene.of("unwritten", draw(2, 19), [17, 1, 1], 24, spoiled=True)]


def cache_full(draw: Draw, context: int) -> list[Scene]:
    """A step beyond the capacity is an error that writes nothing, and the last slot is usable, also
    by a row that is padded in the same call.

    Guards against: a capacity off by one; writes that wrap around over the first tokens; an error
    that leaves half a step behind; padding that is written into the last slot.
    """
    text = draw(2, 12)
    beyond = (Move(0, 8), Move(0, 4, refused=True), Move(0, 1), Move(0, 1, refused=True))
    positions = torch.stack([(torch.arange(12) - 3).clamp_min(-1), torch.arange(12)])
    positions[1, 9:] = -1
    padded = Scene.of("cache-full", Text(text.ids, positions), [12], 9)
    return [Scene("cache-full", (text,), beyond, 9), padded]


SCENES: dict[str, Callable[[Draw, int], list[Scene]]] = {
    "one-pass": one_pass,
    "decode": decode,
    "chunks": chunks,
    "last-only": last_only,
    "batch": batch,
    "two-caches": two_caches,
    "long": long,
    "ragged": ragged,
    "stale": stale,
    "unwritten": unwritten,
    "cache-full": cache_full,
}


def scenes_of(name: str, config: Config, key: str) -> list[Scene]:
    """The scenes of a property for a model. key: of the case, which the ids are drawn from."""

    def draw(rows: int, length: int) -> Text:
        ids = integers(f"{key}/{name}/ids", rows, length, low=0, high=config.vocab_size)
        return Text(ids, torch.arange(length).repeat(rows, 1))

    return SCENES[name](draw, config.max_position_embeddings)


def _played(subject: Subject, case: Case) -> Verdict:
    model, oracle = _model(subject, case)
    scenes = scenes_of(case.prop, model.config, case.key)
    return worst([verdict(model, oracle, scene) for scene in scenes])


def _model(subject: Subject, case: Case) -> tuple[Model, Oracle]:
    """The backend's model, and the oracle."""
    config, weights = model_weights(case)
    model = subject.model(case.shape, config, weights, case.dtype)
    return model, _oracle(replace(case, prop=""))


@lru_cache(maxsize=4)
def _oracle(case: Case) -> Oracle:
    return Oracle(*model_weights(case), case.dtype)


def far(subject: Subject, case: Case) -> Verdict:
    """The last positions of a context of 131,072, behind the first ones.

    Guards against: angles that are computed in float32 (position * frequency), which are off by
    6e-5 at position 1,000 and by 8e-3 here; tables or positions that a shorter type cuts.
    """
    config, weights = model_weights(case)
    config = replace(config, max_position_embeddings=FAR)
    model = subject.model(f"{case.shape} far", config, weights, case.dtype)
    text = Text(
        integers(f"{case.id}/ids", 2, 33, low=0, high=config.vocab_size),
        torch.stack([torch.arange(33), torch.arange(33)]),
    )
    text.positions[0, 16:] += FAR - 33
    text.positions[1] += FAR - 33
    return verdict(model, _far_oracle(replace(case, prop="")), Scene.of("far", text, [33]))


@lru_cache(maxsize=2)
def _far_oracle(case: Case) -> Oracle:
    config, weights = model_weights(case)
    return Oracle(replace(config, max_position_embeddings=FAR), weights, case.dtype)


def generate(subject: Subject, case: Case) -> Verdict:
    """64 greedy tokens after two prompts of different lengths, by the loop that writes every text.
    The oracle is forced to the text: each token is the best one after those before it, within the
    limit.

    Guards against: what only many steps show, such as a cache whose slots are taken twice; a row
    that reads another row's position; and a whole path that no other property takes, prefill for
    the last position alone.
    """
    model, oracle = _model(subject, case)
    ids = integers(f"{case.id}/ids", 2, 11, low=0, high=model.config.vocab_size)
    recorder = Recorder(model)
    prompts = [ids[0].tolist(), ids[1, :6].tolist()]
    emitted = [
        [token.id for token in step]
        for step in tokens(recorder, prompts, max_new_tokens=EMITTED, chunk=5)
    ]
    return oracle.check_tokens(recorder.transcript, torch.tensor(emitted).T)


class Recorder(Model):
    """A model that writes down what its steps did."""

    def __init__(self, model: Model) -> None:
        vars(self).update(vars(model))
        self._steps: list[Transcript] = []

    def step(self, ids: Tensor, positions: Tensor, cache: Any, last_only: bool = False) -> StepOut:
        out = super().step(ids, positions, cache, last_only)
        self._steps.append(transcribe(self, ids, positions, out, last_only))
        return out

    @property
    def transcript(self) -> Transcript:
        """All steps so far."""
        return reduce(Transcript.then, self._steps)


def dtype(subject: Subject, case: Case) -> Verdict:
    """A parameter type that the backend does not name is a clear error when a model is bound.

    Guards against: a silent conversion, or a crash in the middle of the first step.
    """
    config = preset("tiny")
    weights = random_weights(config, 0)
    for other in OTHER_DTYPES:
        if other in subject.backend.dtypes:
            continue
        try:
            bind(config, weights, subject.backend, dtype=other)
        except UserError as error:
            if str(other).removeprefix("torch.") not in str(error):
                raise Failure(f"the refusal of {other} does not name it: {error}") from None
        else:
            raise Failure(f"{other} was accepted, which is not among the backend's dtypes")
    return Verdict()


PROPERTIES: Mapping[str, Callable[[Subject, Case], Verdict]] = {
    **dict.fromkeys(SCENES, _played),
    "far": far,
    "dtype": dtype,
    "generate": generate,
    "train-step": train_step,
    "bitwise": bitwise,
    "no-sync": no_sync,
}
