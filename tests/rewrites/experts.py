"""Other ways to compute the experts."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend


class GatherBmm(Backend):
    """A copy of the weights for every (token, expert) row, and one batched product."""

    name = "gather-bmm"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        local = ids.flatten().long() - first
        inside = (local >= 0) & (local < len(gate_up))
        chosen = local[inside]
        token = torch.arange(len(x)).repeat_interleave(ids.shape[1])[inside]
        # Copies are made of float32, so that their gradients are added up in float32.
        gate_up, down = (ops.up(w)[chosen].to(w.dtype) for w in (gate_up, down))
        gate, up = torch.bmm(gate_up, x[token].unsqueeze(-1)).chunk(2, 1)
        parts = torch.bmm(down, F.silu(gate) * up).squeeze(-1)
        weighed = ops.up(parts) * weights.flatten()[inside, None]
        return torch.zeros_like(ops.up(x)).index_add(0, token, weighed).to(x.dtype)


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


class LastExpertFirst(Backend):
    """Experts are added up from the last to the first."""

    name = "last-expert-first"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        last = first + len(gate_up) - 1
        return ops.experts(x, gate_up.flip(0), down.flip(0), last - ids, weights)


class SortedRows(Backend):
    """Rows sorted by expert, one product an expert, put back, and a token's K rows summed."""

    name = "sorted-rows"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        count, k = len(gate_up), ids.shape[1]
        local = ids.flatten().long() - first
        local = torch.where((local < 0) | (local >= count), count, local)
        order = local.argsort(stable=True)
        sizes = torch.bincount(local, minlength=count + 1).tolist()
        rows = x.repeat_interleave(k, 0)[order].split(sizes)
        parts = [ops.swiglu_ffn(rows[e], gate_up[e], down[e]) for e in range(count)]
        done = torch.cat([*parts, torch.zeros_like(rows[count])])[order.argsort()]
        weighed = ops.up(done).view(len(x), k, x.shape[1]) * weights[..., None]
        return weighed.sum(1).to(x.dtype)


class ScatterInto(Backend):
    """Results are put into place with index_put and accumulation, transposed matrices before."""

    name = "scatter-into"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        out = torch.zeros_like(ops.up(x))
        for e in range(len(gate_up)):
            token, slot = torch.nonzero(ids == first + e, as_tuple=True)
            gate, up = (x[token] @ gate_up[e].T.contiguous()).chunk(2, -1)
            rows = (F.silu(gate) * up) @ down[e].T.contiguous()
            weighed = ops.up(rows) * weights[token, slot, None]
            out = out.index_put((token,), weighed, accumulate=True)
        return out.to(x.dtype)


class DenseWhere(Backend):
    """Every expert for every token; what was not chosen is left out by a condition."""

    name = "dense-where"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        out = torch.zeros_like(ops.up(x))
        for e in range(len(gate_up)):
            chosen = ids == first + e
            weight = torch.where(chosen, weights, 0.0).sum(1, keepdim=True)
            used = chosen.any(1, keepdim=True)
            # The input too: the gradient of 0 * NaN is NaN.
            rows = ops.up(ops.swiglu_ffn(torch.where(used, x, 0.0), gate_up[e], down[e]))
            out = out + torch.where(used, rows * weight, 0.0)
        return out.to(x.dtype)
