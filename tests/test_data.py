"""Corpora, the held-out part and the batches: nothing lost, nothing leaked, nothing random."""

import json
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moge_hal.errors import UserError
from moge_hal.training.bpe import train_bpe
from moge_hal.training.data import Document, batch, pack, read_corpus, split

NOVELS = Path(__file__).parent.parent / "moge_hal/models/novels/corpus.jsonl.xz"
TOKENS = np.arange(10_000, dtype=np.uint16)


def test_the_novels_are_whole_and_clean() -> None:
    novels = read_corpus(NOVELS)
    assert [novel.title for novel in novels] == [
        "Sense and Sensibility",
        "Pride and Prejudice",
        "Mansfield Park",
        "Emma",
        "Northanger Abbey",
        "Persuasion",
        "Moby-Dick",
    ]
    headings = []
    for novel in novels:
        lines = novel.text.removesuffix("\n").split("\n")
        assert all(line == " ".join(line.split()) != "" for line in lines)
        assert novel.text.isprintable() or set(c for c in novel.text if not c.isprintable()) == {
            "\n"
        }
        long = [line for line in lines if len(line) > 80]
        assert len(set(long)) == len(long)  # nothing twice
        headings.append(sum(line.upper().startswith("CHAPTER ") for line in lines))
    assert headings == [50, 61, 48, 55, 31, 24, 135]
    assert sum(len(novel.text.encode()) for novel in novels) == 5_200_436


def test_reads_every_kind_of_corpus(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("zwei\r\nüber".encode())
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n")
    (tmp_path / "notes.md").write_text("not text of the corpus")
    assert read_corpus(tmp_path) == [Document("a", "", "one\n"), Document("b", "", "zwei\nüber")]
    assert read_corpus(tmp_path / "b.txt") == [Document("b", "", "zwei\nüber")]
    lines = json.dumps({"title": "T", "author": "A", "text": "x\u2028y"}, ensure_ascii=False)
    lines += "\n\n" + json.dumps({"text": "z"}) + "\n"
    expected = [Document("T", "A", "x\u2028y"), Document("line 3", "", "z")]
    (tmp_path / "c.jsonl").write_bytes(lines.encode())
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    assert read_corpus(tmp_path / "c.jsonl") == read_corpus(tmp_path / "c.jsonl.xz") == expected


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"ab\xff", "not UTF-8 at byte 2"),
        ("a.pdf", b"text", "no .txt"),
        ("a.jsonl", b"\n", "no documents"),
        ("a.jsonl", b'{"text": "x"}\n{"text', "line 2: not JSON"),
        ("a.jsonl", b"[]", "line 1: needs an object"),
        ("a.jsonl", b'{"text": ""}', "line 1: needs an object"),
        ("a.jsonl", b'{"text": "\\ud800"}', "half a character"),
        ("a.jsonl.xz", b"text", "no whole xz file"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "x"}')[:-8], "no whole xz file"),
    ],
)
def test_says_what_is_wrong_with_a_corpus(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_corpus(tmp_path / name)


def test_says_that_there_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no corpus at"):
        read_corpus(tmp_path / "absent.txt")
    with pytest.raises(UserError, match=r"holds no \.txt file"):
        read_corpus(tmp_path)


@given(st.lists(st.text("ab \n", max_size=60), min_size=1), st.floats(0.01, 0.99))
def test_split_cuts_and_loses_nothing(texts: list[str], fraction: float) -> None:
    documents = [Document(str(n), "", text) for n, text in enumerate(texts)]
    counts = [sum(line.strip() != "" for line in text.split("\n")) for text in texts]
    if max(counts) < 2:
        with pytest.raises(UserError, match="too short"):
            split(documents, fraction)
        return
    train, held_out = split(documents, fraction)
    tails = {document.title: document.text for document in held_out}
    assert [head.text + tails.get(head.title, "") for head in train] == texts
    for head, count in zip(train, counts, strict=True):
        kept_back = sum(line.strip() != "" for line in tails.get(head.title, "").split("\n"))
        assert kept_back == (min(max(1, round(count * fraction)), count - 1) if count > 1 else 0)


def test_split_refuses_a_fraction_that_is_none() -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        split([Document("a", "", "x\ny\n")], 1.0)


def test_pack_puts_a_bos_before_every_document_and_counts_bytes() -> None:
    tokenizer = train_bpe(["über " * 9], 270)
    documents = [Document("a", "", "über"), Document("b", "", "x\n")]
    packed = pack(documents, tokenizer)
    assert packed.tokens.dtype == np.uint16
    assert packed.bytes == 5 + 2
    assert packed.tokens.tolist() == tokenizer.encode("über") + tokenizer.encode("x\n")
    assert packed.tokens.tolist().count(tokenizer.bos_id) == 2
    assert tokenizer.decode(pack(documents, tokenizer, bos=False).tokens.tolist()) == "überx\n"
    with pytest.raises(UserError, match="no documents"):
        pack([], tokenizer)


@given(st.integers(0, 2**64), st.integers(0, 2**40), st.integers(1, 9), st.integers(1, 99))
def test_a_batch_is_made_of_the_text_one_token_apart(
    seed: int, step: int, rows: int, length: int
) -> None:
    x, y = batch(TOKENS, seed, step, rows, length)
    assert x.shape == y.shape == (rows, length)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)  # the tokens are 0, 1, 2...
    assert torch.equal(x - x[:, :1], torch.arange(length).expand(rows, length))


def test_a_batch_is_the_same_in_another_process() -> None:
    script = (
        "import numpy, sys; from moge_hal.training.data import batch\n"
        "x, y = batch(numpy.arange(10_000, dtype=numpy.uint16), 7, 123_456, 4, 3)\n"
        "print(x.tolist(), y.tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    x, y = batch(TOKENS, 7, 123_456, 4, 3)
    assert run.stdout.strip() == f"{x.tolist()} {y.tolist()}"
    # And in another year: the places by Philox4x64-10 computed from its paper, written down.
    assert x[:, 0].tolist() == [3456, 1052, 2384, 7015]


def test_batches_differ_by_seed_and_by_step_and_reach_both_ends() -> None:
    first = batch(TOKENS, 0, 0, 8, 16)[0]
    assert not torch.equal(first, batch(TOKENS, 0, 1, 8, 16)[0])
    assert not torch.equal(first, batch(TOKENS, 1, 0, 8, 16)[0])
    short = TOKENS[:5]  # rows of 3 + 1 tokens start at 0 or 1
    starts = {int(start) for step in range(20) for start in batch(short, 0, step, 2, 3)[0][:, 0]}
    assert starts == {0, 1}
    assert batch(short, 0, 0, 1, 4)[1].tolist() == [[1, 2, 3, 4]]
    with pytest.raises(UserError, match="too short: 5 tokens, and a row takes 6"):
        batch(short, 0, 0, 1, 5)
    with pytest.raises(UserError, match="bad batch"):
        batch(short, -1, 0, 1, 1)
