"""Text from a model: one loop over `model.step`, the same for every backend, eager or graph.

    tokens      ids to ids: batches of ragged rows, no tokenizer needed
    stream      text to text, piece by piece
    generate    the same, whole

Prompts are padded on the left (position -1), so that the last column is real for every row, and
read in chunks; then every step feeds each row its newest token, or padding once it has ended. Ids
and positions stay on the host; `model.step` moves them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import chain
from operator import index
from typing import TYPE_CHECKING, Any, Literal

import torch

from moge_hal.errors import UserError, refuse, require_whole
from moge_hal.runtime import Model
from moge_hal.sampling import Sampling

if TYPE_CHECKING:
    from moge_hal.tokenizer import Tokenizer

Finish = Literal["stop", "length"]  # the text came to its end; the room for it did


@dataclass(frozen=True)
class Token:
    """One new token of one row. finish: why it is the row's last, None if more follow."""

    row: int
    id: int
    finish: Finish | None


@dataclass(frozen=True)
class Piece(Token):
    """A token with the text that it made certain: often a word, sometimes nothing yet."""

    text: str


@dataclass(frozen=True)
class Completion:
    """What follows a prompt. text and ids are the new ones only; ids include the token that ended
    the text, text does not. finish: "stop" (end of sequence or a stop string) or "length"."""

    prompt: str
    text: str
    ids: list[int]
    prompt_ids: list[int]
    finish: Finish

    def __str__(self) -> str:
        return self.text


def generate(
    model: Model, prompt: str | Sequence[str], **options: Any
) -> Completion | list[Completion]:
    """The text that follows a prompt; a list of prompts runs as one batch and gives a list.

    options: those of `stream`. Raises UserError before anything runs if one of them, or a prompt,
    cannot be served.
    """
    prompts = _texts("prompt", prompt)
    pieces: list[list[Piece]] = [[] for _ in prompts]
    for piece in stream(model, prompts, **options):
        pieces[piece.row].append(piece)
    completions = [
        Completion(
            prompt=text,
            text="".join(piece.text for piece in row),
            ids=[piece.id for piece in row],
            prompt_ids=ids,
            finish=next(piece.finish for piece in row if piece.finish is not None),
        )
        for text, ids, row in zip(prompts, _encode(model, prompts), pieces, strict=True)
    ]
    return completions[0] if isinstance(prompt, str) else completions


def stream(
    model: Model,
    prompt: str | Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    chunk: int = 512,
) -> Iterator[Piece]:
    """What follows a prompt, or each of several: one piece a new token, which joined are the text.

    max_new_tokens: of each row; less where the context ends before. temperature, top_k, top_p,
    seed: see `Sampling`. stop: strings at which a text ends; they are not part of it.
    chunk: how many tokens of a prompt are read at once.
    Characters come whole. What may be the beginning of a stop string is held back until it is
    certain. Raises UserError as `generate` does: by the call, not by the first piece.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    prompt_ids = _encode(model, _texts("prompt", prompt))
    stops = _texts("stop", stop)
    for string in stops:
        if not (isinstance(string, str) and string):
            refuse("stop", string, "must be a text of at least one character")
        _require_utf8("a stop string", string)
    tokenizer = _tokenizer(model)
    eos_id = model.config.eos_token_id if tokenizer.eos_id is None else tokenizer.eos_id
    writers = [_Writer(tokenizer, ids, stops) for ids in prompt_ids]
    ended: set[int] = set()
    steps = tokens(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_id=eos_id,
        chunk=chunk,
        ended=ended,
    )

    def run() -> Iterator[Piece]:
        for token in chain.from_iterable(steps):
            text, stopped = writers[token.row].write(token)
            if stopped:
                ended.add(token.row)
            yield Piece(token.row, token.id, "stop" if stopped else token.finish, text)

    return run()


def tokens(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    eos_id: int | None = None,
    chunk: int = 512,
    rows: Sequence[int] | None = None,
    ended: AbstractSet[int] = frozenset(),
) -> Iterator[list[Token]]:
    """The token loop: yields for every step the new token of every row that is still being written.

    prompts: ids of each row, of any lengths. sampling: None = greedy. eos_id: ends a row, as its
    last token; None = nothing does. chunk: how many columns of the prompts are read at once.
    Ids that the model's tokenizer does not know are never drawn.
    rows: the number under which each row draws (default 0, 1, ...): a part of a batch, run alone
    under the numbers that it had there, draws the same tokens.
    ended: a set that the caller may grow meanwhile: rows (by place in `prompts`) to write no more.
    Raises UserError before anything runs if a prompt cannot be served.
    """
    require_whole("max_new_tokens", max_new_tokens)
    require_whole("chunk", chunk)
    try:
        prompts = [[index(token_id) for token_id in prompt] for prompt in prompts]
    except TypeError as error:
        raise UserError(f"prompts must be a list of lists of ids: {error}") from None
    _check_prompts(model, prompts)
    numbers = range(len(prompts)) if rows is None else rows
    if len(numbers) != len(prompts) or min(numbers) < 0:
        refuse("rows", rows, f"must be {len(prompts)} numbers of at least 0, one a prompt")
    rule = sampling or Sampling()
    lengths = [len(prompt) for prompt in prompts]
    longest, context = max(lengths), model.config.max_position_embeddings
    # Released embeddings are often padded: no text has the ids beyond the tokenizer's.
    known = model.tokenizer.vocab_size if model.tokenizer else model.config.vocab_size

    def run() -> Iterator[list[Token]]:
        ids, positions = _columns(len(prompts), longest)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            positions[row, longest - len(prompt) :] = torch.arange(len(prompt))
        cache = model.new_cache(len(prompts), min(longest + max_new_tokens, context))
        for part in zip(ids.split(chunk, 1), positions.split(chunk, 1), strict=True):
            logits, cache, *_ = model.step(*part, cache, last_only=True)

        live: Sequence[int] = range(len(prompts))
        for number in range(max_new_tokens):
            on_host = logits[:, -1, :known].cpu().numpy()
            new = []
            for row in live:
                token_id = rule.choose(on_host[row], numbers[row], number)
                full = number + 1 == min(max_new_tokens, context - lengths[row])
                last: Finish | None = "length" if full else None
                new.append(Token(row, token_id, "stop" if token_id == eos_id else last))
            yield new
            new = [token for token in new if token.finish is None and token.row not in ended]
            if not new:
                return
            live = [token.row for token in new]
            ids, positions = _columns(len(prompts), 1)
            for token in new:
                ids[token.row], positions[token.row] = token.id, lengths[token.row] + number
            logits, cache, *_ = model.step(ids, positions, cache, last_only=True)

    return run()


def _check_prompts(model: Model, prompts: Sequence[Sequence[int]]) -> None:
    if not prompts:
        raise UserError("there is no prompt: give at least one")
    vocab, context = model.config.vocab_size, model.config.max_position_embeddings
    for at, prompt in enumerate(prompts):
        name = _name(at, len(prompts))
        if not prompt:
            raise UserError(f"{name} has no tokens: give it at least one")
        if len(prompt) >= context:
            raise UserError(
                f"{name} has {len(prompt)} tokens, but the context of {context} "
                f"(max_position_embeddings) must hold it and a new one: shorten the prompt"
            )
        for token_id in prompt:
            if not 0 <= token_id < vocab:
                raise UserError(
                    f"{name} holds token id {token_id}, outside the model's vocabulary of {vocab}: "
                    f"use the tokenizer that the model was trained with"
                )


def _columns(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and positions [batch, length] int64 of nothing but padding."""
    shape = (batch, length)
    return torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1, dtype=torch.int64)


class _Writer:
    """Turns one row's new tokens into text up to the first stop string.

    The first is the one that is complete first; of several that end together, the longest. So the
    text does not depend on where one token ends and the next begins.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], stops: list[str]) -> None:
        self._decoder = tokenizer.stream()
        for token_id in prompt_ids:  # whether a space is text depends on what stands before it
            self._decoder.push(token_id)
        self._stops = stops
        self._held = ""  # not given out yet: it may be the beginning of a stop string

    def write(self, token: Token) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string has ended it."""
        if token.finish != "stop":  # the end of sequence is no text, whatever its id spells
            self._held += self._decoder.push(token.id)
        if token.finish is not None:
            self._held += self._decoder.flush()
        found = [(at + len(s), at) for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            return self._held[: min(found)[1]], True
        certain = len(self._held)
        if token.finish is None:
            certain -= max((_overlap(self._held, s) for s in self._stops), default=0)
        text, self._held = self._held[:certain], self._held[certain:]
        return text, False


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _texts(name: str, given: str | Sequence[str]) -> list[str]:
    """One text or several, as a list; the texts themselves are not judged here."""
    if not isinstance(given, Iterable):
        refuse(name, given, "must be text, or a list of texts")
    return [given] if isinstance(given, str) else list(given)


def _encode(model: Model, prompts: Sequence[str]) -> list[list[int]]:
    tokenizer = _tokenizer(model)
    for at, text in enumerate(prompts):
        name = _name(at, len(prompts))
        if not isinstance(text, str):
            raise UserError(f"{name} is of type {type(text).__name__}: give text")
        _require_utf8(name, text)
    return [tokenizer.encode(text) for text in prompts]


def _require_utf8(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate: Python's way to carry a foreign byte
        raise UserError(
            f"{name} is not UTF-8 (a byte or half a character at {error.start} has no meaning in "
            f"it): convert it to UTF-8"
        ) from None


def _tokenizer(model: Model) -> Tokenizer:
    if model.tokenizer is None:
        raise UserError(
            "the model has no tokenizer: put its tokenizer.json (or tokenizer.model) into the "
            "model's folder and load it again, or use `moge_hal.generate.tokens`, which takes ids"
        )
    return model.tokenizer


def _name(at: int, prompts: int) -> str:
    return "the prompt" if prompts == 1 else f"prompt {at + 1} of {prompts}"
