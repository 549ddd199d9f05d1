"""moge_hal: one Mixture-of-Grouped-Experts model, many chips, and a suite that proves what each of
them computes.

The public names: `load`, `save`, `get_backend`, `backends()`, `Model`, `Config`, `preset`,
`Backend`, `RouteSpec`, and the subpackages `moge_hal.export` (`to_onnx`) and `moge_hal.conformance`
(`run`).
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moge_hal.backend import Backend, Facts, Probe, Step, StepOut
    from moge_hal.checkpoint import save
    from moge_hal.config import Config, preset
    from moge_hal.errors import CacheFullError, UserError
    from moge_hal.loading import load
    from moge_hal.registry import get_backend
    from moge_hal.router import RouteSpec
    from moge_hal.runtime import Model

__version__ = "0.1.0"

# In a clone, `backends/` and `export/` lie beside this package, and are part of it under these
# names.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").exists() and (_root / "backends" / "__init__.py").exists():
    __path__.append(str(_root))

__all__ = [
    "Backend",
    "CacheFullError",
    "Config",
    "Facts",
    "Model",
    "Probe",
    "RouteSpec",
    "Step",
    "StepOut",
    "UserError",
    "get_backend",
    "load",
    "preset",
    "save",
]

# Imported on first use: `moge-hal --help` need not wait for torch, nor the core for onnx or pytest.
_HOMES = {
    "Backend": "backend",
    "CacheFullError": "errors",
    "Config": "config",
    "Facts": "backend",
    "Model": "runtime",
    "Probe": "backend",
    "RouteSpec": "router",
    "Step": "backend",
    "StepOut": "backend",
    "UserError": "errors",
    "get_backend": "registry",
    "load": "loading",
    "preset": "config",
    "save": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name in ("backends", "conformance", "export"):
        return importlib.import_module(f"moge_hal.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"moge_hal.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'moge_hal' has no attribute {name!r}")
