"""The few plain torch nodes that the model's own code makes between operations: sizes, views, a
little integer arithmetic.

A rule gets the graph, the node's result (shape and dtype) and its arguments, and returns the names
of its outputs. A node without a rule is an error that names it: what costs time belongs into an
operation of the backend, with a builder of its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from onnx import TensorProto

from moge_hal.errors import UserError
from moge_hal.export.graph import Builder, Value

# Whole numbers are int64 inside the graph, so that ids need no casts.
ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.int32: TensorProto.INT64,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}

END = 2**63 - 1  # what torch writes for "to the end of the axis"


class Result(NamedTuple):
    """What torch says of a node's output: shape (varying sizes are torch.SymInt) and dtype."""

    shape: tuple[Any, ...]
    dtype: torch.dtype


Rule = Callable[..., "str | Value | list[str]"]


def onnx_type(dtype: torch.dtype) -> int:
    """The element type in the graph; raises `UserError` for one that has none."""
    if dtype not in ONNX_TYPES:
        able = ", ".join(str(d).removeprefix("torch.") for d in ONNX_TYPES)
        raise UserError(f"cannot export a tensor of {dtype}; the graph holds {able}")
    return int(ONNX_TYPES[dtype])


def _binary(operator: str) -> Rule:
    def rule(b: Builder, out: Result, x: Any, y: Any, alpha: float = 1) -> str:
        if alpha != 1:
            raise UserError(f"cannot export {operator} with alpha={alpha}: multiply first")
        kind = float if out.dtype.is_floating_point else int
        x, y = (kind(v) if isinstance(v, int | float) else v for v in (x, y))
        return str(getattr(b, operator)(x, y))

    return rule


def _compare(operator: str) -> Rule:
    def rule(b: Builder, out: Result, x: Value, y: Any) -> str:
        result = getattr(b, "Equal" if operator == "NotEqual" else operator)(x, y)
        return str(b.Not(result) if operator == "NotEqual" else result)

    return rule


def _same(b: Builder, out: Result, x: Value, *args: Any, **options: Any) -> Value:
    return x


def _reshape(b: Builder, out: Result, x: Value, shape: Any) -> str:
    # By the result's shape: a -1 of the caller could not be inferred when another size is zero.
    varying = sum(not isinstance(n, int) for n in out.shape)
    if varying < 2:
        return str(b.Reshape(x, [n if isinstance(n, int) else -1 for n in out.shape]))
    key = str(out.shape)
    sizes = b.shared("sizes", key, lambda: b.vector(*map(b.length, out.shape)))
    return str(b.Reshape(x, sizes, allowzero=1))


def _slice(
    b: Builder,
    out: Result,
    x: Value,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> "str | Value":
    start, end = start or 0, END if end is None else end
    if (start, end, step) == (0, END, 1):
        return x
    bounds = [[n] if isinstance(n, int) else b.vector(b.length(n)) for n in (start, end)]
    return str(b.Slice(x, *bounds, [dim], [step]))


def _chunk(b: Builder, out: list[Result], x: Value, chunks: Any, dim: int = 0) -> list[str]:
    sizes = [int(part.shape[dim]) for part in out]
    parts = b.Split(x, sizes, axis=dim, outputs=("part",) * len(sizes))
    return [parts] if len(sizes) == 1 else list(parts)


def _remainder(b: Builder, out: Result, x: Value, y: int) -> str:
    if out.dtype.is_floating_point:
        raise UserError("cannot export a remainder of floating point numbers")
    return str(b.Mod(x, y))


def _floor_divide(b: Builder, out: Result, x: Value, y: int) -> str:
    # ONNX's Div of whole numbers rounds towards zero.
    return str(b.Div(b.Sub(x, _remainder(b, out, x, y)), y))


def _clamp(
    b: Builder, out: Result, x: Value, low: Any = None, high: Any = None, **named: Any
) -> str:
    kind = float if out.dtype.is_floating_point else int
    bounds = (named.get("min", low), named.get("max", high))
    return str(b.Clip(x, *(None if n is None else kind(n) for n in bounds)))


def _to(b: Builder, out: Result, x: Value, *args: Any, **options: Any) -> "str | Value":
    if x.dtype == out.dtype:
        return x
    return str(b.Cast(x, to=onnx_type(out.dtype)))


def _stack(b: Builder, out: Result, parts: list[Value], dim: int = 0) -> str:
    return str(b.Concat(*(b.Unsqueeze(p, [dim]) for p in parts), axis=dim))


def _transpose(b: Builder, out: Result, x: Value, first: int, second: int) -> str:
    order = list(range(len(x.shape)))
    order[first], order[second] = order[second], order[first]
    return str(b.Transpose(x, perm=order))


def _where(b: Builder, out: Result, condition: Value, x: Any, y: Any) -> str:
    kind = float if out.dtype.is_floating_point else int
    x, y = (kind(v) if isinstance(v, int | float) else v for v in (x, y))
    return str(b.Where(condition, x, y))


RULES: dict[str, Rule] = {
    "add.Tensor": _binary("Add"),
    "sub.Tensor": _binary("Sub"),
    "mul.Tensor": _binary("Mul"),
    "div.Tensor": _binary("Div"),
    "remainder.Scalar": _remainder,
    "floor_divide.default": _floor_divide,
    "clamp.default": _clamp,
    "ge.Scalar": _compare("GreaterOrEqual"),
    "gt.Scalar": _compare("Greater"),
    "le.Scalar": _compare("LessOrEqual"),
    "lt.Scalar": _compare("Less"),
    "eq.Scalar": _compare("Equal"),
    "ne.Scalar": _compare("NotEqual"),
    "where.self": _where,
    "where.ScalarOther": _where,
    "embedding.default": lambda b, out, table, ids, *options: str(b.Gather(table, ids, axis=0)),
    "view.default": _reshape,
    "reshape.default": _reshape,
    "flatten.using_ints": lambda b, out, x, *dims: _reshape(b, out, x, None),
    "unsqueeze.default": lambda b, out, x, dim: str(b.Unsqueeze(x, [dim])),
    "transpose.int": _transpose,
    "permute.default": lambda b, out, x, order: str(b.Transpose(x, perm=list(order))),
    "select.int": lambda b, out, x, dim, index: str(b.Gather(x, index, axis=dim)),
    "slice.Tensor": _slice,
    "chunk.default": _chunk,
    "split.Tensor": _chunk,
    "split_with_sizes.default": _chunk,
    "cat.default": lambda b, out, parts, dim=0: str(b.Concat(*parts, axis=dim)),
    "stack.default": _stack,
    "to.dtype": _to,
    "_to_copy.default": _to,
    "contiguous.default": _same,
    "clone.default": _same,
    "detach.default": _same,
    "alias.default": _same,
}
