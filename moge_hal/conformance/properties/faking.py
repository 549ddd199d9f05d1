"""Tensors of a chip that is not here: shape, dtype and device, no data; and what may not be asked
of them while a step is recorded.

torch's fake tensors raise where a value or a data-dependent size is asked for, on any machine. Two
things are added. First, the rules about copies between host and device (`capture.py`), which a fake
does not mind. Second, a way around torch builds without CUDA: they have no device guard for it, so
that x[..] and whatever else sets the current device raise; while a function of torch runs, its C++
code is told that the tensors are `meta`, whose guard does nothing, and what it makes there is made
on the chip.
"""

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from moge_hal import ops

CHIP = torch.device("cuda", 0)  # the one device besides the CPU whose fakes every torch can make
_META = torch.device("meta")
_CPU = torch.device("cpu")
_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parents[1])
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_MASKS = (torch.bool, torch.uint8)


class Blame(Exception):
    """An operator that cannot be recorded, why, and where it is called."""


class Recording(TorchDispatchMode):
    """Sees every operator of torch. While `on`, what cannot be recorded is raised, and kept in
    `blames`, since a backend may catch what is raised."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on = False
        self.blames: list[Blame] = []
        self.in_torch = False  # a function of torch is running
        self.fills = False  # it is `x[..] = a number`

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            device = args[0].device
            return _META if self.in_torch and device == CHIP else device
        if kwargs.get("device") == _META:
            kwargs["device"] = CHIP
        given = _tensors((args, kwargs))
        if func is torch.ops.aten._local_scalar_dense.default and type(given[0]) is Tensor:
            with unset_fake_temporarily():  # a constant that the backend keeps on the host
                return func(*args)
        if self.on:
            self._blame(func, _refuse(func, args, given, self.fills))
        try:
            out = func(*args, **kwargs)
        except DataDependentOutputException:
            self._blame(func, "the host asks for a value")
            raise
        except DynamicOutputShapeException:
            self._blame(func, "the size of the result hangs on data")
            raise
        if self.on:
            self._blame(func, _copied(given, _tensors(out)))
        return out

    def _blame(self, func: Any, reason: str | None) -> None:
        if reason is not None:
            self.blames.append(Blame(f"{func}: {reason} ({where(traceback.extract_stack())})"))
            raise self.blames[-1]


class _Functions(TorchFunctionMode):
    """Sees every call of torch by the backend, before torch's C++ code does."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # The backend makes a device, or asks for x.device and its like: it gets the true answer.
        if func is torch.device or getattr(func, "__name__", "") == "__get__":
            return func(*args, **kwargs)
        if func is Tensor.cuda:  # asks the driver first
            func, args, kwargs = Tensor.to, (args[0], CHIP), {}
        args = tuple(map(_indexed, args))
        kwargs = {name: _indexed(value) for name, value in kwargs.items()}
        before = self.recording.in_torch, self.recording.fills
        self.recording.in_torch = True
        self.recording.fills = func is Tensor.__setitem__ and isinstance(args[2], int | float)
        try:
            return func(*args, **kwargs)
        finally:
            self.recording.in_torch, self.recording.fills = before


@contextmanager
def fake_chip() -> Iterator[Recording]:
    """Within it, all tensors that are made are fakes, and `CHIP` can be named as their device."""
    recording = Recording()
    with FakeTensorMode(allow_non_fake_inputs=True), recording, _Functions(recording):
        yield recording


def where(stack: Iterable[traceback.FrameSummary]) -> str:
    """The backend's own line in a stack, and the operation that it belongs to."""
    frames = [f for f in stack if not f.filename.startswith((_TORCH, _HERE))]
    if not frames:
        return "outside the backend"
    op = next((f"{f.name}, " for f in frames if f.name in ops.NAMES), "")
    return f"{op}{Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}"


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _indexed(value: Any) -> Any:
    """`cuda` as the device that it means here; torch asks the missing driver otherwise."""
    plain = value == "cuda" if isinstance(value, str) else value == torch.device("cuda")
    return CHIP if isinstance(value, str | torch.device) and plain else value


def _refuse(func: Any, args: tuple[Any, ...], given: list[Tensor], fills: bool) -> str | None:
    """Why an operator cannot be recorded, as far as its arguments show."""
    if any(x.device == _META and not isinstance(x, FakeTensor) for x in given):
        return "a list as an index is copied from the host"
    name = func._schema.name
    on_chip = any(x.device == CHIP for x in given)
    if name in _INDEXING and on_chip and any(x.dtype in _MASKS for x in _tensors(args[1])):
        # `x[mask] = number` is a masked_fill; all others first look for the true elements.
        return None if fills else "the host counts the true elements of a boolean index"
    hosts = [x for x in given if x.device == _CPU]
    if on_chip and any(x.dim() or name == "aten::copy_" for x in hosts):
        return "a tensor of the host takes part, which is a copy between host and device"
    if name == "aten::_grouped_mm" and given[0].dtype != torch.bfloat16:
        return "outside bfloat16 it reads its offsets on the host"  # not seen on fakes
    return None


def _copied(given: list[Tensor], made: list[Tensor]) -> str | None:
    """Whether an operator copies between host and device: of no other does the device change."""
    if not given:
        return None
    came_from_chip = any(x.device == CHIP for x in given)
    if came_from_chip and any(x.device == _CPU for x in made):
        return "copies from the device to the host"
    if not came_from_chip and any(x.device == CHIP for x in made):
        return "copies from the host to the device"
    return None
