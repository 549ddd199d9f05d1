"""Both kinds of tokenizer files: text comes back, streams agree with it, names stay text."""

import io
import json
import re
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from moge_hal.errors import UserError
from moge_hal.tokenizer import SPECIAL_TOKENS, Tokenizer
from moge_hal.training.bpe import train_bpe

SAMPLE = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. Call me Ishmael, some 40 years ago.",
    "Über den Wolken — 系统\uff1a用户\uff1a你好 🙂 [unused10] and it is, that it is.",
]
# Characters that this Python knows: how a younger Unicode composes the others is open.
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=80)


@cache
def byte_level() -> Tokenizer:
    return train_bpe(SAMPLE, 400)


def train_sentencepiece(**options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE * 3),
        model_writer=model,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **{"vocab_size": 420, "byte_fallback": True} | options,
    )
    return model.getvalue()


@pytest.fixture(scope="module", params=["user_defined_symbols", "control_symbols"])
def pangu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a released Pangu's: its marks may be either kind of piece."""
    folder = tmp_path_factory.mktemp("pangu")
    data = train_sentencepiece(**{request.param: ["[unused9]", "[unused10]"]})
    (folder / "tokenizer.model").write_bytes(data)
    eos = sentencepiece.SentencePieceProcessor(model_proto=data).piece_to_id("[unused10]")
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": eos}))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@given(TEXT)
def test_any_text_comes_back_in_nfc(text: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id
    assert ids[1:] == tokenizer.encode(text, bos=False)
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@given(st.lists(st.integers(0, 399), max_size=40))
def test_a_stream_joins_to_the_whole_whatever_the_tokens(ids: list[int]) -> None:
    tokenizer = byte_level()
    ids = [token_id % tokenizer.vocab_size for token_id in ids]
    stream = tokenizer.stream()
    assert "".join(
        [stream.push(token_id) for token_id in ids]
    ) + stream.flush() == tokenizer.decode(ids)
    expected = tokenizers.Tokenizer.from_str(tokenizer.engine.serialize().decode())
    assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=True)


def test_a_stream_gives_whole_characters_only() -> None:
    tokenizer = train_bpe([], 263)  # a token is a byte
    stream = tokenizer.stream()
    pushed = [stream.push(token_id) for token_id in tokenizer.encode("é好🙂!", bos=False)]
    assert pushed == ["", "é", "", "", "好", "", "", "", "🙂", "!"]
    assert stream.flush() == ""
    stream.push(tokenizer.encode("好", bos=False)[0])
    assert stream.flush() == "\ufffd"


def test_byte_level_details() -> None:
    tokenizer = byte_level()
    digits = train_bpe(["in 2024 "] * 9, 300).encode("2024", bos=False)
    assert len(digits) == 4 and len(set(digits)) == 3  # however often it was seen
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 4)
    assert [tokenizer.token_id(name) for name in SPECIAL_TOKENS] == list(range(7))
    assert tokenizer.token_id("no such token") is None
    assert train_bpe([], 1000).vocab_size == 263  # nothing to merge
    with pytest.raises(UserError, match="at least 263"):
        train_bpe([], 262)
    with pytest.raises(UserError, match="not in the vocabulary of"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode("a\udcff")


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", " ", "["]), max_size=6).map("".join))
def test_names_of_special_tokens_in_a_text_stay_text(text: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(text, bos=False)
    assert all(token_id >= len(SPECIAL_TOKENS) for token_id in ids)
    assert tokenizer.decode([1, *ids, 4]) == text  # and the tokens themselves are no text


def test_training_is_the_same_in_every_byte_in_another_process() -> None:
    script = (
        "import sys, json; from moge_hal.training.bpe import train_bpe\n"
        "print(train_bpe(json.loads(sys.argv[1]), 400).digest)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, json.dumps(SAMPLE[::-1])],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={"PYTHONHASHSEED": "1", "PATH": ""},
    )
    assert run.stdout.strip() == byte_level().digest
    assert byte_level().digest != train_bpe(SAMPLE, 300).digest


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    byte_level().save(tmp_path / "a")
    loaded = Tokenizer.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    names = ["tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (loaded.bos_id, loaded.eos_id, loaded.digest) == (1, 4, byte_level().digest)
    assert loaded.encode(SAMPLE[1]) == byte_level().encode(SAMPLE[1])


def test_other_programs_add_the_same_bos(tmp_path: Path) -> None:
    byte_level().save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("It is a truth").ids == byte_level().encode("It is a truth")


def test_sentencepiece_reads_a_released_folder(pangu: Path) -> None:
    tokenizer = Tokenizer.load(pangu)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(pangu / "tokenizer.model"))
    assert tokenizer.vocab_size == 420
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, theirs.piece_to_id("[unused10]"))
    for text in ["It is a truth", " two  spaces ", "你好 🙂\n", "", " "]:
        ids = tokenizer.encode(text, bos=False)
        assert ids == theirs.encode(text)
        assert tokenizer.decode(ids) == text == theirs.decode(ids)
    text = "a [unused10] b[unused9]</s>"
    ids = tokenizer.encode(text)
    assert not {*ids[1:]} & {
        tokenizer.token_id(name) for name in ("[unused9]", "[unused10]", "</s>")
    }
    assert tokenizer.decode([*ids, tokenizer.eos_id or 0]) == text
    assert tokenizer.token_id("no such piece") is None


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_sentencepiece_streams_join_to_the_whole(tmp_path: Path, add_dummy_prefix: bool) -> None:
    data = train_sentencepiece(add_dummy_prefix=add_dummy_prefix)
    (tmp_path / "tokenizer.model").write_bytes(data)
    tokenizer = Tokenizer.load(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)

    @given(TEXT.filter(lambda text: "▁" not in text))  # which SentencePiece takes for a space
    def text_comes_back(text: str) -> None:
        ids = tokenizer.encode(text, bos=False)
        assert tokenizer.decode(ids) == text == theirs.decode(ids)

    @given(st.lists(st.integers(0, 419), max_size=30))
    def any_tokens_agree(ids: list[int]) -> None:
        stream = tokenizer.stream()
        joined = "".join([stream.push(token_id) for token_id in ids]) + stream.flush()
        assert joined == tokenizer.decode(ids)

    text_comes_back()
    any_tokens_agree()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    tokenizer.save(tmp_path / "copy")
    assert (tmp_path / "copy/tokenizer.model").read_bytes() == data
    assert Tokenizer.load(tmp_path / "copy").digest == tokenizer.digest


def test_sentencepiece_without_bytes_shows_what_it_does_not_know(tmp_path: Path) -> None:
    data = train_sentencepiece(byte_fallback=False, vocab_size=120)
    (tmp_path / "tokenizer.model").write_bytes(data)
    (tmp_path / "tokenizer_config.json").write_text('{"unk_token": "<unk>"}')
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("it ж is", bos=False)
    assert tokenizer.token_id("<unk>") in ids
    assert tokenizer.decode(ids) == "it  ⁇  is"


def test_a_stream_goes_on_after_a_prompt(pangu: Path) -> None:
    tokenizer = Tokenizer.load(pangu)
    ids = tokenizer.encode("It is a truth")
    stream = tokenizer.stream()
    prompt = "".join(stream.push(token_id) for token_id in ids[:3])
    rest = "".join(stream.push(token_id) for token_id in ids[3:])
    assert prompt and rest and prompt + rest == "It is a truth"


def test_tokenizer_json_with_sentencepiece_pieces(tmp_path: Path) -> None:
    """The other common kind of tokenizer.json, with a mark that is not flagged as special."""
    theirs = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    theirs.pre_tokenizer = pre_tokenizers.Metaspace()
    theirs.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", *in_bytes])
    theirs.train_from_iterator(SAMPLE[:1], trainer)
    fields = json.loads(theirs.to_str())
    fields["added_tokens"] = fields["added_tokens"][:2]  # bytes are plain pieces
    theirs = tokenizers.Tokenizer.from_str(json.dumps(fields))
    theirs.add_tokens(["[unused10]"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [387, 0]}')
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 387)
    for text in ["It is a truth", "that 你好 it", "it \x00"]:
        ids = tokenizer.encode(text, bos=False)
        assert tokenizer.decode(ids) == text == theirs.decode(ids)
    mark = theirs.token_to_id("[unused10]")
    assert mark in theirs.encode("it is [unused10]").ids
    assert mark not in tokenizer.encode("it is [unused10]")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokenizer.json", b"", "tokenizer.json cannot be read"),
        ("tokenizer.json", b'{"version": "1.0"}', "tokenizer.json cannot be read"),
        ("tokenizer.json", b"{}", r"\(it lacks 'added_tokens'\)"),
        ("tokenizer.json", b"[]", r"\(it holds no JSON object\)"),
        ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json is not JSON"),
        ("tokenizer.model", b"", "tokenizer.model cannot be read"),
        ("tokenizer.model", b"version https://git-lfs", "tokenizer.model cannot be read"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not JSON"),
        ("config.json", b"[]", "no tokenizer.json or tokenizer.model"),
    ],
)
def test_says_what_is_wrong_with_a_folder(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("value", [400, [400, 4], -1, True, "</s>", 4.0])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("kind", ["bos", "eos"])
def test_refuses_an_id_that_no_text_can_have(
    tmp_path: Path, kind: str, name: str, value: object
) -> None:
    tokenizer = byte_level()
    tokenizer.save(tmp_path)
    assert tokenizer.vocab_size <= 400
    (tmp_path / name).write_text(json.dumps({f"{kind}_token_id": value}))
    rule = f"must be an id below {tokenizer.vocab_size}, the size of the tokenizer's"
    with pytest.raises(UserError, match=re.escape(f"{name}: {kind}_token_id = {value!r} {rule}")):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("value", [None, []])
def test_an_id_that_is_not_stated_is_named_elsewhere(tmp_path: Path, value: object) -> None:
    byte_level().save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer.load(tmp_path).eos_id == 7


def test_refuses_a_decoder_it_does_not_know(tmp_path: Path) -> None:
    theirs = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    theirs.decoder = decoders.WordPiece()
    theirs.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="WordPiece"):
        Tokenizer.load(tmp_path)
    byte_level().save(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        Tokenizer.load(tmp_path)
