"""Other ways to compute the experts, and to choose them."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.router import RouteSpec


class GatherBmm(Backend):
    """A copy of the weights for every (token, expert) row, and one batched product."""

    name = "gather-bmm"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        chosen = ids.flatten().long() - first
        rows = x.repeat_interleave(ids.shape[1], 0).unsqueeze(-1)
        gate, up = torch.bmm(gate_up[chosen], rows).chunk(2, 1)
        parts = torch.bmm(down[chosen], F.silu(gate) * up).view(*ids.shape, -1)
        return (ops.up(parts) * weights[..., None]).sum(1).to(x.dtype)


class WeightsEarly(Backend):
    """The weight multiplies what goes into the down projection, not what comes out."""

    name = "weights-early"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        out = torch.zeros_like(ops.up(x))
        for e, (a, b) in enumerate(zip(gate_up, down, strict=True)):
            token, slot = torch.nonzero(ids == first + e, as_tuple=True)
            gate, up = F.linear(x[token], a).chunk(2, -1)
            inner = (ops.up(F.silu(gate) * up) * weights[token, slot, None]).to(x.dtype)
            out = out.index_add(0, token, ops.up(F.linear(inner, b)))
        return out.to(x.dtype)


class Float32Experts(Backend):
    """Nothing is rounded to the dtype before the end."""

    name = "float32-experts"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        wide = (ops.up(x), ops.up(gate_up), ops.up(down))
        return ops.experts(*wide, ids, weights, first).to(x.dtype)

    def swiglu_ffn(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        return ops.swiglu_ffn(ops.up(x), ops.up(gate_up), ops.up(down)).to(x.dtype)


class ArgmaxPasses(Backend):
    """k/G passes of argmax and masking on the logits; weights by way of their logarithms."""

    name = "argmax-passes"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        left, found = logits.unflatten(1, (spec.groups, -1)), []
        for _ in range(spec.k // spec.groups):
            found.append(left.argmax(-1, keepdim=True))
            left = left.scatter(-1, found[-1], float("-inf"))
        start = torch.arange(spec.groups)[:, None] * left.shape[-1]
        ids = (torch.cat(found, -1) + start).flatten(1)
        weights = logits.log_softmax(-1).exp().gather(1, ids)
        return ids.int(), weights if scale is None else weights * scale[ids]


class LogSumExp(Backend):
    """exp(x - log(sum(exp(x)))): its exponent rounds at the size of the logits."""

    name = "log-sum-exp"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        ids, _ = ops.route(logits, spec)
        chosen = ids.long()
        weights = (logits.gather(1, chosen) - logits.logsumexp(-1, keepdim=True)).exp()
        return ids, weights if scale is None else weights * scale[chosen]


class PowersOfTwo(Backend):
    """A softmax in powers of two, as chips without another exponential compute it."""

    name = "powers-of-two"

    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        ids, _ = ops.route(logits, spec)
        chosen, powers = ids.long(), logits * math.log2(math.e)
        powers = (powers - powers.amax(-1, keepdim=True)).exp2()
        weights = powers.gather(1, chosen) / powers.sum(-1, keepdim=True)
        return ids, weights if scale is None else weights * scale[chosen]
