"""The token loop against a model that is asked without a cache, and its text against slow programs.

Two kinds of model: a small random one in float64, in which rows of a batch and rows alone agree far
below any near-tie, and a step that recites a script, so that a test can say which tokens come.
"""

import copy
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as JsonTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from moge_hal.backend import Backend, StepOut
from moge_hal.bind import bind
from moge_hal.config import preset
from moge_hal.errors import UserError
from moge_hal.generate import Completion, Piece, generate, stream, tokens
from moge_hal.runtime import Model
from moge_hal.sampling import Sampling
from moge_hal.tokenizer import Tokenizer
from moge_hal.training.bpe import train_bpe
from moge_hal.training.init import initial_weights

torch.set_num_threads(1)


@cache
def tokenizer() -> Tokenizer:
    return train_bpe(["the cat sat on the mat, the rat sat on that. Käse — 你好 🙂"] * 3, 300)


@cache
def model(backend: type[Backend] = Backend, **changes: Any) -> Model:
    """Random weights, large enough that the next token depends on all that came before."""
    config = preset("tiny", vocab_size=tokenizer().vocab_size, **changes)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: w + 0.3 * torch.randn(w.shape, generator=generator)
        for name, w in initial_weights(config, 0).items()
    }
    made = bind(config, weights, backend(), dtype=torch.float64)
    made.tokenizer = tokenizer()
    return made


class Recital:
    """A step for `Model` whose row b, after position p, gives token scripts[b][p + 1]; -1 = NaN."""

    def __init__(self, scripts: Sequence[Sequence[int]], vocab: int) -> None:
        self.scripts, self.vocab = scripts, vocab
        self.seen: list[tuple[Any, Any]] = []  # ids and positions of every call

    def __call__(
        self, ids: Tensor, positions: Tensor, cache: Any, last_only: bool = False
    ) -> StepOut:
        assert last_only, "logits of whole prompts would fill the memory"
        self.seen.append((ids.tolist(), positions.tolist()))
        logits = torch.zeros(len(ids), 1, self.vocab)
        for row, (script, at) in enumerate(zip(self.scripts, positions[:, -1], strict=True)):
            following = -1 if at < 0 else [*script, 0][at + 1]  # padding may answer anything
            logits[row, 0, following] = 1.0 if following >= 0 else torch.nan
        return StepOut(logits, cache, torch.zeros(1, ids.numel(), 1, dtype=torch.int32))


def reciter(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    tok: Tokenizer | None = None,
    **changes: Any,
) -> Model:
    tok = tok or tokenizer()
    config = preset("tiny", vocab_size=tok.vocab_size, **changes)
    scripts = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
    step = Recital(scripts, tok.vocab_size)
    return Model(config, Backend(), step, torch.float32, [], {}, tok)


def seen(model: Model) -> list[tuple[Any, Any]]:
    assert isinstance(model.run_step, Recital)
    return model.run_step.seen


def ids_of(model: Model, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    new: list[list[int]] = [[] for _ in prompts]
    for step in tokens(model, prompts, **options):
        for token in step:
            new[token.row].append(token.id)
    return new


IDS = st.lists(st.integers(0, 262), min_size=1, max_size=12)
SAMPLINGS = st.sampled_from([Sampling(), Sampling(0.8, seed=1), Sampling(1.3, 20, 0.9, seed=2)])


def test_greedy_equals_the_model_asked_anew_for_every_token() -> None:
    """No cache, no batch, no chunks: the plainest program that there is."""
    prompts = [[1, 50, 60, 70, 80], [1, 90]]
    expected = []
    for prompt in prompts:
        row = list(prompt)
        for _ in range(8):
            row.append(int(model()([row])[0, -1].argmax()))
        expected.append(row[len(prompt) :])
    assert ids_of(model(), prompts, max_new_tokens=8) == expected
    assert len({*expected[0], *expected[1]}) > 4, "a model that repeats itself proves little"


@settings(max_examples=15, deadline=None)
@given(
    st.lists(IDS, min_size=1, max_size=4),
    SAMPLINGS,
    st.sampled_from([1, 3, 512]),
    st.integers(1, 6),
)
def test_a_row_of_a_ragged_batch_is_the_row_alone(
    prompts: list[list[int]], sampling: Sampling, chunk: int, new: int
) -> None:
    """In any order too: the batch runs reversed once more, under the same numbers."""
    alone = [
        ids_of(model(), [prompt], max_new_tokens=new, sampling=sampling, rows=[row])[0]
        for row, prompt in enumerate(prompts)
    ]
    options: dict[str, Any] = {"max_new_tokens": new, "sampling": sampling, "chunk": chunk}
    assert ids_of(model(), prompts, **options) == alone
    rows = range(len(prompts))[::-1]
    assert ids_of(model(), prompts[::-1], rows=rows, **options) == alone[::-1]


def test_another_seed_or_row_draws_another_text_and_the_same_the_same() -> None:
    def drawn(seed: int) -> list[list[int]]:
        sampling = Sampling(1.0, seed=seed)
        return ids_of(model(), [[1, 2]] * 2, max_new_tokens=8, sampling=sampling)

    assert drawn(7) == drawn(7)
    assert len({tuple(ids) for seed in (7, 8) for ids in drawn(seed)}) == 4


def test_what_a_step_is_given() -> None:
    """Left padding, chunks, one column a token, padding for a row that has ended."""
    prompts, answers = [[1, 10, 11, 12, 13], [1, 20]], [[30, 31, 4, 0, 0], [40, 41, 42, 43, 44]]
    made = reciter(prompts, answers)
    assert ids_of(made, prompts, max_new_tokens=5, eos_id=4, chunk=2) == [[30, 31, 4], answers[1]]
    assert seen(made) == [
        ([[1, 10], [0, 0]], [[0, 1], [-1, -1]]),
        ([[11, 12], [0, 1]], [[2, 3], [-1, 0]]),
        ([[13], [20]], [[4], [1]]),
        ([[30], [40]], [[5], [2]]),
        ([[31], [41]], [[6], [3]]),
        ([[0], [42]], [[-1], [4]]),
        ([[0], [43]], [[-1], [5]]),
    ]


class Donated(Backend):
    """Returns new tensors for its cache and ruins those that it was given, as it may."""

    name = "donated"

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        fresh = type(cache)(cache.k.clone(), cache.v.clone())
        cache.k.fill_(torch.nan)
        cache.v.fill_(torch.nan)
        return super().attention(q, k, v, fresh, positions)


def test_the_cache_is_donated() -> None:
    prompts = [[1, 5, 6, 7], [1]]
    expected = ids_of(model(), prompts, max_new_tokens=5, chunk=2)
    assert ids_of(model(Donated), prompts, max_new_tokens=5, chunk=2) == expected


@pytest.mark.parametrize("chunk", [5, 512])
def test_fills_the_context_to_its_last_position(chunk: int) -> None:
    """Rows of unequal lengths reach it at different steps, in a cache that is just large enough."""
    small = model(max_position_embeddings=16)
    prompts = [list(range(1, 16)), list(range(1, 10)), [1]]
    steps = list(tokens(small, prompts, max_new_tokens=100, chunk=chunk))
    for row, prompt in enumerate(prompts):
        new = [token for step in steps for token in step if token.row == row]
        assert len(prompt) + len(new) == 16
        assert [token.finish for token in new] == [None] * (len(new) - 1) + ["length"]
        # A longer context changes nothing but the end.
        assert [[t.id for t in new]] == ids_of(model(), [prompt], max_new_tokens=len(new))


def test_a_caller_can_end_a_row() -> None:
    ended: set[int] = set()
    live = []
    for step in tokens(model(), [[1], [2], [3]], max_new_tokens=4, ended=ended):
        live.append([token.row for token in step])
        ended.add({1: 1, 2: 0, 3: 2}[len(live)])
    assert live == [[0, 1, 2], [0, 2], [2]]


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=9), min_size=1, max_size=3
    ),
    st.sampled_from([0.0, 1.0]),
    st.lists(st.sampled_from(["t", "e ", "\ufffd", "at"]), max_size=2),
)
def test_pieces_join_to_the_whole(prompts: list[str], temperature: float, stop: list[str]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": temperature, "stop": stop}
    whole = model().generate(prompts, **options)
    rows: list[list[Piece]] = [[] for _ in prompts]
    for piece in stream(model(), prompts, **options):
        rows[piece.row].append(piece)
    for row, (completion, pieces) in enumerate(zip(whole, rows, strict=True)):
        assert completion.prompt == prompts[row]
        assert completion.prompt_ids == tokenizer().encode(prompts[row])
        assert completion.text == str(completion) == "".join(piece.text for piece in pieces)
        assert completion.ids == [piece.id for piece in pieces]
        assert {piece.finish for piece in pieces[:-1]} <= {None}
        assert pieces[-1].finish == completion.finish
        alone = ids_of(
            model(),
            [completion.prompt_ids],
            max_new_tokens=8,
            sampling=Sampling(temperature),
            eos_id=tokenizer().eos_id,
            rows=[row],
        )[0]
        assert completion.ids == alone[: len(completion.ids)]
        assert completion.text == first_stop(tokenizer().decode(alone), stop)


def first_stop(text: str, stops: Sequence[str]) -> str:
    """Reads one character at a time; at the first that completes stop strings, cuts the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


WORDS = st.lists(st.sampled_from(["that", "at", "a", "t", " the", "é", "🙂"]), max_size=6)


@settings(deadline=None)
@example(" the", ["the", "h"], False)  # both in one token: the first to be complete is "h"
@example("that", ["at", "that"], True)  # complete together: the longest
@given(WORDS.map("".join), st.lists(WORDS.filter(len).map("".join), max_size=3), st.booleans())
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str], split: bool) -> None:
    """Tokens cut the text anywhere, inside characters too; no piece gives what is cut off later."""
    tok = tokenizer()
    answer = [*(spell(text) if split else tok.encode(text, bos=False)), 4]
    pieces = list(stream(reciter([tok.encode("x")], [answer]), "x", stop=stops))
    assert "".join(piece.text for piece in pieces) == first_stop(text, stops)
    assert pieces[-1].finish == "stop"
    assert [piece.id for piece in pieces] == answer[: len(pieces)]
    if not any(stop in text for stop in stops):
        assert pieces[-1].id == tok.eos_id == 4


def spell(text: str) -> list[int]:
    """Ids of a text, one a byte of its UTF-8."""
    tok = tokenizer()
    byte_ids = {tok.bytes_of(i): i for i in range(tok.vocab_size)}
    return [byte_ids[bytes([byte])] for byte in text.encode()]


def test_held_back_text_comes_as_soon_as_it_is_certain() -> None:
    made = reciter([tokenizer().encode("x")], [spell("ab.ab!")])
    pieces = list(stream(made, "x", stop="ab!", max_new_tokens=6))
    assert [piece.text for piece in pieces] == ["", "", "ab.", "", "", ""]
    assert [piece.finish for piece in pieces] == [None] * 5 + ["stop"]
    pieces = list(stream(made, "x", stop="ab!", max_new_tokens=5))
    assert [piece.text for piece in pieces] == ["", "", "ab.", "", "ab"]
    assert pieces[-1].finish == "length"


def test_characters_of_several_tokens_come_whole() -> None:
    made = reciter([tokenizer().encode("x")], [spell("é🙂")])
    pieces = list(stream(made, "x", max_new_tokens=6))
    assert [piece.text for piece in pieces] == ["", "é", "", "", "", "🙂"]
    cut = made.generate("x", max_new_tokens=4)
    assert (cut.text, cut.finish) == ("é\ufffd", "length")


def test_the_tokenizers_end_of_sequence_goes_before_the_configurations() -> None:
    tok = tokenizer()
    assert tok.eos_id == 4
    [word] = spell("a")
    prompt = tok.encode("x")
    made = reciter([prompt], [[word, 2, word, 4, word]], eos_token_id=2)
    completion = made.generate("x")
    assert completion.ids == [word, 2, word, 4]
    assert (completion.text, completion.finish) == ("aa", "stop")
    without = copy.copy(tok)
    without.eos_id = None
    made = reciter([prompt], [[word, 4, word, 2]], without, eos_token_id=word)
    completion = made.generate("x")  # the end is no text, whatever its id spells
    assert (completion.ids, completion.text, completion.finish) == ([word], "", "stop")


def test_a_space_before_the_first_word_depends_on_the_prompt(tmp_path: Path) -> None:
    """Tokenizers that put a space before a text drop it again, but not before an answer."""
    bpe = JsonTokenizer(models.BPE({"<s>": 0, "▁a": 1, "▁": 2, "a": 3}, [("▁", "a")]))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Metaspace()
    bpe.add_special_tokens(["<s>"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"bos_token_id": 0}')
    tok = Tokenizer.load(tmp_path)
    for prompt, expected in (("a", " a"), ("", "a")):
        made = reciter([tok.encode(prompt)], [[1]], tok, eos_token_id=None, bos_token_id=None)
        assert made.generate(prompt, max_new_tokens=1).text == expected


def test_one_prompt_gives_one_completion_and_a_list_a_list() -> None:
    assert isinstance(model().generate("the", max_new_tokens=1), Completion)
    (completion,) = model().generate(("the",), max_new_tokens=1)
    assert completion == model().generate("the", max_new_tokens=1)
    assert [piece.id for piece in model().stream("the", max_new_tokens=1)] == completion.ids


@pytest.mark.parametrize("call", [generate, stream])
@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "there is no prompt: give at least one"),
        ("x" * 700, {}, "the prompt has 701 tokens, but the context of 640 .*: shorten the prompt"),
        (["x", "x" * 639], {}, "prompt 2 of 2 has 640 tokens"),
        ("caf\udce9", {}, "the prompt is not UTF-8 .* at 3 .*: convert it"),
        (["x", "\ud83d"], {}, "prompt 2 of 2 is not UTF-8"),
        (["x", 3], {}, "prompt 2 of 2 is of type int: give text"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens = 0 must be a whole number of at least 1"),
        ("x", {"max_new_tokens": 2.5}, "max_new_tokens = 2.5 must be"),
        ("x", {"chunk": 0}, "chunk = 0 must be"),
        ("x", {"temperature": -1}, "temperature = -1 must be"),
        ("x", {"top_k": 0}, "top_k = 0 must be"),
        ("x", {"top_p": 2}, "top_p = 2 must be"),
        ("x", {"seed": -1}, "seed = -1 must be"),
        ("x", {"stop": ["a", ""]}, "stop = '' must be a text of at least one character"),
        ("x", {"stop": [3]}, "stop = 3 must be"),
        ("x", {"stop": "\udce9"}, "a stop string is not UTF-8"),
    ],
)
def test_says_what_is_wrong_before_anything_runs(
    call: Any, prompt: Any, options: dict[str, Any], message: str
) -> None:
    made = reciter([], [], train_bpe([], 263))  # a token is a byte
    with pytest.raises(UserError, match=message):
        call(made, prompt, **options)
    assert seen(made) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[1], []], {}, "prompt 2 of 2 has no tokens"),
        ([[1, 300]], {}, "the prompt holds token id 300, outside the model's vocabulary of"),
        ([[1, -1]], {}, "the prompt holds token id -1, outside"),
        ([[1]], {"max_new_tokens": True}, "max_new_tokens = True must be"),
        ([[1]], {"rows": [0, 1]}, "rows = .* must be 1 numbers of at least 0"),
        ([[1]], {"rows": [-1]}, "rows = "),
    ],
)
def test_ids_are_checked_before_anything_runs(
    prompts: list[list[int]], options: dict[str, Any], message: str
) -> None:
    made = reciter([], [])
    with pytest.raises(UserError, match=message):
        tokens(made, prompts, **options)
    assert seen(made) == []


def test_an_empty_prompt_is_the_beginning_of_a_text_if_there_is_one() -> None:
    assert model().generate("", max_new_tokens=1).prompt_ids == [tokenizer().bos_id]
    without = copy.copy(tokenizer())
    without.bos_id = None
    with pytest.raises(UserError, match="the prompt has no tokens: give it at least one"):
        reciter([], [], without).generate("")


def test_a_model_without_tokenizer_says_which_file_is_missing() -> None:
    made = reciter([[1]], [[5]])
    made.tokenizer = None
    with pytest.raises(UserError, match=r"no tokenizer: put its tokenizer.json"):
        made.generate("x")
    assert ids_of(made, [[1]], max_new_tokens=1) == [[5]]


def test_broken_logits_are_an_error_that_names_row_and_token() -> None:
    made = reciter([[1], [1]], [[5, 6], [5, -1]])
    with pytest.raises(UserError, match="row 1 for its new token 1 is nan"):
        ids_of(made, [[1], [1]], max_new_tokens=3)
