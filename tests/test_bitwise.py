"""The profile bitwise: who sums in an order of the row's own passes, who looks at the batch does
not."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.backends.null import NullBackend
from moge_hal.cache import LayerCache
from moge_hal.conformance.cases import Case
from moge_hal.conformance.judging import judge
from moge_hal.conformance.listing import every_case
from moge_hal.conformance.properties.bitwise import bitwise
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure, Verdict
from moge_hal.router import RouteSpec

CASES = [c for c in every_case() if c.prop == "bitwise" and "shipped" not in c.words]
FIRST = {case.op: case for case in reversed(CASES)}


def in_order(x: Tensor, w: Tensor) -> Tensor:
    """x wT with one accumulator an output and one term after the other: no kernel has a choice."""
    out = torch.zeros(len(x), len(w))
    for i, column in enumerate(w.float().T.contiguous()):
        out = out + x.float()[:, i : i + 1] * column
    return out


class Invariant(Backend):
    """Every sum goes through its terms in their order."""

    name = "invariant"
    claims = ("core", "train", "bitwise")

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        out = in_order(x, w)
        return (out if b is None else out + b.float()).to(x.dtype)

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        return in_order(x, w)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, LayerCache | None]:
        """Key after key, with the softmax corrected on the way."""
        held = positions
        if cache is not None:
            rows, spare = torch.arange(len(q))[:, None], cache.k.shape[1] - 1
            slots = torch.where(positions < 0, spare, positions)
            cache.k[rows, slots], cache.v[rows, slots] = k, v
            k, v = cache.k[:, :-1], cache.v[:, :-1]
            held = torch.arange(k.shape[1]).expand(len(q), -1)
        times = q.shape[2] // k.shape[2]
        top = torch.full(q.shape[:3], -math.inf)[..., None]
        total, mixed = torch.zeros_like(top), torch.zeros(q.shape)
        for n in range(k.shape[1]):
            key, value = (x[:, n, None].float().repeat_interleave(times, 2) for x in (k, v))
            score = torch.zeros_like(top)
            for i in range(q.shape[3]):
                score = score + q[..., i : i + 1].float() * key[..., i : i + 1]
            seen = ((held[:, n, None] >= 0) & (held[:, n, None] <= positions))[..., None, None]
            score = (score / math.sqrt(q.shape[3])).masked_fill(~seen, -math.inf)
            higher = torch.maximum(top, score)
            fixed = higher.masked_fill(higher.isinf(), 0)
            old, new = (top - fixed).exp(), (score - fixed).exp()
            value = torch.where(seen, value, 0)
            top, total, mixed = higher, total * old + new, mixed * old + new * value
        return (mixed / total.clamp_min(1e-30)).to(q.dtype), cache


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_sums_in_order_pass(case: Case) -> None:
    assert judge(Subject(Invariant()), case) == Verdict()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_they_are_right_too(case: Case) -> None:
    """Else it would prove little that they pass."""
    prop = {"model": "decode", "route": "route.valid"}.get(case.op, "value")
    judge(Subject(Invariant()), Case(case.op, case.dtype_name, case.shape, case.scale_name, prop))


class ByTheBatch(Invariant):
    """Another order of summation from five rows on."""

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return super().linear(*((x.flip(1), w.flip(1)) if len(x) > 4 else (x, w)), b)

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        return in_order(x.flip(1), w.flip(1)) if len(x) > 4 else in_order(x, w)


class ByThePlace(Invariant):
    """Another order of summation in the second half of the batch."""

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        half = (len(x) + 1) // 2
        first, second = x[:half], x[half:].flip(1)
        return torch.cat([super().linear(first, w, b), super().linear(second, w.flip(1), b)])


class LastOne(Invariant):
    """One number of the last row is one unit in the last place off."""

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, w: Any, eps: float
    ) -> tuple[Tensor, Tensor]:
        normed, total = super().add_rms_norm(x, residual, w, eps)
        if len(x) == 1:
            total = total.nextafter(total.new_full((), math.inf))
        return normed, total


class MinusZero(Invariant):
    """0 == -0, but they are not the same bits."""

    def embed(self, ids: Tensor, w: Any) -> Tensor:
        out = super().embed(ids, w) * 0
        return out.abs() if len(ids) == 1 else -out.abs()


class OtherExperts(Invariant):
    """Ties broken by the size of the batch: the weights are the same, the experts are not."""

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Tensor | None = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        ids, weights = super().route(logits, spec, scale, bias)
        return (ids.flip(1) if len(ids) == 2 else ids), weights


class ByTheChunk(Invariant):
    """Decode has a kernel of its own."""

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        if q.shape[1] == 1:
            return ops.attention(q, k, v, cache, positions)
        return super().attention(q, k, v, cache, positions)


@pytest.mark.parametrize(
    ("kind", "op", "reason"),
    [
        (NullBackend, "linear", "numbers have other bits than in the batch"),
        (NullBackend, "model", "text 0 alone"),
        (ByTheBatch, "linear", "row 0 alone: "),
        (ByTheBatch, "router_logits", "row 0 alone: "),
        (ByTheBatch, "swiglu_ffn", "row 0 alone: "),
        (ByTheBatch, "model", "text 0 alone: "),
        (ByThePlace, "linear", "row|rows"),
        (LastOne, "add_rms_norm", "row 0 alone: "),
        (MinusZero, "embed", "row 0 alone: "),
        (OtherExperts, "route", "the first 2 rows: "),
        (ByTheChunk, "model", "texts cut into chunks|a prompt and single tokens"),
    ],
)
def test_sums_that_look_at_the_batch_fail(kind: type[Backend], op: str, reason: str) -> None:
    with pytest.raises(Failure, match=reason):
        bitwise(Subject(kind()), FIRST[op])
