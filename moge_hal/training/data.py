"""Text for training: corpora, the held-out part, tokens, and batches made from (seed, step) alone.

In the order of use:

    train, held_out = split(read_corpus(path))
    tokenizer = train_bpe((document.text for document in train), 2048)  # never on held-out text
    tokens = pack(train, tokenizer).tokens
    x, y = batch(tokens, seed=0, step=17, rows=8, length=256)
"""

import json
import lzma
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moge_hal.errors import UserError
from moge_hal.tokenizer import Tokenizer


@dataclass(frozen=True)
class Document:
    """One text of a corpus; a line is a paragraph."""

    title: str
    author: str
    text: str


class Packed(NamedTuple):
    """Documents as one row of tokens.

    tokens: [T] uint16, or uint32 for a vocabulary above 65,536.
    bytes: how many UTF-8 bytes of text they stand for: what a loss per token needs to become bits
    per byte.
    """

    tokens: npt.NDArray[Any]
    bytes: int


def read_corpus(path: str | Path) -> list[Document]:
    """The documents of a .txt, .jsonl or .jsonl.xz file, or of a folder's .txt files by name.

    A line of JSON is an object with "text", and "title" and "author" if known; a .txt file is one
    document, titled by its name.
    Raises UserError if there is nothing at `path`, or a file is empty, not UTF-8 or not what its
    name says.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise UserError(f"the folder {path} holds no .txt file; give text files, or one file")
        return [_read_txt(file) for file in files]
    if not path.is_file():
        raise UserError(f"there is no corpus at {path}; give a .txt or .jsonl file or a folder")
    if path.name.endswith((".jsonl", ".jsonl.xz")):
        return _read_jsonl(path)
    if path.suffix == ".txt":
        return [_read_txt(path)]
    raise UserError(f"{path} is no .txt, .jsonl or .jsonl.xz file; rename or convert it")


def _decode(data: bytes, path: Path) -> str:
    try:
        # A byte order mark and the line ends of Windows are no text.
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 at byte {error.start}; convert it to UTF-8"
        ) from error


def _read_txt(path: Path) -> Document:
    text = _decode(path.read_bytes(), path)
    if not text.strip():
        raise UserError(f"{path} holds no text; remove it or fill it")
    return Document(path.stem, "", text)


def _read_jsonl(path: Path) -> list[Document]:
    data = path.read_bytes()
    if path.suffix == ".xz":
        try:
            data = lzma.decompress(data)
        except lzma.LZMAError as error:
            raise UserError(f"{path} is no whole xz file ({error}); fetch it again") from error
    documents = []
    # Not splitlines(): JSON allows a raw U+2028, which that would take for the end of a line.
    for number, line in enumerate(_decode(data, path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error}); write one object a line"
            ) from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'{path}, line {number}: needs an object with a non-empty "text"')
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, UTF-8 cannot
            raise UserError(f"{path}, line {number}: half a character at {error.start}") from error
        title, author = str(record.get("title", f"line {number}")), str(record.get("author", ""))
        documents.append(Document(title, author, text))
    if not documents:
        raise UserError(f"{path} holds no documents; write one JSON object a line")
    return documents


def split(
    documents: Iterable[Document], fraction: float = 0.05
) -> tuple[list[Document], list[Document]]:
    """Cuts every document into a head to train on and a tail that is held out: (train, held_out).

    The tail is the last `fraction` of a document's paragraphs (its lines that are not blank),
    rounded, at least one; a document of a single paragraph is trained on whole. Nothing is random
    and nothing is lost: head + tail is the document. A contiguous tail is a harder and more honest
    test than paragraphs drawn at random, whose neighbours were trained on. No part of training may
    see the tails, the training of the tokenizer included.
    Raises UserError if `fraction` is not between 0 and 1 or no document has two paragraphs.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the held-out fraction must lie between 0 and 1, not {fraction}")
    train, held_out = [], []
    for document in documents:
        lines = document.text.splitlines(keepends=True)
        paragraphs = [number for number, line in enumerate(lines) if line.strip()]
        if len(paragraphs) < 2:
            train.append(document)
            continue
        kept_back = min(max(1, round(len(paragraphs) * fraction)), len(paragraphs) - 1)
        cut = paragraphs[-kept_back]
        train.append(replace(document, text="".join(lines[:cut])))
        held_out.append(replace(document, text="".join(lines[cut:])))
    if not held_out:
        raise UserError(
            "the corpus is too short to hold any text out: no document has two paragraphs (lines)"
        )
    return train, held_out


def pack(documents: Iterable[Document], tokenizer: Tokenizer, bos: bool = True) -> Packed:
    """All documents one after the other, each after bos if asked for (and there is one)."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    rows, size = [], 0
    for document in documents:
        rows.append(np.array(tokenizer.encode(document.text, bos=bos), dtype=dtype))
        size += len(document.text.encode())
    if not rows:
        raise UserError("there are no documents to pack")
    return Packed(np.concatenate(rows), size)


def batch(
    tokens: npt.NDArray[Any], seed: int, step: int, rows: int, length: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one training step: x, y int64 [rows, length], y one token ahead of x.

    A pure function of its arguments: a run's place in the data IS its step, so a resumed run sees
    what an uninterrupted one would, and n ranks that each take their slice of the rows see what one
    would. The rows start at random places, drawn with replacement from the raw bits of Philox
    (Salmon et al. 2011), keyed by `seed` and counted by `step`; numpy promises those bits for ever,
    but not the methods of its Generator.
    Raises UserError if there are not length + 1 tokens or a number is negative.
    """
    if min(seed, step, rows - 1, length - 1) < 0:
        raise UserError(f"bad batch: seed {seed}, step {step}, {rows} rows of {length} tokens")
    places = len(tokens) - length
    if places < 1:
        raise UserError(
            f"the text is too short: {len(tokens)} tokens, and a row takes {length + 1}; "
            "give more text or a smaller length"
        )
    bits = np.random.Philox(key=seed, counter=[0, 0, 0, step]).random_raw(rows)
    picked = np.stack([tokens[at : at + length + 1] for at in (bits % places).tolist()])
    row = torch.from_numpy(picked.astype(np.int64))
    return row[:, :-1].contiguous(), row[:, 1:].contiguous()
