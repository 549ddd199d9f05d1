"""The backends that come with moge_hal: cpu, cuda, ascend, onnx, and null, the example.

`moge_hal.backends()` lists every backend that is installed. The package of the same name is this
one, so it is callable.
"""

import sys
from types import ModuleType

from moge_hal import registry


class _Package(ModuleType):
    def __call__(self) -> list[registry.BackendInfo]:
        return registry.backends()


sys.modules[__name__].__class__ = _Package
