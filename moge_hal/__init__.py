"""moge_hal: one Mixture-of-Grouped-Experts model, many chips, and a suite that proves what each of
them computes.

The public names: `load`, `save`, `get_backend`, `backends()`, `Model`, `Config`, `preset`,
`Backend`, `RouteSpec`, and the subpackages `moge_hal.export` (`to_onnx`) and `moge_hal.conformance`
(`run`).
"""

import importlib
from pathlib import Path
from typing import Any

from moge_hal.backend import Backend, Facts, Probe, Step, StepOut
from moge_hal.checkpoint import save
from moge_hal.config import Config, preset
from moge_hal.errors import CacheFullError, UserError
from moge_hal.load import load
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


def __getattr__(name: str) -> Any:
    """Subpackages on first use: the core starts without what it may not need (onnx, pytest)."""
    if name in ("backends", "conformance", "export"):
        return importlib.import_module(f"moge_hal.{name}")
    raise AttributeError(f"module 'moge_hal' has no attribute {name!r}")
