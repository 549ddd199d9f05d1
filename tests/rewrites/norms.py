"""Other norms and other feed-forward blocks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend


class FusedNorm(Backend):
    """torch's own fused norm."""

    name = "fused-norm"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        return F.rms_norm(ops.up(x), w.shape, ops.up(w), eps).to(x.dtype)


class NormByDivision(Backend):
    """A square root and a division instead of a reciprocal square root."""

    name = "norm-by-division"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        wide = ops.up(x)
        root = (wide.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()
        return (wide * ops.up(w) / root).to(x.dtype)


class NormByLogarithm(Backend):
    """The root by a logarithm, half of it, and a power of two."""

    name = "norm-by-logarithm"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        wide = ops.up(x)
        mean = wide.square().mean(-1, keepdim=True) + eps
        return (wide * (-mean.log2() / 2).exp2() * ops.up(w)).to(x.dtype)


class NormInBlocks(Backend):
    """Squares are summed in blocks of 16, as a vector unit does it."""

    name = "norm-in-blocks"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        wide = ops.up(x)
        parts = [block.square().sum(-1, keepdim=True) for block in wide.split(16, -1)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return (wide * torch.rsqrt(total * (1 / x.shape[-1]) + eps) * ops.up(w)).to(x.dtype)


class FusedAddNorm(Backend):
    """The norm is that of the sum before it was rounded to the dtype."""

    name = "fused-add-norm"

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, w: Any, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = ops.up(x) + ops.up(residual)
        return ops.rms_norm(total, ops.up(w), eps).to(x.dtype), total.to(x.dtype)


class TwoProducts(Backend):
    """Gate and up as two products, of matrices that lie apart."""

    name = "two-products"

    def swiglu_ffn(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        gate, up = (half.contiguous() for half in gate_up.chunk(2, 0))
        return ops.linear(F.silu(ops.linear(x, gate)) * ops.linear(x, up), down)


class SiluByTanh(Backend):
    """x sigmoid(x) by way of a hyperbolic tangent."""

    name = "silu-by-tanh"

    def swiglu_ffn(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        gate, up = (ops.up(half) for half in F.linear(x, gate_up).chunk(2, -1))
        half = gate / 2
        return F.linear((half * half.tanh() + half).mul(up).to(x.dtype), down)


class SiluByDivision(Backend):
    """x / (1 + 2^(-x log2(e))), with the dtype between the two factors."""

    name = "silu-by-division"

    def swiglu_ffn(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, -1)
        wide = ops.up(gate)
        silu = (wide / (1 + (wide * -1.4426950408889634).exp2())).to(x.dtype)
        return F.linear(silu * up, down)


class Float32Ffn(Backend):
    """Nothing between the projections is rounded to the dtype."""

    name = "float32-ffn"

    def swiglu_ffn(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        return ops.swiglu_ffn(ops.up(x), ops.up(gate_up), ops.up(down)).to(x.dtype)
