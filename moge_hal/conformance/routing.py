"""The judgement of routes: by margin, never by equality of ids.

Two kernels that both round correctly may prefer different experts where scores are closer than
rounding can tell. So an id is right if its float64 score is at least the k-th best of its group,
less what the limit allows; and the weights are judged for the ids that the backend did choose.
Exact ties are another property (`route.ties`): there ids are compared.
"""

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.conformance.inputs import Args
from moge_hal.conformance.limits import worst_row
from moge_hal.conformance.oracle import weights_for, widen
from moge_hal.conformance.verdict import Failure, Verdict
from moge_hal.router import RouteSpec

_SMALLEST = torch.finfo(torch.float32).tiny  # below it a float32 score may be zero


def check_structure(ids: Tensor, spec: RouteSpec, experts: int, where: str = "") -> None:
    """ids [T, K]: in range, distinct, for MoGE k/G of every group, group by group; or `Failure`."""
    chosen = ids.long()
    if chosen.numel() == 0:
        return
    if int(chosen.min()) < 0 or int(chosen.max()) >= experts:
        raise Failure(f"{where}ids {int(chosen.min())} .. {int(chosen.max())} of {experts} experts")
    twice = (chosen.sort(-1).values.diff(dim=-1) == 0).any(-1)
    if bool(twice.any()):
        row = int(twice.nonzero()[0])
        raise Failure(f"{where}row {row} has an expert twice: {chosen[row].tolist()}")
    if spec.limit_groups is None:
        owner = torch.arange(spec.groups).repeat_interleave(spec.k // spec.groups)
        wrong = (chosen // (experts // spec.groups) != owner).any(-1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            each = spec.k // spec.groups
            rule = f"must have {each} of each of {spec.groups} groups, group by group"
            raise Failure(f"{where}row {row} {rule}: {chosen[row].tolist()}")


def check_route(args: Args, ids: Tensor, weights: Tensor, limit: float, where: str = "") -> Verdict:
    """ids and weights [T, K] for the arguments of `route`. Raises `Failure`."""
    wide = widen(args)
    logits, spec, scale, bias = wide["logits"], wide["spec"], wide["scale"], wide["bias"]
    ids = ids.cpu()
    check_structure(ids, spec, logits.shape[1], where)
    if ids.numel() == 0:
        return Verdict(0.0, limit)
    check_best(ids, _scores(logits, spec), bias, spec, limit, where)
    error = worst_row(weights, weights_for(ids, logits, spec, scale))
    if error > limit:
        raise Failure(f"{where}weights are not those of the chosen experts", error, limit)
    return Verdict(error, limit)


def _scores(logits: Tensor, spec: RouteSpec) -> Tensor:
    """The specification's scores of all experts: their weights if it has to take them all."""
    ids, weights = ops.route(logits, RouteSpec(1, logits.shape[1], spec.score))
    return torch.zeros_like(logits).scatter(1, ids.long(), weights)


def check_best(
    ids: Tensor,
    scores: Tensor,
    bias: Tensor | None,
    spec: RouteSpec,
    limit: float,
    where: str = "",
) -> None:
    """Each id at least the k-th best of those it competes with, within the slack; best first.

    ids [T, K] that `check_structure` accepts; scores [T, E] and bias [E] are float64.
    """
    ids, rank = ids.long(), scores if bias is None else scores + bias
    # Adding a bias rounds to the steps of the sum, coarser than those of a small score.
    unit = rank.abs() if bias is None else rank.abs() + 1
    slack = unit * limit + _SMALLEST
    tokens, experts = rank.shape
    grouped = rank.view(tokens, spec.groups, -1)
    if spec.limit_groups is None:
        each = spec.k // spec.groups
        bar = grouped.topk(each, -1).values[..., -1].repeat_interleave(each, 1)
        blocks = rank.gather(1, ids).view(tokens, spec.groups, each)
    else:
        open_groups = torch.zeros(tokens, spec.groups, dtype=torch.bool)
        open_groups = open_groups.scatter(1, ids // (experts // spec.groups), True)
        if int(open_groups.sum(1).max()) > spec.limit_groups:
            raise Failure(f"{where}ids of more than {spec.limit_groups} groups")
        pairs = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        least = pairs.topk(spec.limit_groups, -1).values[:, -1:]
        behind = (least - pairs - 2 * slack.amax(1, keepdim=True))[open_groups]
        if bool((behind > 0).any()):
            raise Failure(
                f"{where}ids of a group that is not among the best", float(behind.max()), limit
            )
        field = grouped.masked_fill(~open_groups[..., None], -torch.inf).flatten(1)
        bar = field.topk(spec.k, -1).values[:, -1:].expand(-1, spec.k)
        blocks = rank.gather(1, ids).view(tokens, 1, spec.k)
    allowed = slack.gather(1, ids)
    _refuse_gap(
        bar - rank.gather(1, ids), allowed, f"{where}an expert is not among the best", limit
    )
    rise = blocks.diff(dim=-1).clamp_min(0).flatten(1)
    room = allowed.view(blocks.shape)[..., 1:].flatten(1)
    _refuse_gap(rise, room, f"{where}experts do not come best first", limit)


def _refuse_gap(gap: Tensor, allowed: Tensor, reason: str, limit: float) -> None:
    if gap.numel() and bool((gap > allowed).any()):
        raise Failure(reason, float((gap / allowed).max()) * limit, limit)
