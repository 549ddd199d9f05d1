"""From a folder to a model that runs."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.bind import Choice, bind, check_dtype
from moge_hal.checkpoint import Checkpoint, parse_dtype
from moge_hal.config import Config
from moge_hal.errors import UserError, refuse
from moge_hal.files import progress
from moge_hal.registry import get_backend, settings
from moge_hal.runtime import Model
from moge_hal.shards import has_weights
from moge_hal.tokenizer import Tokenizer

SHIPPED = Path(__file__).parent / "models" / "novels"


def load(
    path: str | Path | None = None,
    backend: str | Backend | None = None,
    dtype: torch.dtype | str | None = None,
) -> Model:
    """A model that runs.

    path: a folder with config.json and safetensors in the released layout, or one that the backend
        opens as it lies; None = the model that this package ships.
    backend: a name as in `get_backend`, a `Backend`, or None = what MOGE_HAL_BACKEND says.
    dtype: of the parameters, `torch.bfloat16` or "bfloat16"; None = what the backend prefers.
    MOGE_HAL_OPS and MOGE_HAL_STRICT apply. At its peak, loading holds the weights and one more copy
    of one of them. Raises `UserError`.
    """
    environment = settings()
    if path is not None and not isinstance(path, str | os.PathLike):
        refuse("path", path, "must be a model's folder")
    folder = shipped_model() if path is None else _existing_folder(Path(path))
    config = Config.from_json(folder / "config.json")
    chosen = backend if isinstance(backend, Backend) else get_backend(backend)
    kind = check_dtype(chosen, None if dtype is None else parse_dtype(dtype))
    tokenizer = _open_tokenizer(folder, config)
    if chosen.graph and environment.overrides:  # said before `open`, which may export for long
        raise UserError(
            f"MOGE_HAL_OPS: backend {chosen.name!r} runs a graph, where no operation can be "
            f"exchanged; unset MOGE_HAL_OPS"
        )
    step = chosen.open(folder, config)
    if step is not None:
        if environment.overrides:
            raise UserError(
                f"MOGE_HAL_OPS: backend {chosen.name!r} runs {folder} as it lies, where no "
                f"operation can be exchanged; unset MOGE_HAL_OPS"
            )
        choices = [Choice(op, chosen.name, "part of what was opened") for op in ops.NAMES]
        held: Mapping[str, Tensor] = Checkpoint(folder, config) if has_weights(folder) else {}
        return Model(config, chosen, step, kind, choices, held, tokenizer)
    checkpoint = Checkpoint(folder, config)
    overrides, strict = environment.overrides, environment.strict
    with progress("loading", checkpoint.nbytes) as advance:
        weights = checkpoint.converted(kind, advance)
        model = bind(config, weights, chosen, "infer", overrides, strict=strict, dtype=kind)
    model.weights, model.tokenizer = checkpoint, tokenizer
    return model


def shipped_model() -> Path:
    """The folder of the model that this package ships. Raises `UserError` if it is not there."""
    if not SHIPPED.is_dir():
        raise UserError(f"the shipped model is not in {SHIPPED}: install again, or name a model")
    return SHIPPED


def _existing_folder(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path} does not exist: give a folder that holds a model")
    if not path.is_dir():
        raise UserError(f"{path} is a file: give the folder that holds the model")
    return path


def _open_tokenizer(folder: Path, config: Config) -> Tokenizer | None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer's ids go up to {tokenizer.vocab_size - 1}, beyond the "
            f"vocab_size of {config.vocab_size} in config.json: take the tokenizer of this model"
        )
    return tokenizer
