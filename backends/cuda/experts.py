"""Experts without a look at the routes: every shape follows from T, K and E.

The specification asks the device which tokens chose an expert (`nonzero`), and waits for the answer
E times a layer. Here the host knows nothing of the routes, at a price in work that nobody asked
for. A grouped product that keeps its offsets on the device would be free of it; torch's
(torch.nn.functional.grouped_mm) does, in bfloat16 and on some GPUs only, and reads them on the host
elsewhere: it is not used before somebody has measured it on a GPU.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moge_hal.ops import up


def slot_by_slot(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, first: int
) -> Tensor:
    """For a few tokens: every token's first expert is copied out and applied to it, then its
    second, and so on.

    Shapes as in `ops.experts`. Memory: T experts.
    """
    local = ids.long() - first
    here = (local >= 0) & (local < len(gate_up))
    local = local.clamp(0, len(gate_up) - 1)  # of another rank: any, since its result is dropped
    out = torch.zeros_like(up(x))
    for slot in range(ids.shape[1]):
        chosen = local[:, slot]
        gate, up_ = torch.bmm(gate_up.index_select(0, chosen), x[:, :, None]).chunk(2, 1)
        rows = torch.bmm(down.index_select(0, chosen), F.silu(gate) * up_)[:, :, 0]
        # Dropped, and not weighed with 0: 0 * NaN is NaN.
        out = out + torch.where(here[:, slot, None], up(rows) * weights[:, slot, None], 0)
    return out.to(x.dtype)


def expert_by_expert(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    first: int,
    swiglu_ffn: Callable[..., Tensor],
) -> Tensor:
    """For many tokens: every expert is applied to all of them, and what nobody chose is dropped.

    Shapes as in `ops.experts`. E/K times the products that are asked for (8 times in Pangu Pro
    MoE). Memory: what one expert makes of all tokens, about T*(3F + 2D) numbers.
    """
    out = torch.zeros_like(up(x))
    for e, (gate_up_e, down_e) in enumerate(zip(gate_up.unbind(0), down.unbind(0), strict=True)):
        chose = ids == first + e
        weight = torch.where(chose, weights, 0).sum(1, keepdim=True)
        rows = up(swiglu_ffn(x, gate_up_e, down_e)) * weight
        out = torch.where(chose.any(1, keepdim=True), out + rows, out)
    return out.to(x.dtype)
