"""How tokens choose experts: the one description of every router, its training loss and the measure
of its balance.

MoGE (arXiv 2505.21411): experts 0..E-1 are cut into G contiguous groups of E/G, and every token
takes exactly K/G experts in each group. A device that owns whole groups therefore computes exactly
T*K/devices (token, expert) rows: its load is known from T alone. A conventional router (groups=1)
and DeepSeek-V3's (limit_groups) are the same description with other numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RouteSpec:
    """What a router selects and how it weighs it.

    groups: contiguous groups of equal size that the experts are cut into. k: experts per token in
    all. MoGE takes k/groups in every group. score: "softmax" over ALL experts, or "sigmoid" of each
    logit. limit_groups: None = the same number in every group (MoGE; a plain top-k when groups is
    1). A number n = DeepSeek-V3:
        only the n best groups (by the sum of their two best scores) compete, and k are taken among
        all that they hold.
    renormalise: divide a token's weights by their sum. MoGE does not: its weights sum to less than
    1. factor: multiplies every weight, after renormalising.
    """

    groups: int
    k: int
    score: str = "softmax"
    limit_groups: int | None = None
    renormalise: bool = False
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.groups < 1 or self.k < 1:
            raise ValueError(f"RouteSpec: groups={self.groups} and k={self.k} must be at least 1")
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"RouteSpec: score={self.score!r} must be 'softmax' or 'sigmoid'")
        if self.limit_groups is None and self.k % self.groups:
            raise ValueError(f"RouteSpec: k={self.k} must be a multiple of groups={self.groups}")
        if self.limit_groups is not None and not 1 <= self.limit_groups <= self.groups:
            raise ValueError(
                f"RouteSpec: limit_groups={self.limit_groups} must be in 1..groups={self.groups}"
            )


def auxiliary_loss(router_logits: Tensor, ids: Tensor, alpha: float) -> Tensor:
    """The load-balancing loss of the MoGE paper: alpha * sum_i f_i p_i, averaged over layers.

    router_logits [L, T, E]; ids [L, T, K]. f_i = E/(K T) * (tokens that chose expert i), p_i = the
    mean over tokens of the softmax over ALL experts, before selection. Perfectly even routing gives
    alpha. Only p carries a gradient.
    """
    experts = router_logits.shape[-1]
    probabilities = router_logits.softmax(-1).mean(1)
    counts = expert_load(ids, experts).to(probabilities.dtype)
    fractions = counts * (experts / counts.sum(-1, keepdim=True))
    return alpha * (fractions * probabilities).sum(-1).mean()


def expert_load(ids: Tensor, experts: int) -> Tensor:
    """How many (token, expert) rows each expert got: ids [..., T, K] -> counts [..., E] int64."""
    flat = ids.flatten(-2).long()
    ones = torch.ones_like(flat)
    return torch.zeros(*flat.shape[:-1], experts, dtype=torch.int64, device=ids.device).scatter_add(
        -1, flat, ones
    )


def device_load(ids: Tensor, experts: int, devices: int) -> Tensor:
    """Rows that each of `devices` gets when expert i lives on device i // (E/devices): [..., T, K]
    -> [..., devices].
    """
    if experts % devices:
        raise ValueError(f"{experts} experts cannot be shared equally by {devices} devices")
    load: Tensor = expert_load(ids, experts).unflatten(-1, (devices, experts // devices)).sum(-1)
    return load


def imbalance_score(ids: Tensor, experts: int, devices: int) -> Tensor:
    """The paper's imbalance score (max_i T_i - min_i T_i) / T over devices i; 0 = perfectly even.
    ids [..., T, K] -> [...].
    """
    load = device_load(ids, experts, devices)
    return (load.amax(-1) - load.amin(-1)).double() / ids.shape[-2]
