"""The CPU backend: see `backend.py`."""

from moge_hal.backends.cpu.backend import CpuBackend

__all__ = ["CpuBackend"]
