"""Routers that select the wrong experts. Those that weigh them wrongly: weighing.py."""

import math
from typing import Any

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.router import RouteSpec
from mutants.linear import tf32


class Spelled(Backend):
    """A right router, a method for every decision. Each mutant takes one of them wrongly."""

    name = "spelled-route"

    def scores(self, logits: Tensor, spec: RouteSpec) -> Tensor:
        """[T, E]: what the weights are taken from."""
        return logits.sigmoid() if spec.score == "sigmoid" else logits.softmax(-1)

    def order(self, logits: Tensor, scores: Tensor, scale: Any, bias: Any) -> Tensor:
        """[T, E]: what is ranked."""
        return logits if bias is None else scores + bias

    def best(self, order: Tensor, k: int) -> Tensor:
        """Indices of the k best along the last axis."""
        return order.sort(dim=-1, descending=True, stable=True).indices[..., :k]

    def by_group(self, order: Tensor, spec: RouteSpec) -> Tensor:
        """MoGE's choice: ids [T, K]."""
        best = self.best(order.unflatten(1, (spec.groups, -1)), spec.k // spec.groups)
        return (best + self.starts(order.shape[1], spec)[:, None]).flatten(1)

    def starts(self, experts: int, spec: RouteSpec) -> Tensor:
        """The first expert of every group."""
        return torch.arange(0, experts, experts // spec.groups)

    def worth(self, grouped: Tensor) -> Tensor:
        """[T, G, E/G] -> [T, G]: what groups compete with, if only some may."""
        return grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)

    def closed(self, grouped: Tensor, open_groups: Tensor) -> Tensor:
        return grouped.masked_fill(~open_groups[..., None], -math.inf)

    def limited(self, order: Tensor, spec: RouteSpec, limit: int) -> Tensor:
        """DeepSeek-V3's choice: ids [T, K]."""
        grouped = order.unflatten(1, (spec.groups, -1))
        chosen = self.best(self.worth(grouped), limit)
        open_groups = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter(1, chosen, True)
        return self.best(self.closed(grouped, open_groups).flatten(1), spec.k)

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        """[T, K]."""
        weights = scores.gather(1, ids)
        if spec.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * spec.factor
        return weights if scale is None else weights * scale[ids]

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        scores = self.scores(logits, spec)
        order = self.order(logits, scores, scale, bias)
        limit = spec.limit_groups
        ids = self.by_group(order, spec) if limit is None else self.limited(order, spec, limit)
        return ids.int(), self.weigh(scores, ids, spec, scale, bias)


class GlobalTopK(Spelled):
    """The fast path of an engine that has a plain top-k only."""

    name = "global-top-k"

    def by_group(self, order: Tensor, spec: RouteSpec) -> Tensor:
        return self.best(order, spec.k)


class GroupsAndMembersSwapped(Spelled):
    """As many groups as a group has members: invisible with 64 experts in 8 groups."""

    name = "groups-and-members-swapped"

    def by_group(self, order: Tensor, spec: RouteSpec) -> Tensor:
        groups = order.shape[1] // spec.groups
        other = RouteSpec(groups, -(-spec.k // groups) * groups)
        return super().by_group(order, other)[:, : spec.k]


class OffsetsByK(Spelled):
    """The first expert of group g at g * K instead of g * E/G: right only where the two agree."""

    name = "offsets-by-k"

    def starts(self, experts: int, spec: RouteSpec) -> Tensor:
        return (torch.arange(spec.groups) * spec.k).clamp(max=experts - experts // spec.groups)


class GroupsOfPowersOfTwo(Spelled):
    """Expert to group by a shift, as if every group had a power of two of members."""

    name = "groups-of-powers-of-two"

    def starts(self, experts: int, spec: RouteSpec) -> Tensor:
        each = experts // spec.groups
        return torch.arange(spec.groups) * (1 << (each.bit_length() - 1))


class SortedAcrossGroups(Spelled):
    """The right experts, but best first over all groups instead of group by group."""

    name = "sorted-across-groups"

    def by_group(self, order: Tensor, spec: RouteSpec) -> Tensor:
        ids = super().by_group(order, spec)
        return ids.gather(1, self.best(order.gather(1, ids), spec.k))


class GroupsBackwards(Spelled):
    """The right experts, but the last group first."""

    name = "groups-backwards"

    def by_group(self, order: Tensor, spec: RouteSpec) -> Tensor:
        ids = super().by_group(order, spec)
        return ids.view(len(ids), spec.groups, spec.k // spec.groups).flip(1).flatten(1)


class WorstFirst(Spelled):
    """The right experts of every group, but the worst of them first."""

    name = "worst-first"

    def by_group(self, order: Tensor, spec: RouteSpec) -> Tensor:
        ids = super().by_group(order, spec)
        return ids.view(len(ids), spec.groups, spec.k // spec.groups).flip(2).flatten(1)


class BestTwice(Spelled):
    """Passes of argmax that forget to mask what was found."""

    name = "best-twice"

    def best(self, order: Tensor, k: int) -> Tensor:
        return super().best(order, 1).expand(*order.shape[:-1], k)


class SecondBestMissed(Spelled):
    """Where several of a group are wanted, the second best is passed over."""

    name = "second-best-missed"

    def best(self, order: Tensor, k: int) -> Tensor:
        found = super().best(order, k + 1)
        return found[..., :k] if k == 1 else torch.cat([found[..., :1], found[..., 2:]], -1)


class LowestInGroups(Spelled):
    """The smallest scores: a comparison the wrong way round."""

    name = "lowest-in-groups"

    def by_group(self, order: Tensor, spec: RouteSpec) -> Tensor:
        return super().by_group(-order, spec)


class ByMagnitude(Spelled):
    """The largest logits whatever their sign."""

    name = "by-magnitude"

    def order(self, logits: Tensor, scores: Tensor, scale: Any, bias: Any) -> Tensor:
        return logits.abs() if bias is None else scores + bias


class ScaleBeforeSelection(Spelled):
    """router_scale takes part in the selection."""

    name = "scale-before-selection"

    def order(self, logits: Tensor, scores: Tensor, scale: Any, bias: Any) -> Tensor:
        return super().order(logits, scores, scale, bias) if scale is None else scores * scale


class ByBfloat16Logits(Spelled):
    """Ranks logits that were rounded to bfloat16; the weights are exact."""

    name = "by-bfloat16-logits"

    def order(self, logits: Tensor, scores: Tensor, scale: Any, bias: Any) -> Tensor:
        return logits.bfloat16().float() if bias is None else scores + bias


class ByFloat16Logits(Spelled):
    """Ranks logits that were rounded to float16; the weights are exact."""

    name = "by-float16-logits"

    def order(self, logits: Tensor, scores: Tensor, scale: Any, bias: Any) -> Tensor:
        return logits.half().float() if bias is None else scores + bias


class ByTf32Logits(Spelled):
    """Ranks logits of 10 bits; the weights are exact."""

    name = "by-tf32-logits"

    def order(self, logits: Tensor, scores: Tensor, scale: Any, bias: Any) -> Tensor:
        return tf32(logits) if bias is None else scores + bias


class BySharesOfTheBatch(Spelled):
    """Ranks exp(logit - the best of the batch), which underflows for most tokens."""

    name = "by-shares-of-the-batch"

    def order(self, logits: Tensor, scores: Tensor, scale: Any, bias: Any) -> Tensor:
        if bias is not None or not len(logits):
            return super().order(logits, scores, scale, bias)
        return (logits - logits.max()).exp()


class TiesToTheHighest(Spelled):
    """On equal scores the highest index."""

    name = "ties-to-the-highest"

    def best(self, order: Tensor, k: int) -> Tensor:
        return order.shape[-1] - 1 - super().best(order.flip(-1), k)


class TiesAnyhow(Spelled):
    """torch.topk, which breaks ties as its algorithm happens to."""

    name = "ties-anyhow"

    def best(self, order: Tensor, k: int) -> Tensor:
        return order.topk(k, -1).indices


class BestOfTheBatch(Backend):
    """Scores relative to the batch: what a token gets depends on who else is in it."""

    name = "best-of-the-batch"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        busy = logits.softmax(-1).sum(0) > 1.5 if len(logits) > 1 else torch.zeros(1).bool()
        return ops.route(logits - busy * 0.1, spec, scale, bias)


class NaNOutOfRange(Backend):
    """Finds nothing in a row of NaN, and says so with an index that is none."""

    name = "nan-out-of-range"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        ids, weights = ops.route(logits, spec, scale, bias)
        return ids.masked_fill(logits.isnan().any(-1, keepdim=True), -1), weights


class IdsOfSixtyFourBits(Backend):
    """Ids as torch's own indices have them, in 64 bits."""

    name = "ids-of-64-bits"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        ids, weights = ops.route(logits, spec, scale, bias)
        return ids.long(), weights


class LimitIgnored(Spelled):
    """All groups compete, however few of them may."""

    name = "limit-ignored"

    def limited(self, order: Tensor, spec: RouteSpec, limit: int) -> Tensor:
        return self.best(order, spec.k)


class GroupsByTheirBest(Spelled):
    """Groups compete by their best score instead of the sum of their two best."""

    name = "groups-by-their-best"

    def worth(self, grouped: Tensor) -> Tensor:
        return grouped.amax(-1)


class GroupsByTheirSum(Spelled):
    """Groups compete by the sum of all their scores."""

    name = "groups-by-their-sum"

    def worth(self, grouped: Tensor) -> Tensor:
        return grouped.sum(-1)


class ClosedGroupsAreZero(Spelled):
    """What a closed group holds counts as 0, which beats a score with a negative bias."""

    name = "closed-groups-are-zero"

    def closed(self, grouped: Tensor, open_groups: Tensor) -> Tensor:
        return grouped.masked_fill(~open_groups[..., None], 0.0)


class BiasForgotten(Spelled):
    """The bias takes no part in the selection."""

    name = "bias-forgotten"

    def order(self, logits: Tensor, scores: Tensor, scale: Any, bias: Any) -> Tensor:
        return logits if bias is None else scores


class IdsOf7Bits(Spelled):
    """Expert ids as signed numbers of 8 bits: right up to 127."""

    name = "ids-of-7-bits"

    def by_group(self, order: Tensor, spec: RouteSpec) -> Tensor:
        return super().by_group(order, spec) & 0x7F


class BiasForTheLimitedAlone(Spelled):
    """The bias takes part where groups are limited, and nowhere else."""

    name = "bias-for-the-limited-alone"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        return super().route(logits, spec, scale, bias if spec.limit_groups else None)
