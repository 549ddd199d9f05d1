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
    from moge_hal.backend import Backend as Backend
    from moge_hal.backend import Facts as Facts
    from moge_hal.backend import Probe as Probe
    from moge_hal.backend import Step as Step
    from moge_hal.backend import StepOut as StepOut
    from moge_hal.checkpoint import save as save
    from moge_hal.config import Config as Config
    from moge_hal.config import preset as preset
    from moge_hal.errors import CacheFullError as CacheFullError
    from moge_hal.errors import UserError as UserError
    from moge_hal.loading import load as load
    from moge_hal.registry import get_backend as get_backend
    from moge_hal.router import RouteSpec as RouteSpec
    from moge_hal.runtime import Model as Model

__version__ = "0.1.0"

# In a clone, `backends/` and `export/` lie beside this package, and are part of it under these
# names.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").exists() and (_root / "backends" / "__init__.py").exists():
    __path__.append(str(_root))

# Imported on first use: `moge-hal --help` need not wait for torch, nor the core for onnx or pytest.
_MODULES = {
    "backend": ["Backend", "Facts", "Probe", "Step", "StepOut"],
    "checkpoint": ["save"],
    "config": ["Config", "preset"],
    "errors": ["CacheFullError", "UserError"],
    "loading": ["load"],
    "registry": ["get_backend"],
    "router": ["RouteSpec"],
    "runtime": ["Model"],
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in ("backends", "conformance", "export"):
        return importlib.import_module(f"moge_hal.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"moge_hal.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'moge_hal' has no attribute {name!r}")
