"""What every property rests on: a backend's outputs against the specification's, within limits."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from moge_hal.backend import Backend
from moge_hal.conformance.cases import Case
from moge_hal.conformance.inputs import Args, draw
from moge_hal.conformance.limits import lean_limit, lean_of, limit, worst_row
from moge_hal.conformance.oracle import Elsewhere, Outputs, Permuted, exact, run, weights_for, widen
from moge_hal.conformance.routing import check_route
from moge_hal.conformance.verdict import Failure, Verdict

# What an operation sums over; the longest of them is the n of its limit.
_REDUCED = {
    "linear": "I",
    "rms_norm": "D",
    "add_rms_norm": "D",
    "attention": "S d",
    "swiglu_ffn": "D F",
    "router_logits": "D",
    "route": "E",
    "experts": "D F K",
}


# What `oracle.Elsewhere` computes otherwise.
_ROUNDED_ELSEWHERE = ("rms_norm", "add_rms_norm", "attention", "swiglu_ffn", "experts")


@dataclass(frozen=True)
class Allowance:
    """What an output must be like: its dtype, how far off it may be, and in low precision how far
    to one side."""

    dtype: torch.dtype
    limit: float
    lean: float = math.inf


def longest_reduction(case: Case) -> int:
    """n of the limit."""
    letters = _REDUCED.get(case.op, "").split()
    return max((case.sizes[letter] for letter in letters), default=1)


def measure(case: Case, args: Args) -> list[Allowance]:
    """The allowance of each output for these inputs, from plain torch as written, permuted and, in
    low precision, rounded elsewhere."""
    peers: list[Backend] = [Backend(), Permuted(case.key)]
    if case.dtype != torch.float32 and case.op in _ROUNDED_ELSEWHERE:
        peers.append(Elsewhere())
    answers = [run(peer, case.op, args) for peer in peers]
    if case.op == "route":  # each peer's weights are judged for its own ids
        exacts: list[Outputs] = [(ids, _weights_for(ids, args)) for ids, _ in answers]
    else:
        exacts = [exact(case.op, args)] * len(peers)
    n = longest_reduction(case)
    return [
        _allowance(
            case.op,
            [answer[i] for answer in answers],
            [want[i] for want in exacts],
            n,
            _exponent(case, args),
        )
        for i in range(len(answers[0]))
    ]


def _allowance(
    op: str, answers: list[Tensor], exacts: list[Tensor], n: int, exponent: float
) -> Allowance:
    dtype = answers[0].dtype
    if not dtype.is_floating_point:
        return Allowance(dtype, 0.0)
    pairs = list(zip(answers, exacts, strict=True))
    p = max(_error(op, got, want) for got, want in pairs)
    if dtype == torch.float32:
        return Allowance(dtype, limit(p, dtype, n) + exponent)
    lean = lean_limit(max(lean_of(got, want) for got, want in pairs), dtype)
    return Allowance(dtype, limit(p, dtype, n) + exponent, lean)


def _exponent(case: Case, args: Args) -> float:
    """What a softmax may lose in its exponent, for the limit (see limits.py)."""
    if case.op == "route" and args["spec"].score == "softmax":
        exponents = args["logits"]
    elif case.op == "attention":
        times = args["q"].shape[2] // args["k"].shape[2]
        keys = args["k"].double().repeat_interleave(times, 2)
        scores = torch.einsum("bshd,bnhd->bhsn", args["q"].double(), keys)
        exponents = scores / math.sqrt(keys.shape[-1])
    else:
        return 0.0
    return float(exponents.abs().max()) * 2.0**-23 if exponents.numel() else 0.0


def _error(op: str, got: Tensor, want: Tensor) -> float:
    """Of the worst row: what a token gets, in attention that of all heads together."""
    return worst_row(*((got.flatten(2), want.flatten(2)) if op == "attention" else (got, want)))


def _weights_for(ids: Tensor, args: Args) -> Tensor:
    wide = widen(args)
    return weights_for(ids, wide["logits"], wide["spec"], wide["scale"])


@lru_cache(maxsize=16)
def _own(case: Case) -> tuple[Outputs, list[Allowance]]:
    args = draw(case)
    return exact(case.op, args), measure(case, args)


def allowances(case: Case) -> list[Allowance]:
    """Those of the case's own inputs, one an output."""
    return _own(replace(case, prop=""))[1]


def check(
    case: Case,
    got: Outputs,
    args: Args | None = None,
    allowed: list[Allowance] | None = None,
    what: str = "",
) -> Verdict:
    """Shape, dtype and values of what a backend returned; raises `Failure`.

    args: other inputs than the case's own, `what` they are, for the message. allowed: None = the
    case's own allowances.
    """
    where = f"{what}: " if what else ""
    allowed = allowed or allowances(case)
    want = _own(replace(case, prop=""))[0] if args is None else exact(case.op, args)
    if len(got) != len(want):
        raise Failure(f"{where}{len(got)} outputs instead of {len(want)}")
    names = [
        f"{where}output {i}" if len(want) > 1 else f"{where}the output" for i in range(len(want))
    ]
    for name, has, must, allowance in zip(names, got, want, allowed, strict=True):
        if has.shape != must.shape or has.dtype != allowance.dtype:
            found, wanted = _form(has.shape, has.dtype), _form(must.shape, allowance.dtype)
            raise Failure(f"{name} is {found}, must be {wanted}")
    if case.op == "route":
        ids, weights = got
        given = draw(case) if args is None else args
        return check_route(given, ids, weights, allowed[1].limit, where)
    verdicts = []
    for name, has, must, allowance in zip(names, got, want, allowed, strict=True):
        error = _error(case.op, has, must)
        if error > allowance.limit:
            raise Failure(f"{name} is wrong in its worst row", error, allowance.limit)
        lean = lean_of(has, must)
        if lean > allowance.lean:
            raise Failure(f"{name} is rounded to one side", lean, allowance.lean)
        verdicts.append(Verdict(error, allowance.limit))
    return worst(verdicts)


def worst(verdicts: list[Verdict]) -> Verdict:
    """The one that came nearest to its limit."""
    return max(
        verdicts, key=lambda v: (v.error or 0.0) / v.limit if v.limit else 0.0, default=Verdict()
    )


def _form(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"
