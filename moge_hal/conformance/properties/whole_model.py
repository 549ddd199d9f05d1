"""What a whole model must keep, through `Model.step` alone: eager and graph backends alike.

Every property plays a scene with the backend's model and lets the oracle follow (`forced.py`):
however a text is cut into steps, its logits are those of one pass.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor

from moge_hal.backend import StepOut
from moge_hal.bind import bind
from moge_hal.config import preset
from moge_hal.conformance.cases import Case
from moge_hal.conformance.forced import Oracle, Transcript, play, transcribe
from moge_hal.conformance.inputs import integers
from moge_hal.conformance.judge import worst
from moge_hal.conformance.properties.bitwise import bitwise
from moge_hal.conformance.properties.caching import chunk_sizes, ragged_positions, spoil
from moge_hal.conformance.properties.capture import no_sync
from moge_hal.conformance.properties.training import train_step
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure, Verdict
from moge_hal.conformance.weights import model_weights, random_weights
from moge_hal.errors import CacheFullError, UserError
from moge_hal.generate import tokens
from moge_hal.runtime import Model

EMITTED = 64  # tokens of a generated text
OTHER_DTYPES = (torch.bfloat16, torch.float16, torch.float64, torch.int8)


@lru_cache(maxsize=4)
def _oracle(case: Case) -> Oracle:
    return Oracle(*model_weights(case), case.dtype)


def _scene(
    subject: Subject, case: Case, batch: int, length: int
) -> tuple[Model, Oracle, Tensor, Tensor]:
    """The backend's model, the oracle, and random ids with their positions [B, S]."""
    config, weights = model_weights(case)
    ids = integers(f"{case.id}/ids", batch, length, low=0, high=config.vocab_size)
    positions = torch.arange(length).repeat(batch, 1)
    model = subject.model(case.shape, config, weights, case.dtype)
    return model, _oracle(replace(case, prop="")), ids, positions


def one_pass(subject: Subject, case: Case) -> Verdict:
    """Whole rows without a cache.

    Guards against what hangs on how a model uses the operations: the bias of the output projection
    left out, router_scale forgotten, a weight packed for another role than its own.
    """
    model, oracle, ids, positions = _scene(subject, case, 2, 33)
    return oracle.check(play(model, ids, positions, [33], None)[0])


def decode(subject: Subject, case: Case) -> Verdict:
    """A prompt, then a token at a time.

    Guards against: a decode path of its own (one row, another kernel) that drifts from prefill;
    positions that start at 0 again.
    """
    model, oracle, ids, positions = _scene(subject, case, 2, 21)
    sizes = [13, *[1] * 8]
    return oracle.check(play(model, ids, positions, sizes, model.new_cache(2, 24))[0])


def chunks(subject: Subject, case: Case) -> Verdict:
    """Prefill in chunks of odd sizes.

    Guards against: masks that suppose an empty cache; shapes that a compiled step was specialised
    to.
    """
    model, oracle, ids, positions = _scene(subject, case, 1, 50)
    return oracle.check(play(model, ids, positions, chunk_sizes(50), model.new_cache(1, 64))[0])


def last_only(subject: Subject, case: Case) -> Verdict:
    """What generation asks for: of a prompt, a chunk and single tokens, the last position alone;
    and of whole rows without a cache.

    Guards against: a shortcut before the output projection that takes the first row, or that of
    another sequence; nothing else of the suite goes that way.
    """
    model, oracle, ids, positions = _scene(subject, case, 2, 21)
    verdicts = []
    for sizes in ([21], [9, 8, 1, 1, 1, 1]):
        cache = None if len(sizes) == 1 else model.new_cache(2, 24)
        verdicts += [oracle.check(play(model, ids, positions, sizes, cache, True)[0])]
    return worst(verdicts)


def batch(subject: Subject, case: Case) -> Verdict:
    """Thirty-seven rows at once: a prompt, then two tokens.

    Guards against: a kernel for up to 8, 16 or 32 rows whose next block is wrong.
    """
    model, oracle, ids, positions = _scene(subject, case, 37, 7)
    return oracle.check(play(model, ids, positions, [5, 1, 1], model.new_cache(37, 8))[0])


def two_caches(subject: Subject, case: Case) -> Verdict:
    """Two texts, each with a cache of its own, written in turn.

    Guards against: buffers that belong to the model instead of the cache, which one text at a time
    never shows.
    """
    model, oracle, ids, positions = _scene(subject, case, 2, 20)
    texts = [ids, ids.flip(1)]
    caches = [model.new_cache(2, 24) for _ in texts]
    written: list[Transcript | None] = [None, None]
    for start, end in ((0, 11), (11, 18), (18, 19), (19, 20)):
        for i, text in enumerate(texts):
            part = slice(start, end)
            more, caches[i] = play(
                model, text[:, part], positions[:, part], [end - start], caches[i]
            )
            before = written[i]
            written[i] = more if before is None else before.then(more)
    return worst([oracle.check(text) for text in written if text is not None])


def long(subject: Subject, case: Case) -> Verdict:
    """A prompt of 531 tokens, another chunk up to the end of the context (1,024 positions at most),
    and the last 2 tokens that it holds.

    Guards against: rotary tables, masks or caches that end before the context does; angles computed
    in low precision, which are right for the first hundred positions; blocks of 512 whose second
    one is wrong.
    """
    context = min(model_weights(case)[0].max_position_embeddings, 1024)
    model, oracle, ids, positions = _scene(subject, case, 1, context)
    sizes = [531, context - 533, 1, 1]
    return oracle.check(play(model, ids, positions, sizes, model.new_cache(1, context))[0])


def ragged(subject: Subject, case: Case) -> Verdict:
    """Rows of different lengths, padded anywhere, in two chunks and then a token at a time, each
    row at its own position.

    Guards against: padding that takes a slot, a position, or an expert's capacity; a NaN of a
    padding row that the next layer spreads. Rows end at different times: a finished row is fed
    padding while the others go on.
    """
    model, oracle, ids, _ = _scene(subject, case, 4, 22)
    positions = ragged_positions(*ids.shape)
    cache = model.new_cache(4, 24)
    return oracle.check(play(model, ids, positions, [11, 6, 1, 1, 1, 1, 1], cache)[0])


def stale(subject: Subject, case: Case) -> Verdict:
    """Two prompts one after the other, each with a new cache: the second sees nothing of the first.

    Guards against: buffers that are handed out again without being cleared, and a length that is
    not reset.
    """
    model, oracle, ids, positions = _scene(subject, case, 2, 40)
    play(model, ids, positions, [38, 1, 1], model.new_cache(2, 48))
    ids, positions = ids.flip(1)[:, :15], positions[:, :15]
    return oracle.check(play(model, ids, positions, [11, 1, 1, 2], model.new_cache(2, 48))[0])


def unwritten(subject: Subject, case: Case) -> Verdict:
    """A cache full of NaN instead of zeros: a slot that nobody wrote must not reach the logits.

    Guards against: 0 * NaN in an attention that masks the scores and multiplies all values.
    """
    model, oracle, ids, positions = _scene(subject, case, 2, 19)
    cache = model.new_cache(2, 24)
    spoil(cache)
    return oracle.check(play(model, ids, positions, [17, 1, 1], cache)[0])


def cache_full(subject: Subject, case: Case) -> Verdict:
    """A step beyond the capacity is an error that writes nothing, and the last slot is usable, also
    by a row that is padded in the same call.

    Guards against: a capacity off by one; writes that wrap around over the first tokens; an error
    that leaves half a step behind; padding that is written into the last slot.
    """
    model, oracle, ids, positions = _scene(subject, case, 2, 12)
    before, cache = play(model, ids[:, :8], positions[:, :8], [8], model.new_cache(2, 9))
    try:
        model.step(ids[:, 8:], positions[:, 8:], cache)
    except CacheFullError:
        pass
    else:
        raise Failure("a step of 4 tokens into the last slot of a cache of 9 is no error")
    after, _ = play(model, ids[:, 8:9], positions[:, 8:9], [1], cache)
    padded = torch.stack([(torch.arange(12) - 3).clamp_min(-1), torch.arange(12)])
    padded[1, 9:] = -1
    full, _ = play(model, ids, padded, [12], model.new_cache(2, 9))
    return worst([oracle.check(before.then(after)), oracle.check(full)])


def generate(subject: Subject, case: Case) -> Verdict:
    """64 greedy tokens after two prompts of different lengths, by the loop that writes every text.
    The oracle is forced to the text: each token is the best one after those before it, within the
    limit.

    Guards against: what only many steps show, such as a cache whose slots are taken twice; a row
    that reads another row's position; and a whole path that no other property takes, prefill for
    the last position alone.
    """
    model, oracle, ids, _ = _scene(subject, case, 2, 11)
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


PROPERTIES: dict[str, Callable[[Subject, Case], Verdict]] = {
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
    "dtype": dtype,
    "generate": generate,
    "train-step": train_step,
    "bitwise": bitwise,
    "no-sync": no_sync,
}
