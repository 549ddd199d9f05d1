"""Norms, projections, rotary embedding and feed-forward, each with a fault."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend, StepOut
from moge_hal.model import Transformer


class EpsilonOutside(Backend):
    """sqrt(mean) + eps instead of sqrt(mean + eps): 5e-6 off at scale 1, 4 % at scale 0.01."""

    name = "epsilon-outside"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        root = x.pow(2).mean(-1, keepdim=True).sqrt()
        return x / (root + eps) * ops.up(w)


class ResidualInPlace(Backend):
    """The sum is written over an input."""

    name = "residual-in-place"

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, w: Any, eps: float
    ) -> tuple[Tensor, Tensor]:
        residual += x
        return ops.rms_norm(residual, w, eps), residual.clone()


class OutputBiasForgotten(Backend):
    """No bias where the input is wider than the output: in the judged model, o_proj alone."""

    name = "output-bias-forgotten"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return ops.linear(x, w, None if w.shape[0] < w.shape[1] else b)


class IgnoresStrides(Backend):
    """Reads a view as if its elements lay side by side."""

    name = "ignores-strides"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return ops.linear(x.as_strided(x.shape, (x.shape[1], 1)), w, b)


class RotaryInterleaved(Backend):
    """Element 2i is paired with 2i + 1, as in other models, instead of i with i + d/2."""

    name = "rotary-interleaved"

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos[:, :, None], sin[:, :, None]

        def turn(x: Tensor) -> Tensor:
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

        return turn(q), turn(k)


class GateAndUpSwapped(Backend):
    """The second half of the rows is taken for the gate."""

    name = "gate-and-up-swapped"

    def swiglu_ffn(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        up, gate = F.linear(x, gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, down)


class LeavesSomethingBehind(Backend):
    """A buffer that is added to instead of being overwritten."""

    name = "leaves-something-behind"
    buffer: Tensor | None = None

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        out = ops.linear(x, w, b)
        if self.buffer is not None and self.buffer.shape == out.shape:
            out = out + 1e-7 * self.buffer
        self.buffer = out
        return out


class FirstInsteadOfLast(Backend):
    """Asked for the last position's logits, gives the first one's."""

    name = "first-instead-of-last"

    def compile(self, step: Any, example: tuple[Any, ...], dynamic: Any) -> Any:
        if not isinstance(step, Transformer):
            return step

        def run(ids: Tensor, positions: Tensor, cache: Any, last_only: bool = False) -> StepOut:
            out: StepOut = step(ids, positions, cache)
            return out._replace(logits=out.logits[:, :1]) if last_only else out

        return run
