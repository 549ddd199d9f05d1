"""Balance: the auxiliary loss and the imbalance score against the paper's formulas in plain loops,
and MoGE's promise that a device that owns whole groups gets a load known from T alone.
"""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moge_hal.ops import route
from moge_hal.router import RouteSpec, auxiliary_loss, device_load, expert_load, imbalance_score

quick = settings(max_examples=40, deadline=None)
counts = st.integers(1, 5)


def logits(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"groups": 0}, "groups=0"),
        ({"k": 0}, "k=0"),
        ({"score": "relu"}, "'relu' must be 'softmax' or 'sigmoid'"),
        ({"k": 6}, "k=6 must be a multiple of groups=4"),
        ({"limit_groups": 5}, r"limit_groups=5 must be in 1..groups=4"),
        ({"limit_groups": 0}, r"limit_groups=0 must be in 1..groups=4"),
    ],
)
def test_a_route_that_cannot_be_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RouteSpec(**{"groups": 4, "k": 8, **wrong})
    RouteSpec(4, 8)


@quick
@given(seed=st.integers(0, 2**32 - 1), layers=counts, tokens=counts, groups=counts, k=counts)
def test_auxiliary_loss_is_the_papers(
    seed: int, layers: int, tokens: int, groups: int, k: int
) -> None:
    members = k + 2
    experts = groups * members
    z = logits(seed, layers, tokens, experts).requires_grad_()
    ids = torch.stack([route(layer, RouteSpec(groups, groups * k))[0] for layer in z])
    total, grad = 0.0, torch.zeros_like(z)
    for layer, rows in enumerate(z.tolist()):
        exps = [[math.exp(x) for x in row] for row in rows]
        scores = [[e / sum(row) for e in row] for row in exps]
        chosen = Counter(e for row in ids[layer].tolist() for e in row)
        f = [experts / (groups * k * tokens) * chosen[i] for i in range(experts)]
        for row, score in enumerate(scores):
            weighed = sum(f[i] * score[i] for i in range(experts))
            total += 0.01 * weighed / tokens / layers
            for i in range(experts):  # f counts, so only the mean score carries a gradient
                slope = score[i] * (f[i] - weighed)
                grad[layer, row, i] = 0.01 * slope / tokens / layers
    loss = auxiliary_loss(z, ids, 0.01)
    assert loss.item() == pytest.approx(total, rel=1e-12)
    loss.backward()
    assert z.grad is not None
    assert (z.grad - grad).abs().max() < 1e-13


def test_even_routing_costs_alpha_whatever_the_logits() -> None:
    ids = torch.stack([torch.randperm(12).view(4, 3) for _ in range(2)])
    assert auxiliary_loss(logits(0, 2, 4, 12), ids, 0.25).item() == pytest.approx(0.25, rel=1e-12)
    concentrated = torch.zeros(2, 4, 12)
    concentrated[..., :3] = 5
    assert auxiliary_loss(concentrated, torch.arange(3).expand(2, 4, 3), 0.25).item() > 0.9


@quick
@given(seed=st.integers(0, 2**32 - 1), layers=counts, tokens=counts, k=counts, devices=counts)
def test_loads_are_counts(seed: int, layers: int, tokens: int, k: int, devices: int) -> None:
    per_device = k + 1
    experts = devices * per_device
    z = logits(seed, layers * tokens, experts)
    ids = route(z, RouteSpec(1, k))[0].view(layers, tokens, k)
    for layer, row in enumerate(ids.tolist()):
        count = Counter(e for token in row for e in token)
        by_device = Counter(e // per_device for token in row for e in token)
        loads = [by_device[d] for d in range(devices)]
        assert expert_load(ids, experts)[layer].tolist() == [count[e] for e in range(experts)]
        assert device_load(ids, experts, devices)[layer].tolist() == loads
        score = imbalance_score(ids, experts, devices)[layer].item()
        assert score == pytest.approx((max(loads) - min(loads)) / tokens, rel=1e-15)


def test_devices_must_share_the_experts_equally() -> None:
    with pytest.raises(ValueError, match="15 experts cannot be shared equally by 4 devices"):
        device_load(torch.zeros(1, 1, dtype=torch.int32), 15, 4)


@quick
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 40),
    devices=counts,
    groups_per_device=counts,
    k=counts,
    spare=st.integers(0, 4),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
)
def test_moge_is_balanced_whatever_the_logits(
    seed: int,
    tokens: int,
    devices: int,
    groups_per_device: int,
    k: int,
    spare: int,
    scale: float,
) -> None:
    groups = devices * groups_per_device
    experts = groups * (k + spare)
    z = scale * logits(seed, tokens, experts) + torch.linspace(0, 9, experts)  # never balanced
    ids, _ = route(z, RouteSpec(groups, groups * k))
    assert device_load(ids, experts, devices).tolist() == [tokens * groups_per_device * k] * devices
    assert imbalance_score(ids, experts, devices).item() == 0.0


def test_a_conventional_router_is_not() -> None:
    """Top-8 of 64 on 8 devices with logits of no preference: one token is spread evenly with
    probability 8^8 / C(64, 8) = 0.0038; the busiest device gets 2.46 times the mean.
    """
    tokens = 40_000
    ids = route(logits(1, tokens, 64), RouteSpec(1, 8))[0][:, None]  # tokens one by one
    even = (imbalance_score(ids, 64, 8) == 0).double().mean().item()
    expected = 8**8 / math.comb(64, 8)
    assert even == pytest.approx(expected, abs=5 * math.sqrt(expected / tokens))
    busiest = device_load(ids, 64, 8).amax(-1).double().mean().item()
    assert busiest == pytest.approx(2.46, abs=0.01)
    together = ids.view(1, tokens, 8)[:, :64]
    assert imbalance_score(together, 64, 8).item() > 0.1
