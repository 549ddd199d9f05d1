"""Writes ONNX nodes: `b.Gemm(x, w, transB=1)` appends one and returns its output's name."""

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

OPSET = 17  # the newest that every consumer reads, compilers for NPUs included
IR_VERSION = 8


@dataclass(frozen=True)
class Value:
    """A tensor of the graph. shape: a static size is an int, a varying one a torch.SymInt.

    pieces: a fused or stacked weight that lies in the file as several matrices, in order of its
    rows; name is then empty.
    """

    name: str
    shape: tuple[Any, ...]
    dtype: torch.dtype
    pieces: tuple[str, ...] = field(default=())


# What a node takes: a value or its name, a constant (int = int64 scalar, float = float32 scalar,
# list = int64 vector, array as it is), or None for an input left out.
Input: TypeAlias = "Value | str | int | float | list[int] | np.ndarray[Any, Any] | None"


class Builder:
    """The nodes and constants of one graph. Every operator of the standard domain is a method."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self._names: Counter[str] = Counter()
        self._shared: dict[Hashable, Any] = {}
        self._scope = ""
        self.symbols: dict[str, tuple[str, int]] = {}  # a varying size -> an input and its axis

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        """Appends a node. outputs: their names below the scope, where there are several or the name
        should be another than the node's.
        """
        if not onnx.defs.has(operator, OPSET):
            raise AttributeError(f"opset {OPSET} has no operator {operator!r}")

        def append(*inputs: Input, outputs: tuple[str, ...] = (), **attributes: Any) -> Any:
            name = self._unique(operator)
            names = [self._unique(o) for o in outputs] or [name]
            node = helper.make_node(operator, [self._input(i) for i in inputs], names, name)
            # Not by keyword: an attribute may be called `name` or `to`.
            node.attribute.extend(
                helper.make_attribute(k, v) for k, v in sorted(attributes.items())
            )
            self.nodes.append(node)
            return names[0] if len(names) == 1 else names

        return append

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefixes the names of what is written inside with `name/`."""
        outer = self._scope
        self._scope = f"{outer}{name}/" if name else outer
        yield
        self._scope = outer

    def shared(self, name: str, key: Hashable, build: Callable[[], Any]) -> Any:
        """What `build` writes under the scope `name`, once for every key: later calls get the same
        values.
        """
        if (name, key) not in self._shared:
            outer, self._scope = self._scope, f"{name}/"
            self._shared[name, key] = build()
            self._scope = outer
        return self._shared[name, key]

    def matrices(self, weight: Value, count: int) -> list[str]:
        """A weight of `count` matrices, one on top of the other in its leading axes, as so many
        values [rows, columns].
        """
        if weight.pieces:
            if len(weight.pieces) != count:
                raise ValueError(f"{len(weight.pieces)} pieces where {count} are needed")
            return list(weight.pieces)
        *leading, columns = weight.shape
        rows = int(np.prod(leading)) // count
        flat = self.Reshape(weight, [count * rows, columns]) if len(leading) > 1 else weight
        if count == 1:
            return [flat if isinstance(flat, str) else flat.name]
        parts = self.Split(flat, [rows] * count, axis=0, outputs=("part",) * count)
        return list(parts)

    def size(self, x: Input, axis: int) -> str:
        """The length of one axis as an int64 scalar."""
        return str(self.Gather(self.Shape(x), axis, axis=0))

    def length(self, size: Any) -> str | int:
        """A size as torch knows it: static as it is, a varying one as an int64 scalar read off an
        input's shape.
        """
        if isinstance(size, int):
            return size
        if str(size) not in self.symbols:
            raise ValueError(f"the size {size} is not the length of an input's axis")
        name, axis = self.symbols[str(size)]
        return str(self.shared("sizes", str(size), lambda: self.size(name, axis)))

    def vector(self, *parts: str | int) -> str:
        """An int64 vector of scalars, of which some are known only at run time."""
        pieces = [[p] if isinstance(p, int) else self.Unsqueeze(p, [0]) for p in parts]
        return str(self.Concat(*pieces, axis=0))

    def _unique(self, name: str) -> str:
        full = self._scope + name
        self._names[full] += 1
        count = self._names[full]
        return full if count == 1 else f"{full}.{count}"

    def _input(self, x: Input) -> str:
        if isinstance(x, Value):
            if x.pieces:
                raise ValueError(f"a weight in {len(x.pieces)} pieces where one tensor is needed")
            return x.name
        if isinstance(x, str):
            return x
        if x is None:
            return ""
        if isinstance(x, bool | int | float | list):
            x = np.asarray(x, np.float32 if isinstance(x, float) else np.int64)
        return self._constant(x)

    def _constant(self, array: "np.ndarray[Any, Any]") -> str:
        text = str(array.tolist()).replace(" ", "")
        name = f"{array.dtype}:{text}"
        if array.size > 8:
            digest = hashlib.sha256(array.tobytes()).hexdigest()[:8]
            name = f"{array.dtype}:{'x'.join(map(str, array.shape))}:{digest}"
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(array, name)
        return name
