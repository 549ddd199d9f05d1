"""Routers that select or weigh the wrong experts."""

from typing import Any

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.router import RouteSpec


class GlobalTopK(Backend):
    """The fast path of an engine that has a plain top-k only."""

    name = "global-top-k"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        return ops.route(logits, RouteSpec(1, spec.k), scale, bias)


class GroupsAndMembersSwapped(Backend):
    """As many groups as a group has members: invisible with 64 experts in 8 groups."""

    name = "groups-and-members-swapped"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        groups = logits.shape[1] // spec.groups
        each = -(-spec.k // groups)
        ids, weights = ops.route(logits, RouteSpec(groups, each * groups), scale, bias)
        return ids[:, : spec.k], weights[:, : spec.k]


class OffsetsByK(Backend):
    """The first expert of group g at g * K instead of g * E/G."""

    name = "offsets-by-k"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        ids, weights = ops.route(logits, spec, scale, bias)
        each = logits.shape[1] // spec.groups
        return ids // each * spec.k + ids % each, weights


class Renormalised(Backend):
    """Weights that sum to 1, as most other models have them."""

    name = "renormalised"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        ids, weights = ops.route(logits, spec, scale, bias)
        return ids, weights / weights.sum(-1, keepdim=True)


class SoftmaxInsideGroups(Backend):
    """Scores normalised over a group instead of over all experts: the same ids, other weights."""

    name = "softmax-inside-groups"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        ids, _ = ops.route(logits, spec, scale, bias)
        scores = logits.unflatten(1, (spec.groups, -1)).softmax(-1).flatten(1)
        weights = scores.gather(1, ids.long())
        return ids, weights if scale is None else weights * scale[ids]


class ScaleBeforeSelection(Backend):
    """router_scale takes part in the selection."""

    name = "scale-before-selection"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        if scale is None:
            return ops.route(logits, spec, scale, bias)
        scores = logits.softmax(-1)
        ids, _ = ops.route(scores * scale, spec)
        return ids, scores.gather(1, ids.long()) * scale[ids]


class ScaleForgotten(Backend):
    """router_scale, which the paper does not mention, left out."""

    name = "scale-forgotten"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        return ops.route(logits, spec, None, bias)


class MaximumForgotten(Backend):
    """A softmax of exp(logit), which overflows at 89."""

    name = "maximum-forgotten"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        ids, _ = ops.route(logits, spec)
        powers = logits.exp()
        weights = (powers / powers.sum(-1, keepdim=True)).gather(1, ids.long())
        return ids, weights if scale is None else weights * scale[ids]


class TiesToTheHighest(Backend):
    """On equal scores the highest index."""

    name = "ties-to-the-highest"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        flipped = logits.unflatten(1, (spec.groups, -1)).flip(-1).flatten(1)
        each = logits.shape[1] // spec.groups
        ids, _ = ops.route(flipped, spec)
        ids = ids // each * each + (each - 1 - ids % each)
        weights = logits.softmax(-1).gather(1, ids.long())
        return ids, weights if scale is None else weights * scale[ids]


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


class LowPrecisionRouter(Backend):
    """Router logits rounded to bfloat16: changes an expert for 2-3 % of a layer's tokens."""

    name = "low-precision-router"

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        return ops.router_logits(x, w).bfloat16().float()


class ScaleSignLost(Backend):
    """A kernel that keeps the logarithm of router_scale."""

    name = "scale-sign-lost"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        return ops.route(logits, spec, None if scale is None else scale.abs(), bias)
