"""The rule of the limits, its inputs and its oracle."""

import math

import numpy as np
import pytest
import torch

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.conformance.cases import parse
from moge_hal.conformance.inputs import draw, integers, normal, order, signs, uniform, words
from moge_hal.conformance.judge import allowances, check
from moge_hal.conformance.limits import limit, worst_row
from moge_hal.conformance.oracle import Permuted, exact, run, weights_for
from moge_hal.conformance.routing import check_route
from moge_hal.conformance.verdict import Failure
from moge_hal.router import RouteSpec


def test_the_rule_is_that_of_the_documentation() -> None:
    assert limit(0.0, torch.float32, 0) == 2**-24 + 4 * 2**-23
    assert limit(1e-6, torch.float32, 64) == pytest.approx(2e-6 + 2**-24 + 8 * 2**-23)
    assert limit(0.01, torch.bfloat16, 16) == pytest.approx(0.02 + 2**-8 + 6 * 2**-23)
    assert limit(0.01, torch.float16, 16, factor=3) == pytest.approx(0.03 + 2**-11 + 6 * 2**-23)


def test_the_error_is_that_of_the_worst_row() -> None:
    want = torch.tensor([[1.0, -100.0], [0.5, 0.25], [0.0, 0.0]]).double()
    got = want.clone()
    assert worst_row(got.float(), want) == 0
    got[0, 0] += 1
    assert worst_row(got, want) == pytest.approx(1 / 100)
    got[1, 1] += 0.1
    assert worst_row(got, want) == pytest.approx(0.1 / 0.5)
    assert worst_row(got, want, pooled=True) == pytest.approx(1 / 100)
    got[2, 0] = 1e-6  # zeros must be answered with zeros
    assert worst_row(got, want) > 1
    got[2, 0] = math.nan
    assert worst_row(got, want) == math.inf
    assert worst_row(torch.zeros(0, 3), torch.zeros(0, 3).double()) == 0


def test_inputs_are_the_same_bits_everywhere() -> None:
    """Literals from one machine: whatever changes them changes every case of every report."""
    assert words("x", 2).tolist() == [2822011116081727270, 8353962375907353375]
    assert normal("x", 2).tolist() == [-0.43182373046875, -1.2615966796875]
    assert uniform("x", 1).tolist() == [0.15298157930374146]
    assert signs("x", 4).tolist() == [-1.0, 1.0, -1.0, 1.0]
    assert integers("x", 4, low=-2, high=3).tolist() == [-2, -2, 0, 2]
    assert order("x", 5).tolist() == [4, 0, 1, 3, 2]
    x = draw(parse("linear/f32/T1-I4-O2/scale0.01/value"))["x"]
    assert x.tolist() == [
        [-0.010079651139676571, -0.014012145809829235, -0.012957152910530567, 0.0057958983816206455]
    ]


def test_normal_is_nearly_normal_and_exact_in_float32() -> None:
    x = normal("spread", 100_000)
    assert torch.equal(x.float().double(), x)
    assert abs(float(x.mean())) < 0.02 and float(x.std()) == pytest.approx(1.155, abs=0.01)
    assert float(x.abs().max()) <= 4
    inside = float((x.abs() < x.std()).double().mean())
    assert inside == pytest.approx(0.683, abs=0.02)


def test_the_property_and_the_order_of_drawing_do_not_change_inputs() -> None:
    first, other = (
        parse("linear/f32/T3-I8-O4/scale1/value"),
        parse("linear/f32/T3-I8-O4/scale1/nan"),
    )
    assert torch.equal(draw(first)["w"], draw(other)["w"])
    assert not torch.equal(
        draw(first)["w"], draw(parse("linear/f32/T3-I8-O4-seed1/scale1/value"))["w"]
    )
    assert not torch.equal(draw(first)["w"][0], draw(first)["w"][1])


@pytest.mark.parametrize(
    "case",
    [
        "linear/f32/T7-I40-O24/scale1/value",
        "rms_norm/f32/T7-D40/scale1/value",
        "attention/f32/B2-S9-H6-Hkv2-d8/scale1/value",
        "router_logits/f32/T7-D40-E15/scale1/value",
        "experts/f32/T7-D40-F24-E15-G3-K6/scale1/value",
    ],
)
def test_a_permuted_peer_computes_the_same_otherwise(case: str) -> None:
    """In float64 it is the specification, in float32 it rounds otherwise, else p says nothing."""
    parsed = parse(case)
    args = draw(parsed)
    permuted, plain = Permuted(parsed.key), Backend()
    wide = {
        n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
        for n, v in args.items()
    }
    torch.testing.assert_close(
        run(permuted, parsed.op, wide)[0], exact(parsed.op, args)[0], rtol=1e-12, atol=1e-12
    )
    assert not torch.equal(run(permuted, parsed.op, args)[0], run(plain, parsed.op, args)[0])


def test_the_oracle_works_in_float64() -> None:
    args = draw(parse("experts/bf16/T7-D40-F24-E15-G3-K6/scale1/value"))
    assert args["x"].dtype == torch.bfloat16
    (out,) = exact("experts", args)
    assert out.dtype == torch.float64
    assert not torch.equal(out.float().double(), out)


def test_weights_for_chosen_ids_are_those_of_the_specification() -> None:
    logits, scale = normal("logits", 9, 15), uniform("scale", 15)
    for spec in (RouteSpec(3, 6), RouteSpec(1, 4), RouteSpec(5, 6, "sigmoid", 3, True, 2.5)):
        ids, weights = ops.route(logits, spec, scale)
        flipped = ids.flip(1)
        assert torch.equal(weights_for(flipped, logits, spec, scale), weights.flip(1))
    ids, _ = ops.route(logits, RouteSpec(3, 6), scale)
    worse = ids.clone()
    worse[:, 0] = (ids[:, 0] + 1) % 5  # another of the first group
    swapped = weights_for(worse, logits, RouteSpec(3, 6), scale)
    alone = logits.softmax(-1) * scale
    free = worse[:, 0] != worse[:, 1]
    assert torch.equal(swapped[free], alone.gather(1, worse.long())[free])


def _route_args(spec: RouteSpec, experts: int) -> dict[str, object]:
    return {"logits": normal("r", 9, experts).float(), "spec": spec, "scale": None, "bias": None}


def test_routes_are_judged_by_margin() -> None:
    """A near-tie may go either way, a clear choice may not."""
    spec = RouteSpec(1, 1)
    args = {**_route_args(spec, 3), "logits": torch.tensor([[1.0, 1.0 + 1e-7, -1.0]])}
    weight = args["logits"].softmax(-1)[:, :1]  # type: ignore[attr-defined]
    for choice in (0, 1):
        check_route(args, torch.tensor([[choice]]).int(), weight, 1e-6)
    with pytest.raises(Failure, match="not among the best"):
        check_route(args, torch.tensor([[2]]).int(), weight, 1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ids: ids.index_fill(1, torch.tensor([1]), 15), "of 15 experts"),
        (lambda ids: ids[:, [0, 0, 2, 3, 4, 5]], "twice"),
        (lambda ids: ids[:, [2, 1, 0, 3, 4, 5]], "group by group"),
        (lambda ids: ids[:, [1, 0, 2, 3, 4, 5]], "best first"),
    ],
)
def test_what_is_wrong_with_routes_is_said(change: object, reason: str) -> None:
    args = _route_args(RouteSpec(3, 6), 15)
    ids, weights = ops.route(args["logits"], RouteSpec(3, 6))  # type: ignore[arg-type]
    check_route(args, ids, weights, 1e-6)
    with pytest.raises(Failure, match=reason):
        check_route(args, change(ids), weights, 1e-6)  # type: ignore[operator]


def test_limited_routes_of_too_many_or_of_worse_groups_are_refused() -> None:
    limited = RouteSpec(5, 6, "sigmoid", 3)
    args = _route_args(limited, 20)
    logits = args["logits"]
    assert isinstance(logits, torch.Tensor)
    check_route(args, *ops.route(logits, limited), 1e-6)
    with pytest.raises(Failure, match="more than 3 groups"):
        check_route(args, *ops.route(logits, RouteSpec(1, 6, "sigmoid")), 1e-6)
    by_best = logits.view(9, 5, 4).amax(-1).topk(3).indices  # the best one, not the two best
    kept = torch.full((9, 5), -math.inf).scatter(1, by_best, 0.0).repeat_interleave(4, 1)
    ids, weights = ops.route(logits + kept, RouteSpec(1, 6, "sigmoid"))
    with pytest.raises(Failure, match="group that is not among the best"):
        check_route(args, ids, weights, 1e-6)


def test_shape_and_dtype_of_an_output_are_judged() -> None:
    case = parse("linear/f32/T3-I8-O4/scale1/value")
    right = run(Backend(), "linear", draw(case))
    check(case, right)
    for wrong in (right[0][:2], right[0].double(), right[0].T):
        with pytest.raises(Failure, match="must be"):
            check(case, (wrong,))
    with pytest.raises(Failure, match="2 outputs instead of 1"):
        check(case, right * 2)


def test_a_softmax_router_may_lose_what_its_logits_lose() -> None:
    loud, usual, sigmoid = (
        allowances(parse(f"route/f32/T17-{shape}/{scale}/route.valid"))[1].limit
        for shape, scale in [
            ("E15-G3-K6", "scale30"),
            ("E15-G3-K6", "scale1"),
            ("E20-G4-K6-limit2", "scale30"),
        ]
    )
    assert 60 * 2**-23 < loud < 140 * 2**-23
    assert max(usual, sigmoid) < 20 * 2**-23


def test_low_precision_gets_its_own_limit() -> None:
    exact32, rounded = (
        allowances(parse(f"linear/{dtype}/T7-I40-O24/scale1/value"))[0] for dtype in ("f32", "bf16")
    )
    assert exact32.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert exact32.limit < 2e-6 < 2**-8 < rounded.limit < 0.03


def test_the_generator_is_philox() -> None:
    """The published known answer of Philox 4x64-10 for a key and a counter of zero (Random123)."""
    before_zero = 2**256 - 1  # numpy counts up before it draws
    assert np.random.Philox(key=0, counter=before_zero).random_raw(1)[0] == 0x16554D9ECA36314C
