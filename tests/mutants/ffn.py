"""The feed-forward block and the logits of the router, each with a fault."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from mutants.linear import tf32


class Spelled(Backend):
    """A right feed-forward block, a method for every decision."""

    name = "spelled-ffn"

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def split(self, both: Tensor) -> tuple[Tensor, ...]:
        return both.chunk(2, -1)

    def swiglu_ffn(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        gate, up = self.split(F.linear(x, gate_up))
        return F.linear(self.activate(gate, up), down)


class GateAndUpSwapped(Spelled):
    """The second half of the rows is taken for the gate."""

    name = "gate-and-up-swapped"

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(up) * gate


class GateAndUpInterleaved(Spelled):
    """Rows of gate and up are taken to come in turn."""

    name = "gate-and-up-interleaved"

    def split(self, both: Tensor) -> tuple[Tensor, ...]:
        return both[:, ::2], both[:, 1::2]


class GeluForSilu(Spelled):
    """GELU, by its hyperbolic tangent."""

    name = "gelu-for-silu"

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh") * up


class SteepSigmoid(Spelled):
    """x * sigmoid(1.03 x): a table whose steps are 3 % off."""

    name = "steep-sigmoid"

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * torch.sigmoid(1.03 * gate) * up


class HardSilu(Spelled):
    """A sigmoid of straight pieces."""

    name = "hard-silu"

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.hardswish(gate) * up


class SigmoidAlone(Spelled):
    """A gated linear unit: sigmoid(gate) * up."""

    name = "sigmoid-alone"

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.sigmoid(gate) * up


class SiluOfTheProduct(Spelled):
    """silu(gate * up)."""

    name = "silu-of-the-product"

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate * up)


class Clamped(Spelled):
    """The gate ends at 7, as another model has it."""

    name = "clamped"

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=7.0)) * up


class SiluOverflows(Spelled):
    """x / (1 + exp(-x)) in the dtype of the input, where exp(12) is infinite and 0 comes out."""

    name = "silu-overflows"

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate.exp() / (1 + gate.exp()) * gate * up


class InnerInBfloat16(Spelled):
    """What lies between the projections is kept in bfloat16."""

    name = "inner-in-bfloat16"

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return (F.silu(gate) * up).bfloat16().to(gate.dtype)


class SharedExpertTwice(Backend):
    """Two expert-parallel ranks each add the shared expert, as an engine had it."""

    name = "shared-expert-twice"

    def swiglu_ffn(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        return 2 * ops.swiglu_ffn(x, gate_up, down)

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        return ops.experts(x, gate_up, down, ids, weights, first)


class GradientOfUpHalved(Backend):
    """Of gate and up, the backward gives up one half of its gradient."""

    name = "gradient-of-up-halved"

    def swiglu_ffn(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * (up / 2 + up.detach() / 2), down)


class LowPrecisionRouter(Backend):
    """Router logits rounded to bfloat16: changes an expert for 2-3 % of a layer's tokens."""

    name = "low-precision-router"

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        return ops.router_logits(x, w).bfloat16().float()


class RouterInTheModelsDtype(Backend):
    """Router logits computed in the dtype of the model and widened at the end."""

    name = "router-in-the-models-dtype"

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        return F.linear(x, w).float()


class RouterInTf32(Backend):
    """Router logits from products with 10 bits."""

    name = "router-in-tf32"

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        return ops.router_logits(tf32(x), tf32(w))


class RouterNarrow(Backend):
    """Router logits are returned in the dtype of the model."""

    name = "router-narrow"

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        return ops.router_logits(x, w).to(x.dtype)


class RouterOverRoot(Backend):
    """Router logits divided by sqrt(D)."""

    name = "router-over-root"

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        return ops.router_logits(x, w) / math.sqrt(x.shape[1])


class Jitter(Backend):
    """Router logits that differ in their last digit by the expert: equal rows no longer tie."""

    name = "jitter"

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        return ops.router_logits(x, w) * (1 + torch.arange(len(w)) % 2 * 2.0**-23)


class NoGradientToTheHidden(Backend):
    """The router learns, but what it looks at does not."""

    name = "no-gradient-to-the-hidden"

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        return ops.router_logits(x.detach(), w)


class RouterInEights(Backend):
    """The reduction of the router's logits in vectors of 8 loses what does not fill one."""

    name = "router-in-eights"

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        whole = x.shape[1] // 8 * 8
        return ops.router_logits(x[:, :whole], w[:, :whole])
