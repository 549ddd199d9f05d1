"""Other ways to choose the experts and to weigh them."""

import math
from typing import Any

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.router import RouteSpec


class Grouped(Backend):
    """MoGE's router as two decisions; others' is the specification's."""

    def choose(self, logits: Tensor, spec: RouteSpec) -> Tensor:
        """ids [T, K]."""
        return ops.route(logits, spec)[0].long()

    def weigh(self, logits: Tensor, ids: Tensor) -> Tensor:
        """[T, K]: the softmax over all experts."""
        return logits.softmax(-1).gather(1, ids)

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        if spec.score != "softmax" or spec.limit_groups is not None or bias is not None:
            return ops.route(logits, spec, scale, bias)
        ids = self.choose(logits, spec)
        weights = self.weigh(logits, ids)
        if spec.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * spec.factor
        return ids.int(), weights if scale is None else weights * scale[ids]


class ArgmaxPasses(Grouped):
    """k/G passes of argmax and masking on the logits; weights by way of their logarithms."""

    name = "argmax-passes"

    def choose(self, logits: Tensor, spec: RouteSpec) -> Tensor:
        left, found = logits.reshape(len(logits), spec.groups, logits.shape[1] // spec.groups), []
        for _ in range(spec.k // spec.groups):
            found.append(left.argmax(-1, keepdim=True))
            left = left.scatter(-1, found[-1], float("-inf"))
        start = torch.arange(spec.groups, device=logits.device)[:, None] * left.shape[-1]
        return (torch.cat(found, -1) + start).flatten(1)

    def weigh(self, logits: Tensor, ids: Tensor) -> Tensor:
        return logits.log_softmax(-1).exp().gather(1, ids)


class RankByCounting(Grouped):
    """An expert's place is the number of those before it: no sort, no pass after another."""

    name = "rank-by-counting"

    def choose(self, logits: Tensor, spec: RouteSpec) -> Tensor:
        each, wanted = logits.shape[1] // spec.groups, spec.k // spec.groups
        grouped = logits.reshape(len(logits), spec.groups, each).nan_to_num(nan=-math.inf)
        here, there = grouped[..., None], grouped[..., None, :]
        index = torch.arange(each)
        before = (there > here) | (there == here) & (index < index[:, None])
        place = before.sum(-1)
        slots = torch.zeros(len(logits), spec.groups, each, dtype=torch.long)
        slots = slots.scatter(-1, place, index.expand_as(place))[..., :wanted]
        return (slots + torch.arange(spec.groups)[:, None] * each).flatten(1)


class RankByScores(Grouped):
    """Ranks what the softmax gives, as the paper words it: where that is 0, so are the weights."""

    name = "rank-by-scores"

    def choose(self, logits: Tensor, spec: RouteSpec) -> Tensor:
        return ops.route(logits.softmax(-1), spec)[0].long()


class LogSumExp(Grouped):
    """exp(x - log(sum(exp(x)))): its exponent rounds at the size of the logits."""

    name = "log-sum-exp"

    def weigh(self, logits: Tensor, ids: Tensor) -> Tensor:
        return (logits.gather(1, ids) - logits.logsumexp(-1, keepdim=True)).exp()


class PowersOfTwo(Grouped):
    """A softmax in powers of two, as chips without another exponential compute it."""

    name = "powers-of-two"

    def weigh(self, logits: Tensor, ids: Tensor) -> Tensor:
        powers = logits * math.log2(math.e)
        powers = (powers - powers.amax(-1, keepdim=True)).exp2()
        return powers.gather(1, ids) / powers.sum(-1, keepdim=True)


class ByTheReciprocal(Grouped):
    """Groups summed first, then the groups; times the reciprocal instead of a division."""

    name = "by-the-reciprocal"

    def weigh(self, logits: Tensor, ids: Tensor) -> Tensor:
        powers = (logits - logits.amax(-1, keepdim=True)).exp()
        total = torch.stack([part.sum(-1) for part in powers.chunk(4, -1)], -1).sum(-1)
        return powers.gather(1, ids) * (1 / total)[:, None]
