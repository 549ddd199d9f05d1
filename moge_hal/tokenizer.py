"""The one way this project sees text: a tokenizer.json or a SentencePiece tokenizer.model behind
one class.

Every token stands for fixed bytes, so decoding is a table: a whole text and a stream of tokens read
the same table and cannot differ. A special token (bos, eos, the marks of a chat) comes from its id
only, never out of text that happens to spell its name, and decodes to nothing.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from moge_hal.errors import UserError

# What a released Pangu chat is framed with: [unused9] opens a turn, [unused10] ends it (and is
# eos), 16 and 17 enclose thinking.
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "[unused9]", "[unused10]", "[unused16]", "[unused17]"]
UNUSED = re.compile(r"\[unused\d+\]")
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "▁"  # U+2581 stands for a space in SentencePiece's pieces


class Engine(Protocol):
    """What differs between the two libraries."""

    file_name: str
    ids: dict[str, int]  # of every token, special ones included, by its name
    pieces: list[bytes]  # of every id; a special token's are empty

    def encode(self, text: str) -> list[int]: ...
    def serialize(self) -> bytes: ...


class JsonEngine:
    """tokenizer.json, the format of the library `tokenizers`."""

    file_name = "tokenizer.json"

    def __init__(self, data: bytes, special: Container[str]) -> None:
        fields = json.loads(data)
        if not isinstance(fields, dict):
            raise ValueError("it holds no JSON object")
        for token in fields["added_tokens"]:
            token["special"] |= _is_special(token["content"], special)
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(fields))
        self._tokenizer.encode_special_tokens = True  # their names in a text are text
        decoder = fields["decoder"] or {"type": "none"}
        kinds = {part["type"] for part in decoder.get("decoders", [decoder])}
        if not kinds & {"ByteLevel", "Metaspace", "ByteFallback"}:
            raise ValueError(f"its decoder ({', '.join(sorted(kinds))}) is of an unknown kind")
        bytes_of = byte_level_bytes if "ByteLevel" in kinds else sentencepiece_bytes
        self.ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.pieces = [b""] * (max(self.ids.values()) + 1)
        for token, at in self.ids.items():
            self.pieces[at] = bytes_of(token)
        for at, added in self._tokenizer.get_added_tokens_decoder().items():
            self.pieces[at] = b"" if added.special else added.content.encode()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def serialize(self) -> bytes:
        return str(self._tokenizer.to_str(pretty=True)).encode() + b"\n"


class SentencePieceEngine:
    """tokenizer.model, the format of the library `sentencepiece`."""

    file_name = "tokenizer.model"

    def __init__(self, data: bytes, special: Container[str]) -> None:
        if not data:
            raise ValueError("it is empty")  # which the library takes for a wish to load nothing
        self._data = data
        self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        self._unknown = self._model.unk_id()
        tokens = [self._model.id_to_piece(at) for at in range(self._model.get_piece_size())]
        self.ids = {token: at for at, token in enumerate(tokens)}
        self.pieces = [sentencepiece_bytes(token) for token in tokens]
        self.pieces[self._unknown] = self._model.decode([self._unknown]).encode()
        self._special = {}
        for at, token in enumerate(tokens):
            # Any text may come to the unknown token, so it stays one of the others.
            if at != self._unknown and (self._model.is_control(at) or _is_special(token, special)):
                self._special[at] = token
                self.pieces[at] = b""

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for at in self._model.encode(text):
            # The library parses some kinds of special pieces out of the text: spell those.
            ids += self._spell(self._special[at]) if at in self._special else [at]
        return ids

    def _spell(self, name: str) -> list[int]:
        ids: list[int] = []
        for character in name:
            parts = [character]
            if character not in self.ids:
                parts = [f"<0x{byte:02X}>" for byte in character.encode()]
            known = all(part in self.ids for part in parts)
            ids += [self.ids[part] for part in parts] if known else [self._unknown]
        return ids

    def serialize(self) -> bytes:
        return self._data


def _byte_alphabet() -> dict[str, int]:
    """The printable characters of a byte-level vocabulary (GPT-2's `bytes_to_unicode`) to bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    above = {chr(256 + n): byte for n, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | above


BYTE_LEVEL = _byte_alphabet()


def byte_level_bytes(piece: str) -> bytes:
    """The bytes that a byte-level piece stands for, a character each."""
    return bytes(BYTE_LEVEL[character] for character in piece if character in BYTE_LEVEL)


def sentencepiece_bytes(piece: str) -> bytes:
    """The bytes that a SentencePiece piece stands for; <0x0A> is one byte, U+2581 a space."""
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()


class Stream:
    """Text out of tokens. To go on after a prompt, push its ids first and drop what they give."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = tokenizer.leading_space

    def push(self, token_id: int) -> str:
        """The text that this token completes: empty inside a character of several tokens."""
        return self._give(self._decoder.decode(self._tokenizer.bytes_of(token_id)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character never came to its end."""
        return self._give(self._decoder.decode(b"", final=True))

    def _give(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


class Tokenizer:
    """Text to token ids and back.

    bos_id, eos_id: the ids that begin a text and end an answer, or None.
    vocab_size: V; every id is below it.
    """

    def __init__(
        self, engine: Engine, config: dict[str, Any], bos_id: int | None, eos_id: int | None
    ) -> None:
        self.engine = engine
        self.vocab_size = len(engine.pieces)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self._config = config
        self._names = {at: name for name, at in engine.ids.items()}
        # Encoding may put a space before the text; then decoding drops one.
        first = [self._names[at] for at in engine.encode("a")[:1]]
        self.leading_space = first != [] and first[0].startswith((SPACE, "Ġ"))

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Opens the tokenizer.json of a model's folder, or else its tokenizer.model.

        bos and eos are the ids that generation_config.json or config.json state, else the tokens
        that tokenizer_config.json names (the order matters: a released Pangu names </s> there and
        ends its answers with 45892, [unused10]).
        Raises UserError if neither file is there, or one that is needed cannot be read.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        named = [config.get(f"{kind}_token") for kind in ("bos", "eos", "pad", "unk")]
        added = (config.get("added_tokens_decoder") or {}).values()
        named += [token for token in added if isinstance(token, dict) and token.get("special")]
        named += config.get("additional_special_tokens") or []
        special = {content for token in named if (content := _content(token)) is not None}
        library: type[JsonEngine | SentencePieceEngine] = JsonEngine
        if not (folder / library.file_name).is_file():
            library = SentencePieceEngine
        path = folder / library.file_name
        try:
            tokenizer = cls(library(path.read_bytes(), special), config, None, None)
        except FileNotFoundError as error:
            raise UserError(
                f"{folder} holds no tokenizer.json or tokenizer.model; copy one beside the weights"
            ) from error
        except Exception as error:  # both libraries raise bare Exception or RuntimeError
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"{path} cannot be read as a tokenizer ({reason}); fetch it again"
            ) from error
        files = [folder / "generation_config.json", folder / "config.json"]
        stated = {path: _read_json(path) for path in files}
        tokenizer.bos_id = _special_id("bos", stated, config, tokenizer)
        tokenizer.eos_id = _special_id("eos", stated, config, tokenizer)
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer and a tokenizer_config.json, which transformers opens too."""
        config = dict(self._config)
        for kind, token_id in (("bos", self.bos_id), ("eos", self.eos_id)):
            config[f"{kind}_token"] = None if token_id is None else self._names.get(token_id)
        fields = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in (
            (self.engine.file_name, self.engine.serialize()),
            ("tokenizer_config.json", fields.encode()),
        ):
            beside = folder / f".{name}.{os.getpid()}"
            beside.write_bytes(data)
            beside.replace(folder / name)

    @property
    def digest(self) -> str:
        """SHA-256 of the tokenizer's file, in hex: other ids would mean another model."""
        return hashlib.sha256(self.engine.serialize()).hexdigest()

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of `text`, after bos if asked for (and there is one); special names stay text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text has half a character (a lone surrogate) at {error.start}; is it UTF-8?"
            ) from error
        start = [self.bos_id] if bos and self.bos_id is not None else []
        return start + self.engine.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`: special tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def stream(self) -> Stream:
        """A decoder that takes one token at a time; its texts joined are `decode` of all."""
        return Stream(self)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token stands for. Raises UserError for an id outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise UserError(f"token {token_id} is not in the vocabulary of {self.vocab_size}")
        return self.engine.pieces[token_id]

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact name, special ones included: token_id("[unused10]")."""
        return self.engine.ids.get(token)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(found).__name__}")
    return found


def _is_special(token: str, special: Container[str]) -> bool:
    """Whether tokenizer_config.json names it, or it is one of Pangu's marks, which it may not."""
    return token in special or UNUSED.fullmatch(token) is not None


def _content(token: Any) -> str | None:
    """The name of a token as tokenizer_config.json gives it: a string or an object with one."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _special_id(
    kind: str, stated: dict[Path, dict[str, Any]], config: dict[str, Any], tokenizer: Tokenizer
) -> int | None:
    """The id of "bos" or "eos"; of several eos ids the first."""
    for path, fields in stated.items():
        value = fields.get(f"{kind}_token_id")
        token_id = next(iter(value), None) if isinstance(value, list) else value
        if token_id is None:
            continue
        if type(token_id) is not int or not 0 <= token_id < tokenizer.vocab_size:
            raise UserError(
                f"{path}: {kind}_token_id = {value!r} must be an id below "
                f"{tokenizer.vocab_size}, the size of the tokenizer's vocabulary"
            )
        return token_id
    name = _content(config.get(f"{kind}_token")) or {"bos": "<s>", "eos": "</s>"}[kind]
    return tokenizer.token_id(name)
