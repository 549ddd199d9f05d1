"""The oracle of the suite against a second one that shares nothing with it (`second_oracle.py`).

Sizes, scales, options and padding are open; both work in float64, so 1e-12 is all they may differ
by. So must the peers that limits are measured on (`Permuted`), when they are given float64.
"""

import math
from typing import Any

import numpy as np
import pytest
import second_oracle as second
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.cache import Cache
from moge_hal.conformance.cases import parse
from moge_hal.conformance.inputs import Args, draw, fan, integers, normal, order, signs
from moge_hal.conformance.limits import worst_row
from moge_hal.conformance.oracle import Permuted, exact, run, weights_for, widen
from moge_hal.conformance.properties.caching import ragged_positions
from moge_hal.router import RouteSpec

NEAR = 1e-12
many = settings(max_examples=60, deadline=None)
sizes = st.integers(1, 11)
tokens = st.integers(0, 7)
seeds = st.integers(0, 10**9)
# Where squares overflow in float32, and where an epsilon is all that is left.
scales = st.sampled_from(["0.0000001", "0.01", "1", "30", "10000000000000000000000"])


def by_second(op: str, args: Args) -> tuple[Tensor, ...]:
    """The second oracle's outputs, as tensors."""
    arrays = {n: v.numpy() if isinstance(v, Tensor) else v for n, v in widen(args).items()}
    return tuple(torch.as_tensor(part) for part in second.OPERATIONS[op](**arrays))


def agree(op: str, args: Args, near: float = NEAR, peer: bool = True) -> None:
    want = by_second(op, args)
    answers = [exact(op, args)]
    if peer:
        answers.append(run(Permuted("second"), op, widen(args)))
    for answer in answers:
        for got, must in zip(answer, want, strict=True):
            assert got.shape == must.shape
            assert got.dtype == must.dtype
            if got.is_floating_point():
                assert worst_row(got, must) <= near
            else:
                assert torch.equal(got, must)


@many
@given(st.data(), seeds, scales)
@pytest.mark.parametrize(
    "op",
    ["embed", "linear", "rms_norm", "add_rms_norm", "rotary", "swiglu_ffn", "router_logits"],
)
def test_operations_of_one_token(op: str, data: st.DataObject, seed: int, scale: str) -> None:
    t = data.draw(tokens)
    d, e, f = (data.draw(sizes) for _ in range(3))
    shape = {
        "embed": f"T{t}-V{e}-D{d}",
        "linear": f"T{t}-I{d}-O{e}" + data.draw(st.sampled_from(["", "-nobias"])),
        "swiglu_ffn": f"T{t}-D{d}-F{f}",
        "router_logits": f"T{t}-D{d}-E{e}",
        "rotary": f"B{e % 3 + 1}-S{t}-H{f}-Hkv{d}-d{2 * e}",
    }.get(op, f"T{t}-D{d}")
    if op == "rotary":
        shape = shape.replace(f"-H{f}-", f"-H{f * d}-")
    case = parse(f"{op}/f32/{shape}-seed{seed}/scale{scale}/value")
    if op in ("linear", "router_logits") and t:
        # A sum may cancel to next to nothing, and then it has no digits left to compare.
        args = draw(case)
        whole = args["x"].double().abs() @ args["w"].double().abs().T
        left = exact(op, args)[0].abs().amax(-1) / whole.amax(-1)
        agree(op, args, NEAR / min(1.0, max(1e-9, float(left.min()))))
    else:
        agree(op, draw(case), 1e-11 if op == "swiglu_ffn" else NEAR)


@many
@given(st.data(), seeds, st.sampled_from([1e-3, 1.0, 30.0]))
def test_attention_over_anything(data: st.DataObject, seed: int, sharp: float) -> None:
    """Ragged rows in one call, and the same in chunks over a cache that was full of NaN."""
    batch, length = data.draw(st.integers(1, 3)), data.draw(tokens)
    kv, share, half = (data.draw(st.integers(1, 3)) for _ in range(3))
    shape = f"B{batch}-S{length}-H{kv * share}-Hkv{kv}-d{2 * half}-seed{seed}"
    args = dict(draw(parse(f"attention/f32/{shape}/scale1/value")))
    args["q"] = args["q"] * sharp
    count = batch * length
    flags = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    real = torch.tensor(flags, dtype=torch.bool).view(batch, length)
    args["positions"] = torch.where(real, real.cumsum(1) - 1, -1)
    (want,) = by_second("attention", args)
    near = NEAR * max(1.0, sharp)  # an error of a score is that of the softmax
    answers = [exact("attention", args)[0], run(Permuted("second"), "attention", widen(args))[0]]

    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=3)))
    room = length + data.draw(st.integers(0, 2))
    cache = Cache.zeros(1, batch, room, kv, 2 * half, torch.float64, torch.device("cpu")).layers[0]
    for slots in cache:
        slots.fill_(math.nan)
    past: second.Past = [{} for _ in range(batch)]
    parts, seconds = [], []
    for start, end in zip([0, *cuts], [*cuts, length], strict=True):
        part = {n: v[:, start:end] if isinstance(v, Tensor) else v for n, v in args.items()}
        parts.append(exact("attention", {**part, "cache": cache})[0])
        seconds.append(by_second("attention", {**part, "cache": past})[0])
    assert torch.equal(torch.cat(seconds, 1), want)
    answers.append(torch.cat(parts, 1))
    for answer in answers:
        assert answer.isfinite().all()  # padding too
        assert worst_row(answer[real].flatten(1), want[real].flatten(1)) <= near


@st.composite
def specs(draw: st.DrawFn) -> tuple[int, RouteSpec]:
    """A number of experts, and a router that can choose among them."""
    groups, members = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    limit = draw(st.none() | st.integers(1, groups))
    k = draw(st.integers(1, members if limit is None else limit * members))
    spec = RouteSpec(
        groups,
        groups * k if limit is None else k,
        draw(st.sampled_from(["softmax", "sigmoid"])),
        limit,
        draw(st.booleans()),
        draw(st.sampled_from([1.0, 2.5, 1e-3])),
    )
    return groups * members, spec


@settings(max_examples=200, deadline=None)
@given(st.data(), specs(), tokens, seeds, st.sampled_from([1e-3, 1.0, 6.0, 300.0]))
def test_route(
    data: st.DataObject, sized: tuple[int, RouteSpec], count: int, seed: int, scale: float
) -> None:
    """MoGE's, a plain top-k and DeepSeek-V3's, every option, E = G and K = E included."""
    experts, spec = sized
    biased, scaled, tied = (data.draw(st.booleans()) for _ in range(3))
    summed = biased or spec.limit_groups is not None
    if summed:
        scale = min(scale, 6.0)  # beyond, scores are 1 up to their last digit, whatever computes it
    logits = normal(f"{seed}/logits", count, experts, scale=scale)
    if tied:  # few numbers; no two sums of two of their scores are equal by accident
        logits = integers(f"{seed}/few", count, experts, low=0, high=3).double()
    bias = normal(f"{seed}/bias", experts, scale=0.25) if biased and not tied else None
    router = normal(f"{seed}/scale", experts) * signs(f"{seed}/sign", experts) if scaled else None
    args = {"logits": logits, "spec": spec, "scale": router, "bias": bias}
    # The permuted peer has another lowest index among equals, which chance may draw, too.
    distinct = bool((logits.sort(-1).values.diff(dim=-1) > 0).all())
    agree("route", args, peer=distinct)


@many
@given(specs(), st.integers(1, 5), seeds)
def test_weights_of_routes_that_somebody_else_took(
    sized: tuple[int, RouteSpec], count: int, seed: int
) -> None:
    """What the judgement by margin rests on."""
    experts, spec = sized
    logits, router = normal(f"{seed}/logits", count, experts), normal(f"{seed}/scale", experts)
    other = normal(f"{seed}/other", count, experts)
    ids, _ = exact("route", {"logits": other, "spec": spec, "scale": None, "bias": None})
    got = weights_for(ids, logits, spec, router)
    scores = second.score(logits.numpy(), spec.score)
    want = np.zeros(ids.shape)
    for t, row in enumerate(ids.tolist()):
        total = sum(scores[t, e] for e in row) if spec.renormalise else 1.0
        want[t] = [scores[t, e] / total * spec.factor * float(router[e]) for e in row]
    assert worst_row(got, torch.from_numpy(want)) <= NEAR


@many
@given(st.data(), tokens, seeds, st.sampled_from([1e-6, 1.0, 30.0]))
def test_experts(data: st.DataObject, count: int, seed: int, scale: float) -> None:
    """Any rank of any experts: `first` anywhere, ids of nobody, all of them, negative weights."""
    d, f, held, k = (data.draw(st.integers(1, 6)) for _ in range(4))
    first = data.draw(st.integers(0, 5))
    total = max(first + held, k) + data.draw(st.integers(0, 3))
    rows = [order(f"{seed}/{t}", total)[:k] for t in range(count)]
    ids = torch.stack(rows).int() if rows else torch.zeros(0, k, dtype=torch.int32)
    args: Args = {
        "x": normal(f"{seed}/x", count, d, scale=scale),
        "gate_up": normal(f"{seed}/gate_up", held, 2 * f, d, scale=fan(d)),
        "down": normal(f"{seed}/down", held, d, f, scale=fan(f)),
        "ids": ids,
        "weights": normal(f"{seed}/weights", count, k),
        "first": first,
    }
    # Experts may cancel: what is compared with is then the largest of them.
    (got,), (want,) = exact("experts", args), by_second("experts", args)
    assert got.shape == want.shape and got.dtype == torch.float64
    if count:
        each = [
            by_second("experts", {**args, "ids": ids[:, [i]], "weights": args["weights"][:, [i]]})
            for i in range(k)
        ]
        size = torch.stack([part[0].abs() for part in each]).amax((0, 1, 2)).clamp_min(1e-30)
        assert float((got - want).abs().max() / size) <= 1e-11


SMALL = {
    "embed": "T3-V5-D4",
    "linear": "T3-I4-O5",
    "rms_norm": "T3-D5",
    "add_rms_norm": "T3-D5",
    "rotary": "B2-S3-H4-Hkv2-d4",
    "attention": "B3-S12-H4-Hkv2-d4",
    "swiglu_ffn": "T3-D4-F5",
    "router_logits": "T3-D4-E6",
    "route": "T5-E12-G3-K6",
    "experts": "T5-D4-F3-E6-G3-K3",
}


def slopes(op: str, args: Args) -> None:
    """The oracle's gradients against finite differences of the second oracle."""
    wide = {n: v.clone() if isinstance(v, Tensor) else v for n, v in widen(args).items()}
    named = {n: v for n, v in wide.items() if isinstance(v, Tensor) and v.is_floating_point()}
    outputs = [
        part
        for part in run(
            Backend(), op, {**wide, **{n: v.requires_grad_() for n, v in named.items()}}
        )
        if part.is_floating_point()
    ]
    above = [normal(f"{op}/above {i}", *part.shape) for i, part in enumerate(outputs)]
    if op == "attention":  # a padding token's output is nobody's
        above[0][args["positions"] < 0] = 0
    found = torch.autograd.grad(outputs, list(named.values()), above, allow_unused=True)

    def loss(name: str, moved: Tensor) -> float:
        parts = by_second(op, {**args, name: moved})
        floats = [part for part in parts if part.is_floating_point()]
        return float(sum((a * b).sum() for a, b in zip(above, floats, strict=True)))

    for (name, value), gradient in zip(named.items(), found, strict=True):
        along = normal(f"{op}/{name}/along", *value.shape)
        step = 1e-5
        there, back = (args[name].double() + s * step * along for s in (1, -1))
        slope = (loss(name, there) - loss(name, back)) / (2 * step)
        got = 0.0 if gradient is None else float((gradient * along).sum())
        assert got == pytest.approx(slope, rel=1e-7, abs=1e-7), name


@pytest.mark.parametrize("op", SMALL)
def test_gradients_are_the_second_oracles_slopes(op: str) -> None:
    prop = "route.valid" if op == "route" else "value"
    args: dict[str, Any] = dict(draw(parse(f"{op}/f32/{SMALL[op]}/scale1/{prop}")))
    if op == "attention":
        args["positions"] = ragged_positions(3, 12)
    slopes(op, args)
    if op == "route":  # DeepSeek-V3's: the bias selects and gets no gradient
        slopes(op, draw(parse("route/f32/T5-E12-G3-K4-limit2/scale1/route.valid")))


@pytest.mark.parametrize("op", SMALL)
def test_a_difference_shows(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above could be blind."""
    right = getattr(ops, op)

    def wrong(*args: Any, **parts: Any) -> Any:
        out = right(*args, **parts)
        if isinstance(out, tuple):  # attention's cache is None here
            return tuple(part if part is None else part + part * 1e-10 for part in out)
        return out * (1 + 1e-10)

    args = draw(parse(f"{op}/f32/{SMALL[op]}/scale1/{'route.valid' if op == 'route' else 'value'}"))
    agree(op, args, peer=False)
    monkeypatch.setattr(ops, op, wrong)
    with pytest.raises(AssertionError):
        agree(op, args, peer=False)
