"""Faults that any operation can have, most of them where its input is at an edge: every kind once
for every operation that it can befall, as `SecondBlockOfLinear`.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.cache import LayerCache


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class Edge:
    """One kind of fault: what it does before and after an operation that is itself right."""

    ops: tuple[str, ...] = ops.NAMES
    claims: tuple[str, ...] = Backend.claims
    raises = False  # whether the fault is to raise what it must not

    @staticmethod
    def compute(op: str, args: list[Any]) -> Any:
        return getattr(ops, op)(*args)

    @staticmethod
    def before(args: list[Any]) -> list[Any]:
        return args

    @staticmethod
    def after(args: list[Any], part: Tensor, axis: int, call: int) -> Tensor:
        """part: one output, with its tokens along the axis. call: how many calls came before."""
        return part


class SecondBlock(Edge):
    """The second block of 512 tokens gets the results of the first."""

    @staticmethod
    def after(args: list[Any], part: Tensor, axis: int, call: int) -> Tensor:
        return part.index_select(axis, torch.arange(part.shape[axis]) % 512)


class OneToken(Edge):
    """A kernel of its own for one token, which keeps its result in bfloat16."""

    @staticmethod
    def after(args: list[Any], part: Tensor, axis: int, call: int) -> Tensor:
        floating = part.is_floating_point() and part.shape[axis] == 1
        return part.bfloat16().to(part.dtype) if floating else part


class TailLost(Edge):
    """Of more than 16 tokens, those past the last multiple of 16 get nothing."""

    @staticmethod
    def after(args: list[Any], part: Tensor, axis: int, call: int) -> Tensor:
        count = part.shape[axis]
        done = torch.arange(count) < (count // 16 * 16 or 16)
        return part * done.view(-1, *[1] * (part.dim() - axis - 1)).to(part.dtype)


class NoTokens(Edge):
    """No tokens make one row, as the grid of a kernel cannot be empty."""

    @staticmethod
    def after(args: list[Any], part: Tensor, axis: int, call: int) -> Tensor:
        shape = [max(size, 1) if at == axis else size for at, size in enumerate(part.shape)]
        return part if part.shape[axis] else part.new_zeros(shape)


class NoneRefused(Edge):
    """A maximum over the input, which no tokens do not have: torch raises."""

    raises = True

    @staticmethod
    def before(args: list[Any]) -> list[Any]:
        args[0].max()
        return args


class OneRow(Edge):
    """A kernel of its own for a batch of one row, which keeps its result in bfloat16."""

    ops = ("rotary", "attention")

    @staticmethod
    def after(args: list[Any], part: Tensor, axis: int, call: int) -> Tensor:
        return part.bfloat16().to(part.dtype) if len(part) == 1 else part


class ManyRows(Edge):
    """Of a batch, the rows past the sixteenth get the results of the first."""

    ops = ("rotary", "attention")

    @staticmethod
    def after(args: list[Any], part: Tensor, axis: int, call: int) -> Tensor:
        return part.index_select(0, torch.arange(len(part)) % 16)


class IgnoresStrides(Edge):
    """Reads a view as if its elements lay side by side."""

    ops = tuple(op for op in ops.NAMES if op != "embed")

    @staticmethod
    def before(args: list[Any]) -> list[Any]:
        def read(t: Tensor) -> Tensor:
            return t.as_strided(t.shape, torch.empty(t.shape, device="meta").stride())

        return [read(a) if isinstance(a, Tensor) else a for a in args]


class RowsByTheirElements(Edge):
    """Takes a row to be as long as its elements reach: right for every second element of a row, and
    wrong for a part of a wider one.
    """

    ops = tuple(op for op in ops.NAMES if op not in ("embed", "rotary", "attention"))

    @staticmethod
    def before(args: list[Any]) -> list[Any]:
        x = args[0]
        row, step = x.shape[-1] * x.stride(-1), x.stride(-1)
        return [x.as_strided(x.shape, (row, step)), *args[1:]]


class LastOfAFullBlock(Edge):
    """Where the last block of 128 tokens is exactly full, its last token gets nothing."""

    @staticmethod
    def after(args: list[Any], part: Tensor, axis: int, call: int) -> Tensor:
        count = part.shape[axis]
        if not count or count % 128:
            return part
        kept = torch.arange(count) < count - 1
        return part * kept.view(-1, *[1] * (part.dim() - axis - 1)).to(part.dtype)


class IgnoresOffset(Edge):
    """Reads a view from where its storage begins."""

    @staticmethod
    def before(args: list[Any]) -> list[Any]:
        return [a.as_strided(a.shape, a.stride(), 0) if isinstance(a, Tensor) else a for a in args]


class Widened(Edge):
    """The result stays in float32."""

    ops = tuple(op for op in ops.NAMES if op not in ("router_logits", "route"))

    @staticmethod
    def after(args: list[Any], part: Tensor, axis: int, call: int) -> Tensor:
        return part.float()


class ThroughBfloat16(Edge):
    """What is float16 comes by way of bfloat16, the only narrow type that the kernel knows."""

    ops = Widened.ops

    @staticmethod
    def after(args: list[Any], part: Tensor, axis: int, call: int) -> Tensor:
        return part.bfloat16().to(part.dtype) if part.dtype == torch.float16 else part


class Unordered(Edge):
    """Additions in whatever order comes: every second call differs in the last digit."""

    @staticmethod
    def after(args: list[Any], part: Tensor, axis: int, call: int) -> Tensor:
        return part * (1 + call % 2 * 2.0**-22) if part.is_floating_point() else part


class Poisoned(Edge):
    """A number that is taken over the whole batch carries a NaN from one token to all."""

    ops = tuple(op for op in ops.NAMES if op != "embed")

    @staticmethod
    def after(args: list[Any], part: Tensor, axis: int, call: int) -> Tensor:
        return part + (0 * args[0].sum()).to(part.dtype) if part.is_floating_point() else part


class Scratch(Edge):
    """Uses its first input as scratch memory."""

    @staticmethod
    def after(args: list[Any], part: Tensor, axis: int, call: int) -> Tensor:
        args[0].zero_()
        return part


class GradientHalved(Edge):
    """The forward is right; of the gradient only one half comes through."""

    @staticmethod
    def after(args: list[Any], part: Tensor, axis: int, call: int) -> Tensor:
        return part / 2 + part.detach() / 2 if part.is_floating_point() else part


class _RoundBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Tensor:
        return above[0].bfloat16().to(above[0].dtype)


class GradientRounded(Edge):
    """The forward is right; the backward begins with a gradient in bfloat16."""

    @staticmethod
    def after(args: list[Any], part: Tensor, axis: int, call: int) -> Tensor:
        if not part.is_floating_point():
            return part
        rounded: Tensor = _RoundBackward.apply(part)  # type: ignore[no-untyped-call]
        return rounded


class Wide(Edge):
    """No fault: computes in float64 and rounds, so that no row's bits depend on the others."""

    claims = ("core", "train", "bitwise")

    @staticmethod
    def compute(op: str, args: list[Any]) -> Any:
        exact = op in ("router_logits", "route")
        dtype = torch.float32 if exact else next(a.dtype for a in args if _floating(a))
        wide = [a.double() if _floating(a) else a for a in args]
        cache = args[3] if op == "attention" else None
        if cache is not None:
            wide[3] = LayerCache(cache.k.double(), cache.v.double())
        out = getattr(ops, op)(*wide)
        if op == "attention":
            if cache is not None:
                cache.k.copy_(wide[3].k)
                cache.v.copy_(wide[3].v)
            return out[0].to(dtype), cache
        if not isinstance(out, tuple):
            return out.to(dtype)
        return tuple(part.to(dtype) if _floating(part) else part for part in out)


class OneTokenOtherwise(Wide):
    """One token is summed in another order than many, and differs in the last digit."""

    @staticmethod
    def after(args: list[Any], part: Tensor, axis: int, call: int) -> Tensor:
        single = part.is_floating_point() and part.shape[0] == 1
        return part * (1 + 2.0**-22) if single else part


class Recordable(Edge):
    """No fault: nothing is read on the host, and no shape hangs on data."""

    claims = ("core", "train", "capture")

    @staticmethod
    def compute(op: str, args: list[Any]) -> Any:
        if op != "experts":
            return getattr(ops, op)(*args)
        x, gate_up, down, ids, weights = args[:5]
        local = ids.long() - (args[5] if len(args) > 5 else 0)
        inside = (local >= 0) & (local < len(gate_up))
        local = local.clamp(0, len(gate_up) - 1)
        gate, up = torch.einsum("td,tkfd->tkf", x, gate_up[local]).chunk(2, -1)
        parts = torch.einsum("tkf,tkdf->tkd", F.silu(gate) * up, down[local])
        return (parts * (weights * inside)[..., None]).sum(1).to(x.dtype)


class ReadOnTheHost(Recordable):
    """Looks at a number of its result, for which the host has to wait."""

    @staticmethod
    def after(args: list[Any], part: Tensor, axis: int, call: int) -> Tensor:
        return part * 0 if bool((part != part).all()) else part


KINDS: tuple[type[Edge], ...] = (
    Wide,
    OneTokenOtherwise,
    Recordable,
    ReadOnTheHost,
    SecondBlock,
    OneToken,
    TailLost,
    NoTokens,
    NoneRefused,
    OneRow,
    ManyRows,
    IgnoresStrides,
    RowsByTheirElements,
    LastOfAFullBlock,
    IgnoresOffset,
    Widened,
    ThroughBfloat16,
    Unordered,
    Poisoned,
    Scratch,
    GradientHalved,
    GradientRounded,
)


def _operation(kind: type[Edge], op: str) -> Callable[..., Any]:
    axis = 1 if op in ("rotary", "attention") else 0

    def run(self: Any, *given: Any) -> Any:
        self.calls = getattr(self, "calls", -1) + 1
        args = kind.before(list(given))
        out = kind.compute(op, args)
        if op == "attention":
            return kind.after(args, out[0], axis, self.calls), out[1]
        if isinstance(out, tuple):
            return tuple(kind.after(args, part, axis, self.calls) for part in out)
        return kind.after(args, out, axis, self.calls)

    return run


def of(kind: type[Edge], *operations: str) -> type[Backend]:
    """A backend whose operations have the fault."""
    words = "".join(op.title().replace("_", "") for op in operations)
    members = {op: _operation(kind, op) for op in operations}
    title = f"{kind.__name__}Of{words}" if len(operations) == 1 else f"{kind.__name__}Everywhere"
    about = {
        "__doc__": kind.__doc__,
        "__module__": __name__,
        "claims": kind.claims,
        "raises": kind.raises,
    }
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", title).lower()
    return type(title, (Backend,), {**members, **about, "name": name})


ALL_WIDE = of(Wide, *ops.NAMES)
ALL_RECORDABLE = of(Recordable, *ops.NAMES)
ALL_OTHERWISE = of(OneTokenOtherwise, *ops.NAMES)
ALL_READ = of(ReadOnTheHost, *ops.NAMES)
# By name as well, as `--backend mutants.edges:SecondBlockOfLinear` asks for one.
MUTANTS = {(kind, op): of(kind, op) for kind in KINDS for op in kind.ops}
globals().update({mutant.__name__: mutant for mutant in MUTANTS.values()})
