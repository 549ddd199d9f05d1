"""Where the tensors of a folder of safetensors lie: one file, or shards with an index.

The format (https://github.com/huggingface/safetensors#format): the header's length in 8 bytes, the
header in JSON, the values; offsets count from the end of the header. The library reads and judges
files; only the offsets, which it does not tell, are read here.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from moge_hal.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Place:
    """One tensor's values: `length` bytes of `file` from `offset`, row-major, little-endian."""

    file: Path
    offset: int
    length: int
    stored: str  # the format's name of the dtype: "BF16"
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the kinds that weights may have; KeyError for another."""
        return DTYPES[self.stored]


def has_weights(folder: Path) -> bool:
    """Whether a folder holds safetensors, in one file or in shards."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def find_tensors(folder: Path) -> tuple[Path, dict[str, Place]]:
    """The file that lists the tensors of a folder, and where each of them lies.

    Reads headers only. Raises `UserError` if a file is missing, damaged or cut short, or if the
    index and the shards disagree.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file():
        return single, _read_header(single)
    if not index.is_file():
        raise UserError(f"{folder} holds neither {WEIGHTS} nor {INDEX}: only safetensors are read")
    weight_map = _read_index(index)
    headers = {file: _read_header(folder / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise UserError(
                f"{index} names tensor {name!r} in {file}, which lacks it: restore both"
            )
    return index, {name: headers[file][name] for name, file in weight_map.items()}


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Says which file it was that could not be read, as a `UserError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: restore it") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}): mend that") from error
    except (ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{file} is damaged or cut short ({error}): restore it") from error


def _read_index(path: Path) -> dict[str, str]:
    with reading(path):
        data = json.loads(path.read_text(encoding="utf-8"))
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict):
        raise UserError(f"{path} must hold an object with a weight_map: restore it")
    for name, file in weight_map.items():
        # A bare name: an index is no way to reach files outside its folder.
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise UserError(f"{path}: {name!r} must lie in a file of the same folder, not {file!r}")
    return weight_map


def _read_header(file: Path) -> dict[str, Place]:
    with reading(file):
        with safe_open(file, "pt", backend="pread"):
            pass  # opened for the library's judgement: a sound header, a file of its full length
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        places[name] = Place(file, 8 + length + start, end - start, entry["dtype"], shape)
    return places
