"""Gradients: what training gets from an operation, against the specification's in float64."""

import torch
from torch import Tensor

from moge_hal.backend import Backend
from moge_hal.conformance.cases import Case
from moge_hal.conformance.inputs import Args, draw, normal
from moge_hal.conformance.judge import worst
from moge_hal.conformance.limits import limit, worst_row
from moge_hal.conformance.oracle import Permuted, run, widen
from moge_hal.conformance.subject import Subject, place
from moge_hal.conformance.verdict import Failure, Skip, Verdict

# Tables and coordinates, of which nobody takes a gradient, and a bias for the selection alone.
_FIXED = ("cos", "sin")
_SELECTS = {"route": ("bias",)}


def gradients(subject: Subject, case: Case) -> Verdict:
    """The gradient of every input, for a random gradient of the outputs, within 3 p; of experts
    also on a rank that holds the last group alone.

    Guards against: a fused forward without a backward, or with a wrong one; weights or router
    logits detached, so that the router never learns; a backward that forgets what a broadcast
    summed over. What judges is what training gets: if `why_not` refuses to train, the default
    operation runs.
    """
    if subject.backend.graph:
        raise Skip("runs exported graphs and cannot train")
    device = subject.backend.device()
    bound = subject.bound(case, training=True).backend
    args = draw(case)
    verdicts = [_judge(bound, case, args, device)]
    if case.op == "experts":
        first = case.sizes["E"] - case.sizes["E"] // case.sizes["G"]
        held = {name: args[name][first:] for name in ("gate_up", "down")}
        verdicts.append(_judge(bound, case, {**args, **held, "first": first}, device))
    return worst(verdicts)


def _judge(bound: Backend, case: Case, args: Args, device: torch.device) -> Verdict:
    got = _gradients(bound, case, args, device)
    want = _gradients(Backend(), case, widen(args))
    by_peer = [_gradients(peer, case, args) for peer in (Backend(), Permuted(case.key))]
    n = max(size for letter, size in case.sizes.items() if letter not in ("V", "seed"))
    verdicts = []
    for name, must in want.items():
        if got[name] is None:
            raise Failure(f"no gradient reaches {name}")
        has = got[name].cpu()
        if has.dtype != args[name].dtype:
            raise Failure(f"the gradient of {name} is {has.dtype}, must be {args[name].dtype}")
        p = max(worst_row(peer[name], must, pooled=True) for peer in by_peer)
        allowed = limit(p, has.dtype, n, factor=3.0)
        error = worst_row(has, must, pooled=True)
        if error > allowed:
            raise Failure(f"the gradient of {name} is wrong in its worst row", error, allowed)
        verdicts.append(Verdict(error, allowed))
    return worst(verdicts)


def _gradients(
    backend: Backend, case: Case, args: Args, device: torch.device | None = None
) -> dict[str, Tensor]:
    """By argument, for a gradient of the outputs that is the same everywhere up to rounding."""
    where = device or torch.device("cpu")
    args = {n: place(v, n, case, where) if isinstance(v, Tensor) else v for n, v in args.items()}
    fixed = (*_FIXED, *_SELECTS.get(case.op, ()))
    wanted = {
        n: v.requires_grad_()
        for n, v in args.items()
        if isinstance(v, Tensor) and v.is_floating_point() and n not in fixed
    }
    outputs = [part for part in run(backend, case.op, args) if part.is_floating_point()]
    above = [
        normal(f"{case.key}/gradient {i}", *part.shape).to(part.dtype).to(part.device)
        for i, part in enumerate(outputs)
    ]
    if not any(part.requires_grad for part in outputs):
        raise Failure("no gradient reaches any input")
    found = torch.autograd.grad(outputs, list(wanted.values()), above, allow_unused=True)
    return dict(zip(wanted, found, strict=True))
