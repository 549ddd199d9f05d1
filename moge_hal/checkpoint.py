"""A model's folder: config.json, safetensors under the released names, the tokenizer.

The transformer holds gate and up projections fused and experts stacked; released files hold each
projection of each expert. Both have the same order in memory, so all there is to know is a list:
a canonical tensor is its released tensors, one after the other. The names are those of the released
Pangu Pro MoE (arXiv 2505.21411); shards and their index are named as Hugging Face names them.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, reduce
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moge_hal.config import Config
from moge_hal.errors import UserError, close_matches
from moge_hal.files import new_folder, progress
from moge_hal.model import skeleton
from moge_hal.runtime import Model
from moge_hal.shards import DTYPES, INDEX, WEIGHTS, Place, find_tensors, reading


@dataclass(frozen=True)
class Released:
    """The released tensors that make up one canonical tensor."""

    shape: tuple[int, ...]  # of the canonical tensor
    names: list[str]  # of the released ones, in the order in which they follow each other in it
    part: tuple[int, ...]  # shape of each of them


def released_layout(config: Config) -> dict[str, Released]:
    """By canonical name (a parameter's in `model.Transformer`): what a released folder holds."""
    layout = {}
    for name, parameter in skeleton(config).named_parameters():
        shape = part = tuple(parameter.shape)
        names = _released_names(name, shape)
        if len(shape) > 1:
            part = (math.prod(shape[:-1]) // len(names), shape[-1])
        elif name.endswith("router_scale"):
            part = (1, *shape)
        layout[name] = Released(shape, names, part)
    return layout


def _released_names(name: str, shape: tuple[int, ...]) -> list[str]:
    full = name if name.startswith("lm_head.") else f"model.{name}"
    module, _, leaf = full.rpartition(".")
    if leaf not in ("gate_up", "down"):
        return [full]
    experts = [f"{module}.{e}" for e in range(shape[0])] if len(shape) == 3 else [module]
    return [f"{e}.{matrix}_proj.weight" for e in experts for matrix in leaf.split("_")]


class Checkpoint(Mapping[str, Tensor]):
    """The weights of a folder by canonical name, in the dtype that they have on the disk.

    A weight is read whenever it is asked for, and assembled with at most two of its released
    tensors in memory beside it. Opening reads headers only, and raises `UserError` if a file is
    missing or damaged, or a tensor missing, unexpected or of another shape than `config` says.
    """

    def __init__(self, folder: str | Path, config: Config) -> None:
        self.layout = released_layout(config)
        source, self._places = find_tensors(Path(folder))
        _compare(source, self.layout, self._places)
        self.nbytes = sum(place.length for place in self._places.values())
        self._dtype: torch.dtype | None = None
        self._on_read: Callable[[int], None] = lambda length: None

    def converted(self, dtype: torch.dtype, on_read: Callable[[int], None]) -> "Checkpoint":
        """The same, converted piece by piece as it is read; `on_read` is told the bytes of each."""
        other = copy.copy(self)
        other._dtype, other._on_read = dtype, on_read
        return other

    def locate(self, released_name: str) -> Place:
        """Where a released tensor lies, for programs that read it in place."""
        return self._places[released_name]

    def __getitem__(self, name: str) -> Tensor:
        released = self.layout[name]
        stored = [self._places[part].dtype for part in released.names]
        # Also one tensor alone is copied: torch aligns its memory, which the library need not, and
        # the last bits of a matrix product can depend on that.
        dtype = self._dtype or reduce(torch.promote_types, stored)
        whole = torch.empty(len(released.names), *released.part, dtype=dtype)
        for row, part in zip(whole, self._read(released.names), strict=True):
            row.view(part.shape).copy_(part)
        return whole.view(released.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def _read(self, names: list[str]) -> Iterator[Tensor]:
        with ExitStack() as stack:
            # Not mapped: what was read of a map counts as memory while it is open.
            opened = cache(lambda file: stack.enter_context(safe_open(file, "pt", backend="pread")))
            for name in names:
                place = self._places[name]
                with reading(place.file):
                    tensor: Tensor = opened(place.file).get_tensor(name)
                self._on_read(place.length)
                yield tensor


def save(
    model: Model,
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a model in the released layout into a new or empty folder, complete or not at all.

    dtype: of the weights on disk, None = the one that the model computes in. A shard holds up to
    `max_shard_bytes` of tensors, or one tensor that is larger; no more than a shard and one
    canonical tensor is in memory. The same weights give the same bytes.
    Raises `UserError` if the folder is not empty or cannot be written; nothing is left behind.
    """
    kind = model.dtype if dtype is None else parse_dtype(dtype)
    layout = released_layout(model.config)
    if layout.keys() - model.weights.keys():
        name = model.backend.name
        raise UserError(f"backend {name!r} opened this model without weights: load it with another")
    config, tokenizer = model.config, model.tokenizer
    with new_folder(path) as folder:
        if tokenizer is not None:
            tokenizer.save(folder)
            # Who opens the folder must begin and end texts with the tokens that this model does.
            bos = config.bos_token_id if tokenizer.bos_id is None else tokenizer.bos_id
            eos = config.eos_token_id if tokenizer.eos_id is None else tokenizer.eos_id
            config = replace(config, bos_token_id=bos, eos_token_id=eos)
        (folder / "config.json").write_text(config.to_json(_name(kind)), encoding="utf-8")
        _write_weights(folder, model.weights, layout, kind, max_shard_bytes)


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """`torch.bfloat16` or "bfloat16"; raises `UserError` for what is no type of weights."""
    known = {_name(kind): kind for kind in DTYPES.values()}
    asked = _name(dtype)
    if asked not in known:
        names = ", ".join(known)
        raise UserError(f"no dtype {asked!r}; there are {names}.{close_matches(asked, known)}")
    return known[asked]


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _write_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    layout: Mapping[str, Released],
    dtype: torch.dtype,
    limit: int,
) -> None:
    sizes = {
        name: math.prod(released.part) * dtype.itemsize
        for released in layout.values()
        for name in released.names
    }
    total = sum(sizes.values())
    shards = _plan(sizes, limit)
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
    with progress("saving", total) as advance:
        tensors = _released_tensors(weights, layout, dtype)
        for file, names in shards.items():
            _write_shard(folder / file, dict(islice(tensors, len(names))))
            advance(sum(sizes[name] for name in names))


def _plan(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """The names in each file: in order, cut where the next tensor would exceed `limit` bytes."""
    shards: list[list[str]] = []
    room = -1
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = max(limit, size)
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": s for i, s in enumerate(shards, 1)}


def _released_tensors(
    weights: Mapping[str, Tensor], layout: Mapping[str, Released], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name, released in layout.items():
        rows = weights[name].detach().reshape(len(released.names), *released.part)
        for part, row in zip(released.names, rows, strict=True):
            # Copied, since safetensors refuses tensors that share memory, and two weights may.
            yield part, row.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        del rows, row  # before the next one is read


def _write_shard(file: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    # safetensors gives the file to its owner alone; it should be as open as the folder around it.
    file.chmod(file.parent.stat().st_mode & 0o666)


def _compare(source: Path, layout: Mapping[str, Released], places: Mapping[str, Place]) -> None:
    """Raises `UserError` for the first tensor that is not what the configuration says."""
    wanted = {name: released for released in layout.values() for name in released.names}
    if missing := [name for name in wanted if name not in places]:
        shape = list(wanted[missing[0]].part)
        raise UserError(
            f"{source} lacks tensor {missing[0]!r} of shape {shape}{_more(missing)}: "
            f"complete the weights, or mend config.json"
        )
    if unexpected := [name for name in places if name not in wanted]:
        place = places[unexpected[0]]
        raise UserError(
            f"{place.file} holds an unexpected tensor {unexpected[0]!r} of shape "
            f"{list(place.shape)}{_more(unexpected)}: nothing in this model uses it "
            f"(quantised models are not supported)"
        )
    for name, released in wanted.items():
        place = places[name]
        if place.stored not in DTYPES:
            raise UserError(
                f"{place.file}: tensor {name!r} is stored as {place.stored}, must be one of "
                f"{', '.join(DTYPES)} (quantised models are not supported)"
            )
        # A router_scale is [1, E] in the release and [E] in some conversions.
        flat = name.endswith("router_scale") and place.shape == released.shape
        if place.shape != released.part and not flat:
            raise UserError(
                f"{place.file}: tensor {name!r} has shape {list(place.shape)}, must be "
                f"{list(released.part)}: take the weights that belong to config.json"
            )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
