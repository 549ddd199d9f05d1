"""Norms, each with a fault."""

from typing import Any

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend


class EpsilonOutside(Backend):
    """sqrt(mean) + eps instead of sqrt(mean + eps): 5e-6 off at scale 1, 4 % at scale 0.01."""

    name = "epsilon-outside"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        root = x.pow(2).mean(-1, keepdim=True).sqrt()
        return x / (root + eps) * ops.up(w)


class SquaresInTheDtype(Backend):
    """Squares that float16 cannot hold, of activations that a residual stream has."""

    name = "squares-in-the-dtype"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        mean = ops.up(x.square()).mean(-1, keepdim=True)
        return (ops.up(x) * torch.rsqrt(mean + eps) * ops.up(w)).to(x.dtype)


class EpsilonOfAnother(Backend):
    """1e-6, as other models have it, instead of the epsilon that is given."""

    name = "epsilon-of-another"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        return ops.rms_norm(x, w, 1e-6)


class EpsilonOnTheSum(Backend):
    """Epsilon is added to the sum of the squares, before it is divided by their number."""

    name = "epsilon-on-the-sum"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        return ops.rms_norm(x, w, eps / x.shape[-1])


class EpsilonForgotten(Backend):
    """No epsilon."""

    name = "epsilon-forgotten"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        return ops.rms_norm(x, w, 0.0)


class MeanSubtracted(Backend):
    """A layer norm without a bias."""

    name = "mean-subtracted"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        return ops.rms_norm(x - x.mean(-1, keepdim=True), w, eps)


class OnePlusWeight(Backend):
    """Times 1 + w, as Gemma has it."""

    name = "one-plus-weight"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        return ops.rms_norm(x, 1 + w, eps)


class MeanOverPadded(Backend):
    """Divides by a width that was rounded up to a multiple of 16."""

    name = "mean-over-padded"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        wide = torch.nn.functional.pad(x, (0, -x.shape[-1] % 16))
        normed = ops.rms_norm(wide, torch.ones(wide.shape[-1]), eps)
        return normed[:, : x.shape[-1]].mul(w)


class SquaresInFloat16(Backend):
    """Squares are summed in the dtype of the input, where 65,504 is the end."""

    name = "squares-in-float16"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        mean = x.pow(2).sum(-1, keepdim=True) / x.shape[-1]
        return (ops.up(x) * torch.rsqrt(ops.up(mean) + eps) * ops.up(w)).to(x.dtype)


class ResidualInPlace(Backend):
    """The sum is written over an input."""

    name = "residual-in-place"

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, w: Any, eps: float
    ) -> tuple[Tensor, Tensor]:
        residual += x
        return ops.rms_norm(residual, w, eps), residual.clone()


class PostNorm(Backend):
    """The residual is added after the norm instead of before it, as an engine had it."""

    name = "post-norm"

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, w: Any, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = ops.rms_norm(x, w, eps) + residual
        return total, total


class NormIsTheResidual(Backend):
    """What goes on as the residual has been normed."""

    name = "norm-is-the-residual"

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, w: Any, eps: float
    ) -> tuple[Tensor, Tensor]:
        normed, _ = ops.add_rms_norm(x, residual, w, eps)
        return normed, normed.clone()


class ResidualNotUpdated(Backend):
    """The norm is that of the sum, but the residual goes on as it came."""

    name = "residual-not-updated"

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, w: Any, eps: float
    ) -> tuple[Tensor, Tensor]:
        return ops.add_rms_norm(x, residual, w, eps)[0], residual.clone()


class ResidualInBfloat16(Backend):
    """The sum is kept in bfloat16."""

    name = "residual-in-bfloat16"

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, w: Any, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = (x + residual).bfloat16().to(x.dtype)
        return ops.rms_norm(total, w, eps), total


class NoGradientOfTheMean(Backend):
    """The backward takes the root mean square for a constant."""

    name = "no-gradient-of-the-mean"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        root = torch.rsqrt(x.detach().pow(2).mean(-1, keepdim=True) + eps)
        return (x * root).mul(w)


class NoGradientOfTheResidual(Backend):
    """The residual gets the gradient of the norm, but not the one that comes along the sum."""

    name = "no-gradient-of-the-residual"

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, w: Any, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = x + residual
        return ops.rms_norm(total, w, eps), total.detach() + 0 * total


class EpsilonHardCoded(Backend):
    """1e-5, which is what most models have, whatever is given."""

    name = "epsilon-hard-coded"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        return ops.rms_norm(x, w, 1e-5)


class WholeVectorsOfEight(Backend):
    """The norm is written in vectors of 8; what does not fill one stays zero."""

    name = "whole-vectors-of-8"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        written = torch.arange(x.shape[1]) < x.shape[1] // 8 * 8
        return ops.rms_norm(x, w, eps) * written


class GridOf65535(Backend):
    """A block for every token, of which a launch has 65,535 at most."""

    name = "grid-of-65535"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        launched = torch.arange(len(x))[:, None] < 65535
        return ops.rms_norm(x, w, eps) * launched
