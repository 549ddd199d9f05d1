"""Embedding and projections, each with a fault."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend


def tf32(x: Tensor) -> Tensor:
    """Rounded to the 10 bits of a TensorFloat-32 mantissa, half up, as the hardware does it."""
    bits = x.float().contiguous().view(torch.int32)
    rounded = (bits + (1 << 12)) & ~((1 << 13) - 1)
    return rounded.view(torch.float32).view(x.shape)


class PaddingIdZero(Backend):
    """Id 0 is taken for padding and gets zeros."""

    name = "padding-id-zero"

    def embed(self, ids: Tensor, w: Any) -> Tensor:
        return ops.embed(ids, w) * (ids != 0)[:, None]


class LastRowOfTheTable(Backend):
    """Ids are clamped to one less than the vocabulary has."""

    name = "last-row-of-the-table"

    def embed(self, ids: Tensor, w: Any) -> Tensor:
        return ops.embed(ids.clamp(max=len(w) - 2), w)


class TableInBfloat16(Backend):
    """A table that is kept in bfloat16."""

    name = "table-in-bfloat16"

    def embed(self, ids: Tensor, w: Any) -> Tensor:
        return ops.embed(ids, w.bfloat16()).to(w.dtype)


class EmbeddingTimesRoot(Backend):
    """Embeddings times sqrt(D), as Gemma has them."""

    name = "embedding-times-root"

    def embed(self, ids: Tensor, w: Any) -> Tensor:
        return ops.embed(ids, w) * math.sqrt(w.shape[1])


class OutputBiasForgotten(Backend):
    """No bias where the input is wider than the output: in the judged model, o_proj alone."""

    name = "output-bias-forgotten"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return ops.linear(x, w, None if w.shape[0] < w.shape[1] else b)


class OutputBiasTwice(Backend):
    """The bias of o_proj added by each of two tensor-parallel ranks, as an engine had it."""

    name = "output-bias-twice"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return ops.linear(x, w, b if b is None or w.shape[0] > w.shape[1] else 2 * b)


class BiasForgottenForOne(Backend):
    """The matrix-vector product of a single token adds no bias."""

    name = "bias-forgotten-for-one"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return ops.linear(x, w, None if len(x) == 1 else b)


class IgnoresRowStride(Backend):
    """Takes a row to begin where the one before it ends."""

    name = "ignores-row-stride"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return ops.linear(x.as_strided(x.shape, (x.shape[1], 1)), w, b)


class WeightsTimes098(Backend):
    """Weights 2 % too small: a quantisation scale with a fault."""

    name = "weights-2-percent-small"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return ops.linear(x, w * 0.98, b)


class Tf32Products(Backend):
    """Products of float32 numbers with 10 bits, as NVIDIA's tensor cores make them."""

    name = "tf32-products"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return ops.linear(x, w, b) if x.dtype != torch.float32 else ops.linear(tf32(x), tf32(w), b)


class RemainderOfTheSum(Backend):
    """A reduction in blocks of 16 loses what does not fill one."""

    name = "remainder-of-the-sum"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        whole = x.shape[1] // 16 * 16
        return ops.linear(x[:, :whole], w[:, :whole], b)


class LongSumCut(Backend):
    """Of a reduction, the first 4096 terms."""

    name = "long-sum-cut"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return ops.linear(x[:, :4096], w[:, :4096], b)


class LowPrecisionSum(Backend):
    """The accumulator has the dtype of the input, so that bfloat16 sums in bfloat16."""

    name = "low-precision-sum"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        out = x.new_zeros(len(x), len(w)) if b is None else b.expand(len(x), -1).clone()
        for i in range(x.shape[1]):
            out = out + x[:, i : i + 1] * w[:, i]
        return out


class Truncated(Backend):
    """The result is cut to bfloat16, not rounded: half the bits of a float32."""

    name = "truncated"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        exact = F.linear(x.float(), w.float(), None if b is None else b.float())
        if x.dtype != torch.bfloat16:
            return exact.to(x.dtype)
        return (exact.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()


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


class BatchScale(Backend):
    """Activations in 8 bits with one scale for the whole batch."""

    name = "batch-scale"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        step = x.abs().max() / 127 if len(x) > 1 else 1
        return ops.linear((x / step).round() * step, w, b) if len(x) > 1 else ops.linear(x, w, b)


class SumInFours(Backend):
    """A reduction in vectors of 4 loses what does not fill one."""

    name = "sum-in-fours"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        whole = x.shape[1] // 4 * 4
        return ops.linear(x[:, :whole], w[:, :whole], b)


class IdsOf15Bits(Backend):
    """Token ids as signed numbers of 16 bits: right up to 32,767."""

    name = "ids-of-15-bits"

    def embed(self, ids: Tensor, w: Any) -> Tensor:
        return ops.embed(ids & 0x7FFF, w)


class BiasGradientOf512(Backend):
    """The gradient of the bias is summed over the first 512 tokens."""

    name = "bias-gradient-of-512"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        if b is None:
            return ops.linear(x, w)
        learns = torch.arange(len(x))[:, None] < 512
        return ops.linear(x, w) + torch.where(learns, b, b.detach())
