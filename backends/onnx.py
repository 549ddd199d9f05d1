"""The ONNX backend: its operations are lowerings; the exported graph runs in ONNX Runtime.

A folder that holds `model.onnx` is opened as it lies, any other checkpoint is exported once into
the cache (MOGE_HAL_CACHE). The builders behind the lowerings are in `export/`.
"""

import importlib.util
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moge_hal.backend import Probe, Step
from moge_hal.config import Config
from moge_hal.export import GRAPH
from moge_hal.export.cache import AppendCache
from moge_hal.export.library import Lowering
from moge_hal.model import Transformer
from moge_hal.shards import has_weights

# What needs onnx and ONNX Runtime is imported where it is used, so that `probe` can say that they
# are missing.


class OnnxBackend(Lowering):
    """Inference in float32 on ONNX Runtime's CPU provider, with as many threads as torch has."""

    name = "onnx"

    def probe(self) -> Probe:
        for package in ("onnx", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                return Probe(False, f"{package} is not installed.", f"pip install {package}")
        try:
            number = version("onnxruntime")
        except PackageNotFoundError:
            number = "of another name"  # onnxruntime-gpu and its like
        if self.index:
            return Probe(False, f"there is no onnx:{self.index}, only one.", "name onnx alone.")
        return Probe(True, device=f"ONNX Runtime {number}, CPUExecutionProvider")

    def new_cache(
        self, config: Config, batch: int, capacity: int, dtype: torch.dtype
    ) -> AppendCache:
        return AppendCache.empty(config, batch, capacity)

    def compile(self, step: Any, example: tuple[Any, ...], dynamic: Mapping[str, int]) -> Any:
        """A session for any module; a whole model's speaks the dialect of an exported folder."""
        from moge_hal.export.compiled import CompiledModule
        from moge_hal.export.folder import unbound, write_model
        from moge_hal.export.session import OnnxStep

        if not isinstance(step, Transformer):
            return CompiledModule(step, example, dynamic)
        folder = TemporaryDirectory(prefix="moge_hal.", ignore_cleanup_errors=True)
        weights = dict(step.named_parameters())
        write_model(unbound(step.config, weights), Path(folder.name), step)
        compiled = OnnxStep(Path(folder.name) / GRAPH, step.config)
        compiled.keep = folder  # the session maps the files in it
        return compiled

    def open(self, folder: Any, config: Config) -> Step | None:
        from moge_hal.export.session import OnnxStep
        from moge_hal.export.store import cached_export

        file = Path(folder) / GRAPH
        if file.is_file():
            return OnnxStep(file, config)
        if not has_weights(Path(folder)):
            return None  # who asks for the weights next says what is missing
        file, weights = cached_export(Path(folder), config)
        return OnnxStep(file, config, weights)
