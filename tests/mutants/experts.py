"""Experts that compute for the wrong tokens, for none, or with the wrong weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend


class Spelled(Backend):
    """Right experts, a method for every decision. Each mutant takes one of them wrongly."""

    name = "spelled-experts"

    def local(self, ids: Tensor, first: int, count: int) -> Tensor:
        """Ids among the experts that are here; what is elsewhere is outside 0 .. count - 1."""
        return ids - first

    def weigh(self, weights: Tensor, ids: Tensor, count: int) -> Tensor:
        return weights

    def which(self, e: int, count: int) -> int:
        """Whose matrices expert e uses."""
        return e

    def ffn(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, down)

    def start(self, x: Tensor) -> Tensor:
        """[T, D] of zeros: what is added to."""
        return torch.zeros_like(ops.up(x))

    def gather(self, x: Tensor, token: Tensor) -> Tensor:
        return x[token]

    def add(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        return out.index_add(0, token, rows.to(out.dtype))

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        count, out = len(gate_up), self.start(x)
        local, weights = self.local(ids, first, count), self.weigh(weights, ids, count)
        for e in range(count):
            token, slot = torch.nonzero(local == e, as_tuple=True)
            own = self.which(e, count)
            rows = self.ffn(self.gather(x, token), gate_up[own], down[own])
            out = self.add(out, token, ops.up(rows) * weights[token, slot, None])
        return out.to(x.dtype)


class CapacityDrops(Spelled):
    """An expert takes twice its fair share of the tokens and drops the rest, as engines did."""

    name = "capacity-drops"

    def weigh(self, weights: Tensor, ids: Tensor, count: int) -> Tensor:
        capacity = -(-ids.numel() * 2 // count)
        chosen = ids.flatten().long()[:, None] == torch.arange(count)
        late = (chosen & (chosen.cumsum(0) > capacity)).any(1).view(ids.shape)
        return weights.masked_fill(late, 0.0)


class LastTokenFaint(Spelled):
    """The last token's weights are 3 % too small."""

    name = "last-token-faint"

    def weigh(self, weights: Tensor, ids: Tensor, count: int) -> Tensor:
        last = torch.arange(len(weights))[:, None] == len(weights) - 1
        return torch.where(last, weights * 0.97, weights)


class NegativeSkipped(Spelled):
    """A weight below zero is taken for none."""

    name = "negative-skipped"

    def weigh(self, weights: Tensor, ids: Tensor, count: int) -> Tensor:
        return weights.clamp(min=0)


class WeightsForgotten(Spelled):
    """Every chosen expert counts in full."""

    name = "weights-forgotten"

    def weigh(self, weights: Tensor, ids: Tensor, count: int) -> Tensor:
        return torch.ones_like(weights)


class WeightsSumToOne(Spelled):
    """Weights are divided by their sum once more."""

    name = "weights-sum-to-one"

    def weigh(self, weights: Tensor, ids: Tensor, count: int) -> Tensor:
        return weights / weights.abs().sum(-1, keepdim=True)


class WeightsInBfloat16(Spelled):
    """Routing weights are rounded to bfloat16."""

    name = "weights-in-bfloat16"

    def weigh(self, weights: Tensor, ids: Tensor, count: int) -> Tensor:
        return weights.bfloat16().float()


class WeightsOfTheFirstToken(Spelled):
    """A crowd of equal choices is weighed like its first token."""

    name = "weights-of-the-first-token"

    def weigh(self, weights: Tensor, ids: Tensor, count: int) -> Tensor:
        same = (ids == ids[:1]).all(-1, keepdim=True)
        return torch.where(same, weights[:1], weights) if len(ids) else weights


class FirstIgnored(Spelled):
    """Every rank takes its local experts for those from 0 on."""

    name = "first-ignored"

    def local(self, ids: Tensor, first: int, count: int) -> Tensor:
        return ids


class FirstOffByOne(Spelled):
    """All ranks but the first begin one expert too early."""

    name = "first-off-by-one"

    def local(self, ids: Tensor, first: int, count: int) -> Tensor:
        return ids - max(first - 1, 0)


class ClampedIds(Spelled):
    """Ids of other ranks are clamped to the nearest local expert instead of being left out."""

    name = "clamped-ids"

    def local(self, ids: Tensor, first: int, count: int) -> Tensor:
        return (ids - first).clamp(0, count - 1)


class WrappedIds(Spelled):
    """Ids of other ranks come round from the other end, as a negative index does."""

    name = "wrapped-ids"

    def local(self, ids: Tensor, first: int, count: int) -> Tensor:
        return torch.where(ids < first, (ids - first) % count, ids - first)


class ExpertByMask(Spelled):
    """Expert e by the low bits of its id, right where the number of experts is a power of two."""

    name = "expert-by-mask"

    def local(self, ids: Tensor, first: int, count: int) -> Tensor:
        low = 2 ** (count.bit_length() - 1) - 1
        return (ids - first) & low if first == 0 else ids - first


class EveryOtherLost(Spelled):
    """Of a lone token's experts, where they are more than four, every other one is lost."""

    name = "every-other-lost"

    def weigh(self, weights: Tensor, ids: Tensor, count: int) -> Tensor:
        several = ids.shape[1] > 4 and len(ids) == 1
        return weights * (torch.arange(ids.shape[1]) % 2 == 0) if several else weights


class LastExpertIsTheFirst(Spelled):
    """The last expert works with the matrices of the first."""

    name = "last-expert-is-the-first"

    def which(self, e: int, count: int) -> int:
        return 0 if e == count - 1 else e


class IdleShifts(Spelled):
    """Rows sorted by expert, counted without the idle: after one, all use their neighbour's."""

    name = "idle-shifts"

    def local(self, ids: Tensor, first: int, count: int) -> Tensor:
        here = ids - first
        busy = torch.isin(torch.arange(count), here)
        place = torch.where(busy, busy.cumsum(0) - 1, torch.arange(count))
        inside = (here >= 0) & (here < count)
        return torch.where(inside, place[here.clamp(0, count - 1).long()], here)


class Overwrites(Spelled):
    """A token's later expert is written over its earlier one instead of being added."""

    name = "overwrites"

    def add(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        return out.index_copy(0, token, rows)


class NarrowSum(Spelled):
    """Experts are added up in the dtype of the model."""

    name = "narrow-sum"

    def start(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class WeightBeforeTheGate(Spelled):
    """The weight multiplies the token before the first projection, as if that were linear."""

    name = "weight-before-the-gate"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        parts = [
            super(WeightBeforeTheGate, self).experts(
                x * weights[:, k, None].to(x.dtype),
                gate_up,
                down,
                ids[:, k, None],
                torch.ones_like(weights[:, :1]),
                first,
            )
            for k in range(ids.shape[1])
        ]
        return torch.stack(parts).sum(0)


class OddRows(Spelled):
    """An expert with an odd number of rows gets its last one twice, instead of the one before."""

    name = "odd-rows"

    def gather(self, x: Tensor, token: Tensor) -> Tensor:
        if len(token) < 3 or len(token) % 2 == 0:
            return x[token]
        return x[torch.cat([token[:-2], token[-1:], token[-1:]])]


class GeluInTheExperts(Spelled):
    """The routed experts have a GELU, the shared one is right."""

    name = "gelu-in-the-experts"

    def ffn(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, -1)
        return F.linear(F.gelu(gate, approximate="tanh") * up, down)


class WeightsTimes098(Spelled):
    """Weights 2 % too small: a quantisation scale with a fault."""

    name = "experts-2-percent-small"

    def ffn(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return super().ffn(x, gate_up, down * 0.98)


class SmallBatchInBfloat16(Spelled):
    """An expert with fewer than 4 rows runs in bfloat16."""

    name = "small-batch-in-bfloat16"

    def ffn(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        if len(x) >= 4:
            return super().ffn(x, gate_up, down)
        return super().ffn(x.bfloat16(), gate_up.bfloat16(), down.bfloat16()).to(x.dtype)


class DenseTimesZero(Backend):
    """Every expert for every token, times a weight that is mostly zero."""

    name = "dense-times-zero"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        local = torch.arange(first, first + len(gate_up))
        dense = ((ids[..., None] == local) * weights[..., None]).sum(1)  # [T, El]
        parts = [
            ops.swiglu_ffn(x, a, b) * dense[:, e, None]
            for e, (a, b) in enumerate(zip(gate_up, down, strict=True))
        ]
        return torch.stack(parts).sum(0)


class OneHotGather(Spelled):
    """Tokens are collected with a product by a matrix of zeros and ones, where 0 * NaN is NaN."""

    name = "one-hot-gather"

    def gather(self, x: Tensor, token: Tensor) -> Tensor:
        return torch.eye(len(x), dtype=x.dtype)[token] @ x


class DetachedWeights(Spelled):
    """Right forward, but no gradient reaches the router."""

    name = "detached-weights"

    def weigh(self, weights: Tensor, ids: Tensor, count: int) -> Tensor:
        return weights.detach()


class GradientOfGateUpHalved(Backend):
    """The backward gives gate_up one half of its gradient."""

    name = "gradient-of-gate-up-halved"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        half = gate_up / 2 + gate_up.detach() / 2
        return ops.experts(x, half, down, ids, weights, first)


class GradientTimesK(Backend):
    """Every one of a token's K experts passes on the sum of all K gradients: K times too much."""

    name = "gradient-times-k"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        more = ids.shape[1] - 1
        out = ops.experts(x, gate_up, down, ids, weights, first)
        return out + more * (out - out.detach())


class GradientOfTheFirstExpert(Backend):
    """A token's gradient comes from its first expert alone."""

    name = "gradient-of-the-first-expert"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        one = ops.experts(x, gate_up, down, ids[:, :1], weights[:, :1], first)
        rest = ops.experts(x.detach(), gate_up, down, ids[:, 1:], weights[:, 1:], first)
        return one + rest


class WeightsScaledInPlace(Backend):
    """Halves the routing weights where they lie, to save an allocation."""

    name = "weights-scaled-in-place"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        weights *= 0.5
        return ops.experts(x, gate_up, down, ids, 2 * weights, first)
