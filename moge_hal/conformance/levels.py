"""What a result ran on, so that no report says more than was seen.

real       the chip that the backend is for
simulated  another device that computes the same operations in the chip's place
emulated   the chip's own software, on a driver that emulates the chip

A backend's probe says which; the tensors have a veto. A result is real only if a tensor made on
`device()` lies there, is torch's own (a device made of Python shows as a subclass of it) and holds
what was written to it. The CPU is always there: a backend whose tensors lie on the host is taken at
its word, since from there the host may well drive a chip.
"""

import copy

import torch
from torch import Tensor

from moge_hal.backend import Backend, Probe
from moge_hal.errors import UserError
from moge_hal.registry import LEVELS


def level_of(backend: Backend, probe: Probe | None = None) -> str:
    """real, simulated or emulated. Makes one number on the device. probe: if it was asked already.

    Raises `UserError` for a word that is none of them.
    """
    level = (probe or backend.probe()).level
    if level not in LEVELS:
        who, known = type(backend), ", ".join(LEVELS)
        raise UserError(
            f"the probe of backend {backend.name!r} ({who.__module__}:{who.__qualname__}) says "
            f"level {level!r}; it must be one of {known}"
        )
    return "simulated" if level == "real" and not _holds_numbers(backend) else level


def _holds_numbers(backend: Backend) -> bool:
    """Whether the device is one that torch really computes on."""
    try:
        device = backend.device()
        made = torch.ones(3, device=device)
        there = made.device.type == device.type and type(made) is Tensor
        return there and made.sum().item() == 3.0
    except (RuntimeError, AssertionError, ImportError):  # what torch raises for a chip it lacks
        return False


def simulated(backend: Backend) -> Backend:
    """A copy that runs the backend's own operations on the CPU, whether its chip is here or not.

    Judged so, its arithmetic is seen and its kernels are not: the same torch code meets the CPU's.
    """
    kind = type(backend)

    def probe(self: Backend) -> Probe:
        return Probe(True, device=f"CPU in place of {self.name}'s chip", level="simulated")

    def device(self: Backend) -> torch.device:
        return torch.device("cpu")

    def synchronize(self: Backend) -> None:
        """The CPU is done when a call returns."""

    members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    replaced = {"probe": probe, "device": device, "synchronize": synchronize}
    stand_in = copy.copy(backend)
    stand_in.__class__ = type(kind.__name__, (kind,), {**members, **replaced})
    return stand_in
