"""Routers that select the right experts and give them the wrong weights."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.router import RouteSpec
from mutants.routing import Spelled


class Renormalised(Spelled):
    """Weights that sum to 1, as most other models have them."""

    name = "renormalised"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(-1, keepdim=True) * spec.factor
        return weights if scale is None else weights * scale[ids]


class RenormalisedPerGroup(Spelled):
    """Weights that sum to 1 in every group: invisible where nothing but the sum is looked at."""

    name = "renormalised-per-group"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        if spec.limit_groups is not None:
            return super().weigh(scores, ids, spec, scale, bias)
        grouped = scores.gather(1, ids).view(len(ids), spec.groups, spec.k // spec.groups)
        weights = (grouped / grouped.sum(-1, keepdim=True)).flatten(1)
        return weights if scale is None else weights * scale[ids]


class RenormalisedForSeveral(Spelled):
    """Weights that sum to 1, but only where a group gives more than one expert."""

    name = "renormalised-for-several"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        weights = super().weigh(scores, ids, spec, scale, bias)
        return weights / weights.sum(-1, keepdim=True) if spec.k > spec.groups else weights


class RenormaliseForgotten(Spelled):
    """Weights are left as they are although the router is one that renormalises."""

    name = "renormalise-forgotten"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        weights = scores.gather(1, ids) * spec.factor
        return weights if scale is None else weights * scale[ids]


class FactorForgotten(Spelled):
    """Weights that are not multiplied by the router's factor."""

    name = "factor-forgotten"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        return super().weigh(scores, ids, spec, scale, bias) / spec.factor


class FactorBeforeTheSum(Spelled):
    """The factor is applied before the weights are divided by their sum, which takes it out."""

    name = "factor-before-the-sum"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        weights = scores.gather(1, ids) * spec.factor
        if spec.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights if scale is None else weights * scale[ids]


class BiasInTheWeights(Spelled):
    """The bias, which is for the selection alone, is in the weights too."""

    name = "bias-in-the-weights"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        return super().weigh(scores if bias is None else scores + bias, ids, spec, scale, bias)


class SoftmaxInsideGroups(Spelled):
    """Scores normalised over a group instead of over all experts: the same ids, other weights."""

    name = "softmax-inside-groups"

    def scores(self, logits: Tensor, spec: RouteSpec) -> Tensor:
        if spec.score == "sigmoid":
            return logits.sigmoid()
        each = logits.shape[1] // spec.groups
        return logits.reshape(len(logits), spec.groups, each).softmax(-1).flatten(1)


class SoftmaxOfTheChosen(Spelled):
    """A softmax over the chosen logits alone, as Mixtral has it."""

    name = "softmax-of-the-chosen"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        weights = scores.gather(1, ids).log().softmax(-1)
        return weights if scale is None else weights * scale[ids]


class SoftmaxInBfloat16(Spelled):
    """The softmax of the router in bfloat16."""

    name = "softmax-in-bfloat16"

    def scores(self, logits: Tensor, spec: RouteSpec) -> Tensor:
        return super().scores(logits.bfloat16(), spec).float()


class SigmoidForSoftmax(Spelled):
    """A sigmoid, as the successor of the model has it."""

    name = "sigmoid-for-softmax"

    def scores(self, logits: Tensor, spec: RouteSpec) -> Tensor:
        return logits.sigmoid()


class SoftmaxForSigmoid(Spelled):
    """A softmax, whatever the router asks for."""

    name = "softmax-for-sigmoid"

    def scores(self, logits: Tensor, spec: RouteSpec) -> Tensor:
        return logits.softmax(-1)


class MaximumForgotten(Spelled):
    """A softmax of exp(logit), which overflows at 89."""

    name = "maximum-forgotten"

    def scores(self, logits: Tensor, spec: RouteSpec) -> Tensor:
        powers = logits.exp()
        return powers / powers.sum(-1, keepdim=True)


class MaximumOfTheBatch(Spelled):
    """A softmax that subtracts the maximum of the whole batch: other tokens underflow."""

    name = "maximum-of-the-batch"

    def scores(self, logits: Tensor, spec: RouteSpec) -> Tensor:
        if not len(logits) or spec.score == "sigmoid":
            return super().scores(logits, spec)
        powers = (logits - logits.max()).exp()
        return powers / powers.sum(-1, keepdim=True)


class Temperature(Spelled):
    """Logits divided by sqrt(2) before the softmax: the same ids."""

    name = "temperature"

    def scores(self, logits: Tensor, spec: RouteSpec) -> Tensor:
        return super().scores(logits / 2**0.5, spec)


class ScaleForgotten(Spelled):
    """router_scale, which the paper does not mention, left out."""

    name = "scale-forgotten"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        return super().weigh(scores, ids, spec, None, bias)


class ScaleSignLost(Spelled):
    """A kernel that keeps the logarithm of router_scale."""

    name = "scale-sign-lost"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        return super().weigh(scores, ids, spec, None if scale is None else scale.abs(), bias)


class ScaleByPlace(Spelled):
    """router_scale of the place among the K instead of that of the expert."""

    name = "scale-by-place"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        weights = super().weigh(scores, ids, spec, None, bias)
        return weights if scale is None else weights * scale[: spec.k]


class ScaleByMember(Spelled):
    """router_scale of the index inside the group: right for the first group alone."""

    name = "scale-by-member"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        weights = super().weigh(scores, ids, spec, None, bias)
        return weights if scale is None else weights * scale[ids % (len(scale) // spec.groups)]


class ScaleTwice(Spelled):
    """router_scale applied by the router and once more by whoever comes after."""

    name = "scale-twice"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        return super().weigh(scores, ids, spec, None if scale is None else scale * scale, bias)


class WeightsBestFirst(Spelled):
    """Weights best first over all groups, beside ids that are group by group."""

    name = "weights-best-first"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        return super().weigh(scores, ids, spec, scale, bias).sort(-1, descending=True).values


class WeightsNarrow(Spelled):
    """Weights are returned in bfloat16."""

    name = "weights-narrow"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        return super().weigh(scores, ids, spec, scale, bias).bfloat16()


class WeightsRounded(Spelled):
    """Weights are rounded to bfloat16 on the way."""

    name = "weights-rounded"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        return super().weigh(scores, ids, spec, scale, bias).bfloat16().float()


class SmallWeightsAreZero(Spelled):
    """A weight below 5 % is taken for none."""

    name = "small-weights-are-zero"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        weights = super().weigh(scores, ids, spec, scale, bias)
        return weights * (weights.abs() > 0.05)


class NoGradientToTheScale(Spelled):
    """router_scale never learns."""

    name = "no-gradient-to-the-scale"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        held = None if scale is None else scale.detach()
        return super().weigh(scores, ids, spec, held, bias)


class NoGradientOfTheSum(Spelled):
    """The backward takes the softmax's denominator for a constant."""

    name = "no-gradient-of-the-sum"

    def scores(self, logits: Tensor, spec: RouteSpec) -> Tensor:
        powers = (logits - logits.amax(-1, keepdim=True)).exp()
        return powers / powers.sum(-1, keepdim=True).detach()


class GradientOfTheLastToken(Spelled):
    """The gradient of a repeated expert's scale is that of its last token, not the sum."""

    name = "gradient-of-the-last-token"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        weights = super().weigh(scores, ids, spec, None, bias)
        if scale is None:
            return weights
        factor = scale[ids]
        late = torch.ones_like(ids, dtype=torch.bool)
        for token in range(len(ids) - 1):
            late[token] = ~torch.isin(ids[token], ids[token + 1 :])
        return weights * torch.where(late, factor, factor.detach())


class LogitsOverwritten(Backend):
    """Masks the chosen logits where they lie."""

    name = "logits-overwritten"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        ids, weights = ops.route(logits, spec, scale, bias)
        logits.scatter_(1, ids.long(), float("-inf"))
        return ids, weights


class RenormaliseForSigmoidAlone(Spelled):
    """A softmax router's weights are left as they are, whatever the description says."""

    name = "renormalise-for-sigmoid-alone"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        if spec.score == "softmax":
            spec = replace(spec, renormalise=False)
        return super().weigh(scores, ids, spec, scale, bias)


class FactorForSigmoidAlone(Spelled):
    """A softmax router's weights are not multiplied by its factor."""

    name = "factor-for-sigmoid-alone"

    def weigh(self, scores: Tensor, ids: Tensor, spec: RouteSpec, scale: Any, bias: Any) -> Tensor:
        if spec.score == "softmax":
            spec = replace(spec, factor=1.0)
        return super().weigh(scores, ids, spec, scale, bias)


class GradientHalvedIfLimited(Spelled):
    """The router of limited groups learns half as fast."""

    name = "gradient-halved-if-limited"

    def scores(self, logits: Tensor, spec: RouteSpec) -> Tensor:
        half = logits / 2 + logits.detach() / 2
        return super().scores(half if spec.limit_groups else logits, spec)
