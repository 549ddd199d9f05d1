"""The specification against slow programs: loops over tokens, heads and experts in numpy, written
from the definitions and sharing nothing with `ops.py`.

Everything is compared in float64, where a formula that differs shows at 1e-2 and one that falls to
float32 somewhere inside at 1e-8. Letters as in `ops.py`.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from moge_hal import ops
from moge_hal.cache import Cache, LayerCache
from moge_hal.router import RouteSpec

Array = npt.NDArray[np.float64]
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


# The slow programs.


def rms_norm(x: Array, w: Array, eps: float) -> Array:
    mean = [sum(float(v) ** 2 for v in row) / len(row) for row in x]
    return np.array([row / math.sqrt(m + eps) * w for row, m in zip(x, mean, strict=True)])


def rotate(x: Array, positions: npt.NDArray[np.int64], theta: float) -> Array:
    """Elements i and i + d/2 are the two parts of a complex number, turned by position *
    theta^(-2i/d).
    """
    half = x.shape[-1] // 2
    out = np.empty_like(x)
    for b, s, h in np.ndindex(*x.shape[:3]):
        for i in range(half):
            angle = int(positions[b, s]) * theta ** (-2 * i / x.shape[-1])
            turned = complex(x[b, s, h, i], x[b, s, h, i + half]) * np.exp(1j * angle)
            out[b, s, h, i], out[b, s, h, i + half] = turned.real, turned.imag
    return out


def attend(q: Array, k: Array, v: Array) -> Array:
    """One sequence, one query at a time: q [S, H, d], k and v [S, Hkv, d] -> [S, H, d]."""
    length, heads, size = q.shape
    out = np.empty_like(q)
    for s, h in np.ndindex(length, heads):
        group = h * k.shape[1] // heads
        scores = [float(np.dot(q[s, h], k[n, group])) / math.sqrt(size) for n in range(s + 1)]
        shares = [math.exp(score - max(scores)) for score in scores]
        out[s, h] = sum(p * v[n, group] for n, p in enumerate(shares)) / sum(shares)
    return out


def swiglu_ffn(x: Array, gate_up: Array, down: Array) -> Array:
    """One token: x [D], gate_up [2F, D], down [D, F]."""
    width = len(gate_up) // 2
    inner = [
        float(gate_up[i] @ x)
        / (1 + math.exp(-float(gate_up[i] @ x)))
        * float(gate_up[width + i] @ x)
        for i in range(width)
    ]
    return np.asarray(down @ np.array(inner))


def route(
    logits: Sequence[float],
    spec: RouteSpec,
    scale: Sequence[float] | None,
    bias: Sequence[float] | None,
) -> tuple[list[int], list[float]]:
    """One token, by sorting lists."""
    members = len(logits) // spec.groups
    if spec.score == "softmax":
        exps = [math.exp(x - max(logits)) for x in logits]
        scores = [e / sum(exps) for e in exps]
    else:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    rank = [s + b for s, b in zip(scores, bias, strict=True)] if bias else scores

    def best(candidates: Sequence[int], count: int) -> list[int]:
        return sorted(candidates, key=lambda e: (-rank[e], e))[:count]

    groups = [range(g * members, (g + 1) * members) for g in range(spec.groups)]
    if spec.limit_groups is None:
        ids = [e for group in groups for e in best(group, spec.k // spec.groups)]
    else:
        worth = [sum(rank[e] for e in best(group, 2)) for group in groups]
        kept = sorted(range(spec.groups), key=lambda g: (-worth[g], g))[: spec.limit_groups]
        ids = best([e for g in kept for e in groups[g]], spec.k)
    total = sum(scores[e] for e in ids) if spec.renormalise else 1.0
    scales = scale or [1.0] * len(logits)
    return ids, [scores[e] / total * spec.factor * scales[e] for e in ids]


# The specification against them.


def test_embed_and_linear() -> None:
    rand = random(0)
    w, x, b = rand(7, 5), rand(3, 5), rand(7)
    same(ops.embed(torch.tensor([6, 0, 6]), w), [w.numpy()[i] for i in (6, 0, 6)])
    product = [[sum(x[t, i] * w[o, i] for i in range(5)) for o in range(7)] for t in range(3)]
    same(ops.linear(x, w), np.array(product))
    same(ops.linear(x, w, b), np.array(product) + b.numpy())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])  # 1e-3: there the epsilon decides
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_norms(tokens: int, scale: float) -> None:
    rand = random(1)
    x, residual, w = scale * rand(tokens, 37), scale * rand(tokens, 37), rand(37)
    same(ops.rms_norm(x, w, 1e-5), rms_norm(x.numpy(), w.numpy(), 1e-5).reshape(tokens, 37))
    normed, total = ops.add_rms_norm(x, residual, w, 1e-5)
    same(total, x.numpy() + residual.numpy())
    same(normed, rms_norm(total.numpy(), w.numpy(), 1e-5).reshape(tokens, 37))


@quick
@given(seed=seeds, b=sizes, s=sizes, heads=sizes, kv=sizes, half=sizes)
def test_rotary(seed: int, b: int, s: int, heads: int, kv: int, half: int) -> None:
    rand = random(seed)
    q, k = rand(b, s, heads, 2 * half), rand(b, s, kv, 2 * half)
    positions = torch.randint(0, 5000, (b, s), generator=torch.Generator().manual_seed(seed))
    angles = positions[..., None] * 100.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    got = ops.rotary(q, k, angles.cos(), angles.sin())
    for turned, x in zip(got, (q, k), strict=True):
        same(turned, rotate(x.numpy(), positions.numpy(), 100.0))


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
    expected = [attend(*(x.numpy() for x in row)) for row in rows]

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


@quick
@given(seed=seeds, tokens=st.integers(0, 9), hidden=sizes, width=sizes)
def test_swiglu_ffn(seed: int, tokens: int, hidden: int, width: int) -> None:
    rand = random(seed)
    x, gate_up, down = rand(tokens, hidden), rand(2 * width, hidden), rand(hidden, width)
    expected = [swiglu_ffn(row, gate_up.numpy(), down.numpy()) for row in x.numpy()]
    same(ops.swiglu_ffn(x, gate_up, down), np.reshape(expected, (tokens, hidden)))


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


@settings(max_examples=150, deadline=None)
@given(data=st.data(), groups=st.integers(1, 4), members=st.integers(1, 5), tied=st.booleans())
def test_route(data: st.DataObject, groups: int, members: int, tied: bool) -> None:
    """MoGE, plain top-k and DeepSeek-V3's, every option; where `tied`, many logits are equal."""
    experts = groups * members
    limit = data.draw(st.none() | st.integers(1, groups))
    k = (
        groups * data.draw(st.integers(1, members))
        if limit is None
        else data.draw(st.integers(1, limit * members))
    )
    spec = RouteSpec(
        groups,
        k,
        data.draw(st.sampled_from(["softmax", "sigmoid"])),
        limit,
        data.draw(st.booleans()),
        data.draw(st.sampled_from([1.0, 2.5])),
    )
    rand = random(data.draw(seeds))
    # From few values, with sums that never agree by accident.
    few = st.lists(st.sampled_from([-1.3, 0.2, 0.9, 2.0]), min_size=experts, max_size=experts)
    logits = torch.tensor(data.draw(few), dtype=torch.float64)[None] if tied else rand(3, experts)
    scale = rand(experts) if data.draw(st.booleans()) else None
    bias = 0.3 * rand(experts) if data.draw(st.booleans()) else None
    ids, weights = ops.route(logits, spec, scale, bias)
    assert ids.dtype == torch.int32
    for row, got_ids, got_weights in zip(logits.tolist(), ids.tolist(), weights, strict=True):
        lists = (None if x is None else x.tolist() for x in (scale, bias))
        expected_ids, expected_weights = route(row, spec, *lists)
        assert got_ids == expected_ids
        same(got_weights, expected_weights)


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


def test_experts() -> None:
    x, gate_up, down, ids, weights = experts_case()
    expected = [
        sum(
            float(weight) * swiglu_ffn(row.numpy(), gate_up[e].numpy(), down[e].numpy())
            for e, weight in zip(row_ids, row_weights, strict=True)
        )
        for row, row_ids, row_weights in zip(x, ids.tolist(), weights, strict=True)
    ]
    same(ops.experts(x, gate_up, down, ids, weights), np.array(expected))
    same(ops.experts(x[:0], gate_up, down, ids[:0], weights[:0]), np.empty((0, 7)))


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
