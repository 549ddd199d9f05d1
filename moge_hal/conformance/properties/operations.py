"""What every operation must keep, whatever runs it. Each says which real failures it is there for.

A property takes the backend under judgement and a case, and gives a `Verdict` or raises `Failure`;
`Skip` if it does not apply.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from moge_hal.conformance.cases import Case
from moge_hal.conformance.inputs import (
    ACTIVATIONS,
    PER_TOKEN,
    Args,
    draw,
    integers,
    signs,
    words,
)
from moge_hal.conformance.judge import allowances, check, measure, worst
from moge_hal.conformance.oracle import Outputs, exact
from moge_hal.conformance.subject import Subject, same_bits
from moge_hal.conformance.verdict import Failure, Verdict


def value(subject: Subject, case: Case) -> Verdict:
    """The right numbers, shape, dtype and device, and no input written to.

    Guards against: gate and up rows swapped; rotary embedding of neighbours instead of halves;
    key-value heads tiled instead of repeated; an epsilon outside the square root (invisible at
    scale 1); weights cut to bfloat16; tokens dropped over a capacity (the crowded shape); kernels
    that read past a stride or assume 16-byte alignment; a residual that is updated in place.
    """
    return check(case, subject.run(case, draw(case)))


def route_valid(subject: Subject, case: Case) -> Verdict:
    """k experts of every group, none worse than the k-th best within the limit, and their weights.

    Guards against: a global top-k instead of a grouped one; groups and members swapped (hidden by
    64/8/8); a softmax inside each group; weights renormalised; router_scale before the selection,
    or forgotten; offsets that are right for E/G = K only.
    """
    return check(case, subject.run(case, draw(case)))


def route_ties(subject: Subject, case: Case) -> Verdict:
    """On exactly equal logits the lowest indices win.

    Ties are not rare: padding rows tie everything, and bfloat16 logits tie in 0.4-0.9 % of groups.
    A kernel whose choice depends on its block size (torch.topk's does) makes two backends, or two
    batch sizes, disagree for no reason that anyone can find.
    """
    if case.op == "router_logits":
        return _duplicated_rows(subject, case)
    shape = case.sizes["T"], case.sizes["E"]
    few = integers(f"{case.key}/few", *shape, low=-1, high=2).float()
    few *= signs(f"{case.key}/few/sign", *shape).float()  # -0 equals 0
    few[0] = 0.0  # a row of padding
    args = {**draw(case), "logits": few}
    if args["bias"] is not None:
        args["bias"] = integers(f"{case.key}/few/bias", shape[1], low=-1, high=2).float() / 4
    got = subject.run(case, args)
    verdict = check(case, got, args, measure(case, args), "tied logits")
    has, must = got[0].cpu(), exact(case.op, args)[0]
    wrong = (has != must).any(-1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        logits, ids, right = few[row].tolist(), has[row].tolist(), must[row].tolist()
        raise Failure(f"logits {logits}: ids {ids}, must be {right}")
    return verdict


def route_close(subject: Subject, case: Case) -> Verdict:
    """Logits that are nearer to each other than a narrower format can tell choose as they are.

    Guards against: a selection by logits in bfloat16, float16 or TF32, which makes ties of them;
    random logits show that in one row of fifty.
    """
    tokens, experts = case.sizes["T"], case.sizes["E"]
    lots = words(f"{case.key}/close", tokens * experts).reshape(tokens, experts)
    ranks = torch.from_numpy(np.argsort(lots, kind="stable"))
    # Steps of 2^-13 above 1: float32 holds them exactly, TF32 and float16 keep steps of 2^-10.
    args = {**draw(case), "logits": (1 + ranks * 2.0**-13).float()}
    return check(case, subject.run(case, args), args, measure(case, args), "close logits")


def _duplicated_rows(subject: Subject, case: Case) -> Verdict:
    """Equal router rows give equal logits; these are exact in any order of summation."""
    args = draw(case)
    x = integers(f"{case.key}/small x", *args["x"].shape, low=-2, high=3).float()
    w = integers(f"{case.key}/small w", *args["w"].shape, low=-2, high=3).float() / 8
    w[1::2] = w[: len(w) - 1 : 2]  # expert 1 is expert 0, 3 is 2, ...
    small = {"x": x, "w": w}
    (logits,) = subject.run(case, small)
    if not same_bits(logits.cpu().double(), exact(case.op, small)[0]):
        raise Failure("logits that are exact in any order of summation are not exact")
    return Verdict()


def nan(subject: Subject, case: Case) -> Verdict:
    """A NaN or an infinity in one token (or row of a batch) stays there.

    Guards against: experts gathered with a one-hot product, where 0 * NaN of another token is NaN;
    a maximum taken over the whole batch; and ids out of range for the NaN row itself, which crash
    the gather behind them.
    """
    args = dict(draw(case))
    count = next(len(v) for n, v in args.items() if n in ACTIVATIONS)
    ill = {count // 2: float("nan"), count - 1: float("inf")}
    for name in ACTIVATIONS & args.keys():
        args[name] = args[name].clone()
        for row, poison in ill.items():
            args[name][row] = poison
    got = subject.run(case, args)
    if case.op == "route" and got[0].numel():
        low, high = int(got[0].min()), int(got[0].max())
        if low < 0 or high >= case.sizes["E"]:
            raise Failure(f"a NaN row has ids {low} .. {high} of {case.sizes['E']} experts")
    healthy = torch.tensor([row for row in range(count) if row not in ill])
    rest = tuple(part.cpu()[healthy] for part in got)
    return check(case, rest, take(args, healthy), allowances(case), "rows beside a NaN row")


def take(args: Args, rows: Tensor) -> Args:
    """The arguments of these tokens (or rows of the batch) alone."""
    return {n: v[rows] if n in PER_TOKEN and v is not None else v for n, v in args.items()}


def rows(subject: Subject, case: Case) -> Verdict:
    """A token gets the same alone, in the batch and in a permuted batch, within the limit.

    Guards against: routing or capacity that depends on the other tokens; a quantisation scale
    shared by the batch; a path for one token (decode) that computes something else than the one for
    many (prefill).
    """
    args, allowed = draw(case), allowances(case)
    count = next(len(v) for n, v in args.items() if n in PER_TOKEN)
    orders = [torch.tensor([row]) for row in range(min(count, 5))]
    orders.append(torch.arange(count - 1, -1, -1))
    verdicts = []
    for order in orders:
        some = take(args, order)
        what = f"row {int(order[0])} alone" if len(order) == 1 else "rows in reverse"
        verdicts.append(check(case, subject.run(case, some), some, allowed, what))
    return worst(verdicts)


def repeat(subject: Subject, case: Case) -> Verdict:
    """The same inputs give the same bits.

    Guards against: atomic additions in an order of their own, uninitialised memory, state that a
    call leaves behind.
    """
    first = subject.run(case, draw(case))
    second = subject.run(case, draw(case))
    if not all(same_bits(a, b) for a, b in zip(first, second, strict=True)):
        raise Failure("two calls on the same input differ")
    return Verdict()


def unselected(subject: Subject, case: Case) -> Verdict:
    """An expert that nobody chose may be full of NaN.

    Guards against: computing every expert and multiplying by a weight of zero, which one overflow
    in any expert turns into a NaN for every token.
    """
    args = dict(draw(case))
    idle = torch.ones(case.sizes["E"], dtype=torch.bool)
    idle[args["ids"].long()] = False
    if not bool(idle.any()):
        raise ValueError(f"{case.id}: every expert is chosen, so there is nothing to judge")
    clean = dict(args)
    for name in ("gate_up", "down"):
        args[name] = args[name].clone()
        args[name][idle] = float("nan")
    return check(case, subject.run(case, args), clean, allowances(case))


def expert_parallel(subject: Subject, case: Case) -> Verdict:
    """A rank that holds the experts from `first` on adds just their part: all parts are the whole.

    Guards against: `first` ignored; ids of other ranks clamped to the first or last local expert; a
    rank whose tokens all chose elsewhere. Every part is compared with the specification's part,
    whose sum is compared with the whole.
    """
    args, experts = draw(case), case.sizes["E"]
    each = experts // case.sizes["G"]
    verdicts = []
    for bounds in (range(0, experts + 1, each), (0, 1, experts - 2, experts)):  # by group; unevenly
        parts = []
        for first, end in pairwise(bounds):
            local = {**args, "first": first}
            for name in ("gate_up", "down"):
                local[name] = args[name][first:end]
            got = subject.run(case, local)
            what = f"experts {first} .. {end - 1}"
            verdicts.append(check(case, got, local, measure(case, local), what))
            parts.append(exact(case.op, local)[0])
        _check_sum(parts, exact(case.op, args))
    return worst(verdicts)


def _check_sum(parts: list[Tensor], whole: Outputs) -> None:
    if not torch.allclose(sum(parts, torch.zeros(())), whole[0], rtol=1e-12, atol=1e-12):
        raise ValueError("the specification's own parts do not add up")


PROPERTIES: dict[str, Callable[[Subject, Case], Verdict]] = {
    "value": value,
    "route.valid": route_valid,
    "route.ties": route_ties,
    "route.close": route_close,
    "nan": nan,
    "rows": rows,
    "repeat": repeat,
    "unselected": unselected,
    "expert-parallel": expert_parallel,
}
