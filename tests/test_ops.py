"""What the specification promises besides its values, which `test_second_oracle.py` compares with a
second oracle: caches, dtypes, NaN that stays where it is, errors, gradients.

Letters as in `ops.py`.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import second_oracle as second
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from moge_hal import ops
from moge_hal.cache import Cache, LayerCache
from moge_hal.router import RouteSpec

NAN = float("nan")
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 9)
quick = settings(max_examples=25, deadline=None)


def random(seed: int) -> Callable[..., Tensor]:
    """Float64 Gaussians, never zeros: random(seed)(3, 5)."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def same(got: Tensor, expected: Any) -> None:
    assert (got.dtype, got.shape) == (torch.float64, np.shape(expected))
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@quick
@given(
    seed=seeds,
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    kv=st.integers(1, 3),
    shared=st.integers(1, 3),
    half=st.integers(1, 4),
    data=st.data(),
)
def test_attention(
    seed: int, lengths: list[int], kv: int, shared: int, half: int, data: st.DataObject
) -> None:
    """Ragged rows, padded anywhere with NaN, in one call without a cache and in two with one, whose
    slots hold NaN until they are written.
    """
    rand, heads, size = random(seed), kv * shared, 2 * half
    rows = [(rand(n, heads, size), rand(n, kv, size), rand(n, kv, size)) for n in lengths]
    expected = []
    for n, row in zip(lengths, rows, strict=True):
        query, key, value = (x.numpy()[None] for x in row)
        expected.append(second.attention(query, key, value, None, np.arange(n)[None])[0][0])

    def call(cache: LayerCache | None, spans: list[tuple[int, int]]) -> None:
        """Tokens spans[b] = [start, stop) of every row b, in a random one of the columns."""
        width = max(stop - start for start, stop in spans) + data.draw(st.integers(0, 2))
        columns = [
            sorted(data.draw(st.permutations(range(width)))[: stop - start])
            for start, stop in spans
        ]
        positions = torch.full((len(rows), width), -1)
        q = torch.full((len(rows), width, heads, size), NAN, dtype=torch.float64)
        k, v = (torch.full((len(rows), width, kv, size), NAN, dtype=torch.float64) for _ in "kv")
        for b, (start, stop) in enumerate(spans):
            positions[b, columns[b]] = torch.arange(start, stop)
            for padded, x in zip((q, k, v), rows[b], strict=True):
                padded[b, columns[b]] = x[start:stop]
        out, _ = ops.attention(q, k, v, cache, positions)
        assert out.isfinite().all()
        for b, (start, stop) in enumerate(spans):
            same(out[b, columns[b]], expected[b][start:stop])

    call(None, [(0, n) for n in lengths])
    capacity = max(lengths) + 1
    cache = Cache.zeros(1, len(rows), capacity, kv, size, torch.float64, torch.device("cpu"))
    layer = cache.layers[0]
    for slots in layer:
        slots.fill_(NAN)
    halves = [data.draw(st.integers(0, n)) for n in lengths]
    call(layer, [(0, h) for h in halves])
    call(layer, [(h, n) for h, n in zip(halves, lengths, strict=True)])
    for b, (n, (_, k, v)) in enumerate(zip(lengths, rows, strict=True)):
        same(layer.k[b, :n], k.numpy())  # position p in slot p, and nothing beyond the last
        same(layer.v[b, :n], v.numpy())
        assert layer.k[b, n:capacity].isnan().all()


def test_attention_in_float16_does_not_overflow() -> None:
    """q k of 115,200 is beyond float16; divided by sqrt(d) it is 10,182 and is not."""
    q = torch.full((1, 2, 1, 128), 30.0).half()
    v = torch.tensor([1.0, 2.0]).half().view(1, 2, 1, 1).expand(q.shape)
    out, _ = ops.attention(q, q, v, None, torch.arange(2)[None])
    assert out[0, :, 0, 0].tolist() == [1.0, 1.5]


def test_router_logits_are_float32_at_least_even_under_autocast() -> None:
    rand = random(2)
    x, w = rand(5, 301), rand(9, 301)
    same(ops.router_logits(x, w), x.numpy() @ w.numpy().T)
    narrow, narrow_w = x.bfloat16(), w.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = ops.router_logits(narrow, narrow_w)
    assert logits.dtype == torch.float32
    exact = narrow.double() @ narrow_w.double().T
    assert (logits.double() - exact).abs().max() < 1e-4  # in bfloat16 it would be 5e-2


SPECS = [
    RouteSpec(4, 8),
    RouteSpec(1, 5),
    RouteSpec(4, 5, "sigmoid", 2, renormalise=True, factor=2.5),
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_router_row_of_nan_stays_in_its_row(spec: RouteSpec) -> None:
    logits = random(3)(3, 12)
    expected_ids, expected_weights = ops.route(logits, spec)
    logits[1] = NAN
    ids, weights = ops.route(logits, spec)
    assert torch.equal(ids[::2], expected_ids[::2])
    assert torch.equal(weights[::2], expected_weights[::2])
    assert weights[1].isnan().all()
    assert len(set(ids[1].tolist())) == spec.k  # still ids of experts, each at most once
    assert set(ids[1].tolist()) <= set(range(12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_underflow_or_saturate_still_rank(dtype: torch.dtype) -> None:
    """exp(-111) is 0 in float32 and sigmoid(30) is 1, but the logits are not equal: no ties."""
    low, high = torch.tensor([[0, 1, -120, -110]]), torch.tensor([[20, 30]])
    assert ops.route(low.to(dtype), RouteSpec(2, 2))[0].tolist() == [[1, 3]]
    assert ops.route(high.to(dtype), RouteSpec(1, 1, "sigmoid"))[0].tolist() == [[1]]


@pytest.mark.parametrize(
    ("experts", "spec"),
    [(5, RouteSpec(2, 2)), (4, RouteSpec(2, 6)), (8, RouteSpec(4, 4, limit_groups=1))],
)
def test_an_impossible_choice_is_an_error(experts: int, spec: RouteSpec) -> None:
    """Not fewer ids than asked for, nor some of groups that lost."""
    with pytest.raises(ValueError, match=f"cannot choose among {experts} experts"):
        ops.route(random(8)(3, experts), spec)


def experts_case(tokens: int = 5, count: int = 6) -> tuple[Tensor, ...]:
    """x [T, 7], gate_up [E, 6, 7], down [E, 7, 3], ids [T, 3], weights [T, 3]."""
    rand = random(4)
    generator = torch.Generator().manual_seed(4)
    ids = torch.stack([torch.randperm(count, generator=generator)[:3] for _ in range(tokens)])
    return rand(tokens, 7), rand(count, 6, 7), rand(count, 7, 3), ids.int(), rand(tokens, 3)


@pytest.mark.parametrize("cuts", [[0, 2, 6], [0, 1, 3, 6], [0, 0, 6]])
def test_the_sum_over_ranks_is_the_whole(cuts: list[int]) -> None:
    x, gate_up, down, ids, weights = experts_case()
    ranks = [
        ops.experts(x, gate_up[a:b], down[a:b], ids, weights, first=a) for a, b in pairwise(cuts)
    ]
    same(torch.stack(ranks).sum(0), ops.experts(x, gate_up, down, ids, weights).numpy())


def test_an_expert_that_nobody_chose_may_hold_nan() -> None:
    x, gate_up, down, ids, weights = experts_case()
    ids = torch.where(ids == 2, 5, ids)
    expected = ops.experts(x, gate_up, down, ids, weights)
    gate_up[2], down[2] = NAN, NAN
    same(ops.experts(x, gate_up, down, ids, weights), expected.numpy())


def listed(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_stay_and_are_near(dtype: torch.dtype) -> None:
    """Outputs have the dtype of the inputs, but for the router's, which are float32."""
    rand = random(5)
    x, gate_up, down, ids, weights = experts_case()
    q, k, v = rand(2, 3, 4, 6), rand(2, 3, 2, 6), rand(2, 3, 2, 6)
    angle, w = rand(2, 3, 3), rand(7)
    positions = torch.arange(3).expand(2, 3)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (ops.embed, (torch.tensor([3, 0]), gate_up[0])),
        (ops.linear, (x, gate_up[0], rand(6))),
        (ops.rms_norm, (x, w, 1e-5)),
        (ops.add_rms_norm, (x, rand(5, 7), w, 1e-5)),
        (lambda q, k: ops.rotary(q, k, angle.cos().float(), angle.sin().float()), (q, k)),
        (lambda q, k, v: ops.attention(q, k, v, None, positions)[0], (q, k, v)),
        (ops.swiglu_ffn, (x, gate_up[0], down[0])),
        (lambda x, g, d: ops.experts(x, g, d, ids, weights.float()), (x, gate_up, down)),
    ]
    for function, args in calls:
        floats = [isinstance(a, Tensor) and a.is_floating_point() for a in args]
        narrow = [a.to(dtype) if f else a for a, f in zip(args, floats, strict=True)]
        wide = [a.double() if f else a for a, f in zip(narrow, floats, strict=True)]
        for got, exact in zip(*(listed(function(*a)) for a in (narrow, wide)), strict=True):
            assert got.dtype == dtype
            limit = 4 * torch.finfo(dtype).eps * exact.double().abs().max()
            assert (got.double() - exact.double()).abs().max() <= limit
    logits = ops.router_logits(x.to(dtype), gate_up[0].to(dtype))
    assert logits.dtype == ops.route(logits, RouteSpec(3, 3), rand(6).to(dtype))[1].dtype
    assert logits.dtype == torch.float32


def test_gradients_are_those_of_finite_differences() -> None:
    rand = random(6)
    x, gate_up, down, ids, weights = experts_case(3, 4)
    q, k, v = rand(2, 3, 4, 2), rand(2, 3, 2, 2), rand(2, 3, 2, 2)
    angle, positions = rand(2, 3, 1), torch.tensor([[0, 1, 2], [-1, 0, 1]])
    calls: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
        (lambda w: ops.embed(torch.tensor([2, 2, 0]), w), (rand(3, 2),)),
        (ops.linear, (rand(3, 2), rand(4, 2), rand(4))),
        (lambda x, r, w: ops.add_rms_norm(x, r, w, 1e-5), (rand(2, 5), rand(2, 5), rand(5))),
        (lambda q, k: ops.rotary(q, k, angle.cos(), angle.sin()), (q, k)),
        (lambda q, k, v: ops.attention(q, k, v, None, positions)[0], (q, k, v)),
        (ops.swiglu_ffn, (x, gate_up[0], down[0])),
        (ops.router_logits, (x, rand(4, 7))),
        (lambda x, g, d, w: ops.experts(x, g, d, ids, w), (x, gate_up, down, weights)),
    ]
    for spec in SPECS:  # logits and router_scale
        calls.append((lambda x, scale, s=spec: ops.route(x, s, scale)[1], (rand(2, 12), rand(12))))
    for function, args in calls:
        assert gradcheck(function, [a.clone().requires_grad_() for a in args])
