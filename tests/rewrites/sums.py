"""Other orders of summation, other layouts of a matrix."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend


class Sums(Backend):
    """Every matrix product is `product`, in at least float32; the result is rounded once."""

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        """x [T, I], w [O, I] -> [T, O]."""
        return F.linear(x, w)

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        out = self.product(ops.up(x), ops.up(w))
        return (out if b is None else out + ops.up(b)).to(x.dtype)

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        return self.product(ops.up(x), ops.up(w))


class SequentialSums(Sums):
    """One float32 accumulator an output, one term after the other: the plainest loop there is."""

    name = "sequential-sums"

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        out = x.new_zeros(len(x), len(w))
        for i, row in enumerate(w.T.contiguous()):
            out.addcmul_(x[:, i : i + 1], row)
        return out


class ReversedSums(Sums):
    """The last term first."""

    name = "reversed-sums"

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x.flip(1), w.flip(1))


class SplitSums(Sums):
    """A reduction in four parts, added up at the end."""

    name = "split-sums"

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        parts = zip(x.chunk(4, 1), w.chunk(4, 1), strict=True)
        return torch.stack([F.linear(*part) for part in parts]).sum(0)


class BlocksOf16(Sums):
    """Sixteen terms at a time, the blocks one after the other."""

    name = "blocks-of-16"

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        out = x.new_zeros(len(x), len(w))
        for part, rows in zip(x.split(16, 1), w.split(16, 1), strict=True):
            out = out + F.linear(part, rows)
        return out


class PairwiseSums(Sums):
    """Halves of halves."""

    name = "pairwise-sums"

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        if x.shape[1] < 8:
            return F.linear(x, w)
        middle = x.shape[1] // 2
        first = self.product(x[:, :middle], w[:, :middle])
        return first + self.product(x[:, middle:], w[:, middle:])


class SeparateProducts(Sums):
    """Products that are rounded before they are added: no multiply-add."""

    name = "separate-products"

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        rows = [(row * w).sum(-1) for row in x]
        return torch.stack(rows) if rows else x.new_zeros(0, len(w))


class DoubleSums(Sums):
    """A float64 accumulator, rounded once."""

    name = "double-sums"

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x.double(), w.double()).to(x.dtype)


class _Turned(NamedTuple):
    """A weight [O, I] that was packed as [I, O]."""

    w: Tensor


class TransposedWeights(Backend):
    """Weights are packed input by input, and the product is w x with tokens as columns."""

    name = "transposed-weights"

    def pack(self, role: str, weight: Tensor) -> Any:
        turned = role in ("linear.w", "router_logits.w")
        return _Turned(weight.T.contiguous()) if turned else weight

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        right = w.w if isinstance(w, _Turned) else w.T
        out = (right.T @ x.T).T
        return out if b is None else out + b

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        right = w.w if isinstance(w, _Turned) else w.T
        return ops.up(x) @ ops.up(right)


class PaddedRows(Backend):
    """Tokens are padded to a multiple of 16 with rows that are cut off again."""

    name = "padded-rows"

    def pad(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, -len(x) % 16), value=1000.0)

    def embed(self, ids: Tensor, w: Any) -> Tensor:
        return ops.embed(F.pad(ids, (0, -len(ids) % 16)), w)[: len(ids)]

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return ops.linear(self.pad(x), w, b)[: len(x)]

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        return ops.rms_norm(self.pad(x), w, eps)[: len(x)]

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        return ops.router_logits(self.pad(x), w)[: len(x)]
