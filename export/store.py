"""Exports of plain checkpoints, kept in the cache folder: made once, found again by what the
checkpoint is.

A float32 checkpoint is not copied: the entry is the graph alone, whose weights stay where they are.
Another one is converted, and the entry is a whole model folder.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch

import moge_hal
from moge_hal.checkpoint import Checkpoint
from moge_hal.config import Config
from moge_hal.errors import UserError
from moge_hal.export import GRAPH
from moge_hal.export.dialect import decoder_graph, weights_in
from moge_hal.export.folder import unbound, write_model
from moge_hal.export.library import Lowering
from moge_hal.files import new_folder
from moge_hal.model import Transformer
from moge_hal.registry import settings
from moge_hal.shards import Place

SEAL = "sealed.json"  # sizes of the entry's files and the graph's digest, as they must still be


def cached_export(folder: Path, config: Config) -> tuple[Path, Path]:
    """The graph's file and the folder of its weights; exported first if there is no sound entry.

    One line on stderr says so. Raises `UserError` if the checkpoint is unsound or the cache cannot
    be written.
    """
    checkpoint = Checkpoint(folder, config)
    places = [checkpoint.locate(n) for r in checkpoint.layout.values() for n in r.names]
    shared = _weights_folder(places)
    entry = settings().cache / "onnx" / _key(config, places)
    if not _sound(entry):
        print(f"moge_hal: exporting {folder} for ONNX Runtime into {entry}, once", file=sys.stderr)
        _make(entry, checkpoint, config, shared)
    return entry / GRAPH, shared or entry


def _weights_folder(places: list[Place]) -> Path | None:
    """The one folder in which all weights really lie (a hub's snapshot holds links), None if they
    must be converted.
    """
    folders = {place.file.resolve().parent for place in places}
    floats = all(place.dtype == torch.float32 for place in places)
    return folders.pop() if floats and len(folders) == 1 else None


def _key(config: Config, places: list[Place]) -> str:
    """Changes with the weights' files, where they lie, the configuration and the exporter."""
    digest = hashlib.sha256(f"{moge_hal.__version__} {config}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for file in sorted({place.file.resolve() for place in places}):
        stat = file.stat()
        digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def _make(entry: Path, checkpoint: Checkpoint, config: Config, shared: Path | None) -> None:
    if entry.exists():
        shutil.rmtree(entry)
    try:
        with new_folder(entry) as folder:
            if shared is None:
                write_model(unbound(config, checkpoint), folder)
            else:
                transformer = Transformer(config, Lowering(), torch.float32)
                graph = decoder_graph(transformer, weights_in(checkpoint))
                (folder / GRAPH).write_bytes(graph.SerializeToString())
            seal = json.dumps(_seal(folder))
            (folder / SEAL).write_text(seal, encoding="utf-8")
    except UserError as error:
        if not _sound(entry):  # unless another process was faster
            raise UserError(f"{error}; MOGE_HAL_CACHE names another place for exports") from error


def _seal(entry: Path) -> dict[str, str | int]:
    files = sorted(file for file in entry.iterdir() if file.name != SEAL)
    sizes: dict[str, str | int] = {file.name: file.stat().st_size for file in files}
    return sizes | {"sha256": hashlib.sha256((entry / GRAPH).read_bytes()).hexdigest()}


def _sound(entry: Path) -> bool:
    try:
        return bool(json.loads((entry / SEAL).read_text("utf-8")) == _seal(entry))
    except (OSError, ValueError):
        return False  # not there, or damaged: it will be made again
