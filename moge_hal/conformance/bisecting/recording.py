"""Watches a model as it runs: every operation that a layer calls, with its inputs and outputs.

The model is bound as for use and not compiled, so what is seen is the backend's real run: the same
instance, the same packed weights in the same memory, the same cache, in the same order. A fault
that hangs on any of them is seen where it happens.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.conformance.inputs import Args
from moge_hal.conformance.oracle import Outputs
from moge_hal.conformance.subject import ROLES, same_bits
from moge_hal.model import Transformer, Weights
from moge_hal.runtime import Model


@dataclass(frozen=True)
class Call:
    """One call of an operation. Tensors lie on the host and are nobody else's."""

    op: str
    weight: str  # canonical name of its (first) weight, with [e] for one of stacked ones; or ""
    layer: int | None  # None: before or behind the layers
    args: Args  # weights as they were before packing; no cache
    past: tuple[Args, ...]  # attention over a cache: the calls before over the same, in order
    cached: bool
    out: Outputs | Exception
    inner: tuple["Call", ...] = ()  # those that it made of other operations, in order of their ends
    wrote: str = ""  # what it wrote over, in words: an input, or what an earlier call had returned


class Watch:
    """Tells `seen` of every call of an operation by the model itself; `begin` before each step."""

    def __init__(
        self, model: Model, weights: Mapping[str, Tensor], seen: Callable[[Call], None]
    ) -> None:
        """weights: as the model was bound with, but in other memory: a backend may spoil its own.

        Changes the class of the model's backend.
        """
        transformer = model.run_step
        assert isinstance(transformer, Transformer)
        self.seen = seen
        self.weights = weights
        self.names: dict[int, str] = {}  # by identity
        self.stacks: dict[int, tuple[str, Tensor]] = {}  # by memory
        for path, module in transformer.named_modules():
            for name in module.roles if isinstance(module, Weights) else ():
                weight = getattr(module, name, None)
                if weight is None:  # the output projection has no bias
                    continue
                self.names[id(weight)] = f"{path}.{name}"
                if _is_plain(weight):
                    memory = weight.untyped_storage().data_ptr()
                    self.stacks[memory] = (f"{path}.{name}", weight)
        self.text: object = None
        self.cached = False
        self.layer: int | None = None
        self.past: dict[Any, list[Args]] = {}
        self.open: list[list[Call]] = []  # the inner calls of those that have not returned
        self.returned: list[tuple[Tensor, Tensor, str]] = []  # live, as it was, whose
        bound = model.backend
        methods = {op: _watched(self, getattr(type(bound), op), op) for op in ops.NAMES}
        bound.__class__ = type(type(bound).__name__, (type(bound),), methods)

    def begin(self, text: object, new: bool, cached: bool) -> None:
        """A step of a text begins; new: over a cache that nothing was written to."""
        if new:
            self.past = {key: calls for key, calls in self.past.items() if key[0] != text}
        self.text, self.cached, self.layer = text, cached, None
        self.returned.clear()

    def around(self, op: str, method: Callable[..., Any], backend: Backend, given: Any) -> Any:
        """Runs the method and tells of it."""
        positional, named = given
        args, weight = self._read(op, positional, named)
        live = [
            (v, args[n], f"its input {n}") for n, v in _arguments(op, given) if _copied(op, n, v)
        ]
        self.open.append([])
        raised: Exception | None = None
        out: Any = None
        try:
            out = method(backend, *positional, **named)
        except Exception as error:  # told like any other outcome, and raised again
            raised = error
        inner = tuple(self.open.pop())
        cached = op == "attention" and self.cached
        past = self.past.setdefault((self.text, self.layer), []) if cached else []
        parts = () if raised else _parts(op, out)
        call = Call(
            op,
            weight,
            self.layer,
            args,
            tuple(past),
            cached,
            raised or tuple(_copy(part) for part in parts),
            inner,
            self._written_over(live) if not self.open else "",
        )
        if cached:
            past.append(args)
        if self.open:
            self.open[-1].append(call)
        else:
            whose = f"{weight or op} ({op}, layer {self.layer})"
            copies = call.out if isinstance(call.out, tuple) else ()
            self.returned += zip(parts, copies, [whose] * len(parts), strict=False)
            self.seen(call)
        if raised:
            raise raised
        return out

    def _read(self, op: str, positional: Any, named: Any) -> tuple[Args, str]:
        """The arguments on the host, and the name of the first weight among them."""
        args: Args = {}
        first = ""
        for name, value in _arguments(op, (positional, named)):
            label = self._name(value)
            first = first or label
            if label in self.weights:
                args[name] = self.weights[label]
            elif _copied(op, name, value):
                args[name] = _copy(value)
            else:
                args[name] = None if name == "cache" else value
        found = re.match(r"layers\.(\d+)\.", first)
        if found:
            self.layer = int(found[1])
        elif first and not self.open:
            self.layer = None
        return args, first

    def _name(self, value: Any) -> str:
        if id(value) in self.names:
            return self.names[id(value)]
        if not _is_plain(value) or not value.numel():
            return ""
        name, whole = self.stacks.get(value.untyped_storage().data_ptr(), ("", value))
        at = (value.storage_offset() - whole.storage_offset()) // value.numel()
        return f"{name}[{at}]" if name else ""

    def _written_over(self, live: list[tuple[Tensor, Tensor, str]]) -> str:
        for tensor, before, whose in [*live, *self.returned]:
            if not same_bits(tensor.detach().cpu(), before):
                return whose
        return ""


def _is_plain(value: Any) -> bool:
    """Whether it has memory to look at: what is packed may be anything."""
    return type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided


def _watched(watch: Watch, method: Callable[..., Any], op: str) -> Callable[..., Any]:
    def run(backend: Backend, *args: Any, **named: Any) -> Any:
        return watch.around(op, method, backend, (args, named))

    return run


def _arguments(op: str, given: tuple[Any, Any]) -> list[tuple[str, Any]]:
    """By the names of `ops.py`, in their order."""
    bound = inspect.signature(getattr(Backend, op)).bind(None, *given[0], **given[1])
    bound.apply_defaults()
    return list(bound.arguments.items())[1:]


def _copied(op: str, name: str, value: object) -> bool:
    return isinstance(value, Tensor) and name != "cache" and (op, name) not in ROLES


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _parts(op: str, out: Any) -> Outputs:
    """The tensors among what was returned; a cache is none."""
    parts = out if isinstance(out, tuple) else (out,)
    parts = parts[:1] if op == "attention" and len(parts) == 2 else parts
    return tuple(part for part in parts if isinstance(part, Tensor))
