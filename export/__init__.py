"""ONNX out of the one model: `to_onnx(model, folder)`. README.md says what a folder holds and how
each runtime opens it.

Importing this package loads neither onnx nor ONNX Runtime; using it does.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moge_hal.export.check import CheckError
    from moge_hal.export.folder import to_onnx

__all__ = ["CheckError", "to_onnx"]

GRAPH = "model.onnx"  # the graph's file name in an exported folder


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = "check" if name == "CheckError" else "folder"
        return getattr(importlib.import_module(f"moge_hal.export.{module}"), name)
    raise AttributeError(f"module 'moge_hal.export' has no attribute {name!r}")
