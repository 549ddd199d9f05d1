"""Whole models in training: the gradients of every parameter, as a training step gets them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moge_hal import router
from moge_hal.backend import Backend
from moge_hal.bind import bind
from moge_hal.conformance.cases import Case
from moge_hal.conformance.inputs import integers
from moge_hal.conformance.judge import worst
from moge_hal.conformance.limits import limit, worst_row
from moge_hal.conformance.oracle import Follow, FollowPermuted
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure, Skip, Verdict
from moge_hal.conformance.weights import model_weights
from moge_hal.runtime import Model

BATCH, LENGTH = 3, 14
ALPHA = 0.5  # of the auxiliary loss: large, so that it shows in every router's gradient


def train_step(subject: Subject, case: Case) -> Verdict:
    """The loss and the gradient of every parameter: cross entropy plus the auxiliary loss, on the
    routes that the backend took, against the specification on the same routes in float64.

    Guards against: an auxiliary loss from the selected probabilities only, which pulls the wrong
    way; router logits that leave the graph; a weight that two operations share and one forgets.
    """
    if subject.backend.graph:
        raise Skip("runs exported graphs and cannot train")
    config, weights = model_weights(case)
    shape = (BATCH, LENGTH)
    ids, target = (
        integers(f"{case.id}/{name}", *shape, low=0, high=config.vocab_size)
        for name in ("ids", "target")
    )

    def train(backend: Backend, dtype: torch.dtype) -> Model:
        return bind(config, weights, backend, "train", dtype=dtype)

    model = train(subject.backend, case.dtype)
    device = subject.backend.device()
    positions = torch.arange(LENGTH).expand(shape)
    out = model.run_step(ids.to(device), positions.to(device), None)
    if out.router_logits is None:
        raise Failure("a training step returns no router logits")
    balance = router.auxiliary_loss(out.router_logits, out.routes, ALPHA)
    loss = F.cross_entropy(out.logits.flatten(0, 1).float(), target.flatten().to(device)) + balance
    got = _gradients(model, loss)
    routes = out.routes.cpu()

    def follow(backend: Follow, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        bound = train(backend, dtype)
        assert isinstance(bound.backend, Follow)
        bound.backend.follow(list(routes))
        step = bound.run_step(ids, positions, None)
        loss = _loss(step.logits, torch.stack(bound.backend.router), routes, target)
        return loss, _gradients(bound, loss)

    wanted, want = follow(Follow(), torch.float64)
    peers = [follow(peer, case.dtype) for peer in (Follow(), FollowPermuted(case.key))]
    n = max(*config.sizes.values(), BATCH * LENGTH)

    def judge(what: str, got: Tensor, want: Tensor, by_peer: list[Tensor]) -> Verdict:
        return _judge(what, got, want, by_peer, case.dtype, n, config.num_hidden_layers)

    verdicts = [judge("the loss", loss, wanted, [peer[0] for peer in peers])]
    for name, must in want.items():
        by_peer = [gradients[name] for _, gradients in peers]
        verdicts.append(judge(f"the gradient of {name}", got[name], must, by_peer))
    return worst(verdicts)


def _loss(logits: Tensor, router_logits: Tensor, routes: Tensor, target: Tensor) -> Tensor:
    """The same loss, spelled out: logits [B, S, V], router_logits [L, T, E], routes [L, T, K]."""
    logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    likely = logits - logits.logsumexp(-1, keepdim=True)
    cross = -likely.gather(1, target.flatten()[:, None]).mean()
    layers, count, experts = router_logits.shape
    scores = router_logits.exp() / router_logits.exp().sum(-1, keepdim=True)
    balance = scores.new_zeros(())
    for layer in range(layers):
        for expert in range(experts):
            chosen = (routes[layer] == expert).sum() * experts / (routes.shape[-1] * count)
            balance = balance + chosen * scores[layer, :, expert].mean()
    return cross + ALPHA * balance / layers


def _gradients(model: Model, loss: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.weights.items() if p.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    missing = [name for name, g in zip(parameters, found, strict=True) if g is None]
    if missing:
        raise Failure(f"no gradient reaches {', '.join(missing)}")
    return dict(zip(parameters, found, strict=True))


def _judge(
    what: str,
    got: Tensor,
    want: Tensor,
    peers: list[Tensor],
    dtype: torch.dtype,
    n: int,
    layers: int,
) -> Verdict:
    """As for the gradients of an operation, but a number is compared as such."""

    def error(found: Tensor) -> float:
        return worst_row(found.detach().reshape(-1, 1) if found.dim() == 0 else found, must, True)

    must = want.detach().reshape(-1, 1) if want.dim() == 0 else want.detach()
    # A gradient that nearly cancels, such as that of a key's bias, is a matter of luck: right
    # models came to 1.8 times what 3 p allows.
    allowed = limit(max(error(peer) for peer in peers), dtype, n, 6.0, layers)
    off = error(got)
    if off > allowed:
        raise Failure(f"{what} is wrong", off, allowed)
    return Verdict(off, allowed)
