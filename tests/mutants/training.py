"""What a training step gets wrong although every operation's own gradient is right."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from moge_hal import ops, router
from moge_hal.backend import Backend
from moge_hal.router import RouteSpec, expert_load


@contextmanager
def auxiliary(loss: Callable[[Tensor, Tensor, float], Tensor]) -> Iterator[None]:
    """Another auxiliary loss in the place of the right one."""
    with patch.object(router, "auxiliary_loss", loss):
        yield


class AuxiliaryOfTheChosen(Backend):
    """The auxiliary loss takes the mean probability over the tokens that chose the expert."""

    name = "auxiliary-of-the-chosen"

    @staticmethod
    def around() -> Any:
        def loss(router_logits: Tensor, ids: Tensor, alpha: float) -> Tensor:
            experts = router_logits.shape[-1]
            scores = router_logits.softmax(-1)
            chosen = torch.zeros_like(scores).scatter(-1, ids.long(), 1.0)
            counts = expert_load(ids, experts).to(scores.dtype)
            fractions = counts * (experts / counts.sum(-1, keepdim=True))
            return alpha * (fractions * (scores * chosen).mean(1)).sum(-1).mean()

        return auxiliary(loss)


class AuxiliaryOfAllLayers(Backend):
    """The auxiliary loss is summed over the layers instead of averaged."""

    name = "auxiliary-per-layer"

    @staticmethod
    def around() -> Any:
        right = router.auxiliary_loss

        def loss(router_logits: Tensor, ids: Tensor, alpha: float) -> Tensor:
            return right(router_logits, ids, alpha) * len(router_logits)

        return auxiliary(loss)


class LogitsOutOfTheGraph(Backend):
    """The router's logits leave the graph where they are looked at for the auxiliary loss."""

    name = "logits-out-of-the-graph"

    @staticmethod
    def around() -> Any:
        right = router.auxiliary_loss

        def loss(router_logits: Tensor, ids: Tensor, alpha: float) -> Tensor:
            return right(router_logits.detach(), ids, alpha)

        return auxiliary(loss)


class RoutesOfTheNextLayer(Backend):
    """The auxiliary loss pairs a layer's probabilities with another layer's counts."""

    name = "routes-of-the-next-layer"

    @staticmethod
    def around() -> Any:
        right = router.auxiliary_loss

        def loss(router_logits: Tensor, ids: Tensor, alpha: float) -> Tensor:
            return right(router_logits, ids.roll(1, 0), alpha)

        return auxiliary(loss)


class RouterLearnsHalf(Backend):
    """Weights keep half of their gradient wherever an operation trains: a hook that ran twice."""

    name = "router-learns-half"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        half = logits / 2 + logits.detach() / 2
        return ops.route(half, spec, scale, bias)
