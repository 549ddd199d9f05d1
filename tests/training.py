"""A small training run that tests share: what it is, and how it is started."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moge_hal.backends.cpu import CpuBackend
from moge_hal.bind import bind
from moge_hal.config import Config, preset
from moge_hal.loading import SHIPPED
from moge_hal.model import Transformer
from moge_hal.training.data import read_corpus
from moge_hal.training.init import initial_weights
from moge_hal.training.train import Recipe, Validation, train

CONFIG = preset("tiny", vocab_size=300, num_hidden_layers=1)
RECIPE = Recipe(steps=20, rows=2, length=32, warmup=3, peak=1e-2)
FILES = {"state.safetensors", "log.jsonl", "curve.png", "training.json", "model"}


def write_novel(folder: Path) -> Path:
    """The first pages of a novel, as a corpus."""
    path = folder / "novel.txt"
    path.write_text(read_corpus(SHIPPED / "corpus.jsonl.xz")[0].text[:24_000], "utf-8")
    return path


def go(
    out: Path, corpus: Path, recipe: Recipe = RECIPE, config: Config = CONFIG, **options: Any
) -> Validation:
    """Trains, with a validation and a state every 5 steps."""
    torch.set_num_threads(1)  # what `moge-hal train` sets; it belongs to the identity of a run
    backend = options.pop("backend", CpuBackend())
    return train(out, config, recipe, backend, corpus, **{"validate_every": 5, **options})


def contents(out: Path) -> dict[str, bytes]:
    """The files of a folder, by name."""
    return {f"{p.relative_to(out)}": p.read_bytes() for p in out.rglob("*") if p.is_file()}


def transformer(config: Config = CONFIG, weights: dict[str, Tensor] | None = None) -> Transformer:
    """A model to train."""
    found = bind(config, weights or initial_weights(config, 1), CpuBackend(), "train").run_step
    assert isinstance(found, Transformer)
    return found
