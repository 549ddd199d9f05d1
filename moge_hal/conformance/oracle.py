"""What is right: the specification in float64. And its peers: how right plain torch is in a dtype.

A composite runs in float64 from its inputs on. A peer is the same code in the case's dtype: as
written, and with every contraction axis permuted, which is the cheapest of all other legitimate
kernels.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.conformance.inputs import Args, order
from moge_hal.router import RouteSpec

Outputs = tuple[Tensor, ...]


class Permuted(Backend):
    """The specification, summing in another order. Without a cache only."""

    name = "permuted"

    def __init__(self, seed: str) -> None:
        super().__init__()
        self.seed = seed

    def _order(self, count: int) -> Tensor:
        return order(f"{self.seed}/order{count}", count)

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        i = self._order(x.shape[1])
        return ops.linear(x[:, i], w[:, i], b)

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        i = self._order(x.shape[1])
        return ops.router_logits(x[:, i], w[:, i])

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        i = self._order(x.shape[1])
        return ops.rms_norm(x[:, i], w[i], eps)[:, i.argsort()]

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        i, j = self._order(q.shape[3]), self._order(q.shape[1])
        q, k = q[..., i], k[..., i]
        mixed, _ = ops.attention(q[:, j], k[:, j], v[:, j], None, positions[:, j])
        return mixed[:, j.argsort()], None

    def route(
        self,
        logits: Tensor,
        spec: RouteSpec,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        # Within the groups only, so that ids stay in the order of groups.
        each = logits.shape[1] // spec.groups
        i = (torch.arange(0, logits.shape[1], each)[:, None] + self._order(each)).flatten()
        scale, bias = (None if part is None else part[i] for part in (scale, bias))
        ids, weights = ops.route(logits[:, i], spec, scale, bias)
        return i[ids].int(), weights


class Elsewhere(Backend):
    """The specification with its roundings to a low precision at other places that are as good: a
    token's weight multiplies what goes into the down projection, silu is a product of two numbers,
    a norm is rounded before its weight, and keys are divided by sqrt(d). Without a cache only.

    As written and permuted, plain torch rounds the very same numbers, so both may be lucky alike.
    """

    name = "elsewhere"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        wide = ops.up(x)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        found: Tensor = normed.to(x.dtype) * w
        return found

    def swiglu_ffn(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, -1)
        return F.linear(gate * gate.sigmoid() * up, down)

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        out = torch.zeros_like(ops.up(x))
        for e in range(len(gate_up)):
            token, slot = torch.nonzero(ids == first + e, as_tuple=True)
            gate, up = F.linear(x[token], gate_up[e]).chunk(2, -1)
            inner = ops.up(F.silu(gate) * up) * weights[token, slot, None]
            out = out.index_add(0, token, ops.up(F.linear(inner.to(x.dtype), down[e])))
        return out.to(x.dtype)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        times = q.shape[2] // k.shape[2]
        keys = (k / math.sqrt(q.shape[-1])).repeat_interleave(times, 2)
        hidden = (positions[:, None] < 0) | (positions[:, None] > positions[:, :, None])
        scores = ops.up(torch.einsum("bshd,bnhd->bhsn", q, keys))
        scores = scores.masked_fill(hidden[:, None], torch.finfo(scores.dtype).min)
        likely = scores.softmax(-1).to(v.dtype)
        values = v.repeat_interleave(times, 2)
        return torch.einsum("bhsn,bnhd->bshd", likely, values), None


def run(backend: Backend, op: str, args: Args) -> Outputs:
    """An operation's tensors. A cache is no output: what it holds shows in the next call."""
    out = getattr(backend, op)(*args.values())
    if op == "attention":
        out = out[0]
    return out if isinstance(out, tuple) else (out,)


def widen(args: Args) -> Args:
    """Floating point as float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in args.items()
    }


def exact(op: str, args: Args) -> Outputs:
    """The specification in float64."""
    return run(Backend(), op, widen(args))


def weights_for(ids: Tensor, logits: Tensor, spec: RouteSpec, scale: Tensor | None) -> Tensor:
    """The specification's weights for ids that somebody else chose.

    ids [T, K], logits [T, E] -> [T, K] in the logits' dtype.
    A bias takes part in the selection only, so one that puts all other experts last forces it. An
    id that cannot be selected (a second one of the same expert, one too many of a group) gets no
    weight.
    """
    chosen = ids.long()
    force = torch.full_like(logits, -4.0).scatter(1, chosen, 0.0)
    found, weights = ops.route(logits, spec, scale, force)
    return torch.zeros_like(logits).scatter(1, found.long(), weights).gather(1, chosen)


class Follow(Backend):
    """The specification on routes that somebody else took: `follow`, take a step, read `router`."""

    name = "follow"
    routes: list[Tensor]  # [T, K] of each layer
    router: list[Tensor]  # [T, E] logits of each layer so far

    def follow(self, routes: list[Tensor]) -> None:
        self.routes, self.router = routes, []

    def route(
        self,
        logits: Tensor,
        spec: RouteSpec,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        ids = self.routes[len(self.router)]
        self.router.append(logits)
        return ids, weights_for(ids, logits, spec, scale)


class FollowPermuted(Follow, Permuted):
    """The same in another order of summation."""
