"""The CPU backend: oneDNN's packed weights, rows sorted by expert, attention over the written part
of the cache.

Pure torch, no compiler needed. A weight is reordered once, when the model is bound, into the panels
that oneDNN's matrix product wants, which at one token saves the strided walk over a weight that is
read only once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moge_hal.backend import Backend, Facts, Probe
from moge_hal.cache import LayerCache
from moge_hal.ops import up

PACKED = ("linear", "swiglu_ffn")
PACKABLE = (torch.float32, torch.bfloat16)
# oneDNN chooses a panel layout for a number of rows; it stays correct, and was fastest here, for
# any.
PANEL_ROWS = 64


class CpuBackend(Backend):
    name = "cpu"

    def probe(self) -> Probe:
        found = super().probe()
        if not found.ok:
            return found
        level = torch.backends.cpu.get_cpu_capability()
        threads = torch.get_num_threads()
        return Probe(True, device=f"CPU, {threads} thread{'s' if threads > 1 else ''}, {level}")

    def why_not(self, facts: Facts) -> str | None:
        if facts.op in PACKED:
            if facts.training:
                return "oneDNN's packed weights have no gradient"
            return _why_not_packed(facts.dtype)
        return None

    def pack(self, role: str, weight: Tensor) -> Any:
        if weight.dim() < 2 or _why_not_packed(weight.dtype):
            return weight
        if role.startswith("experts."):
            return [_packed(w) for w in weight.unbind(0)]
        return _packed(weight)

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return _linear(x, w, b)

    def swiglu_ffn(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        return _swiglu_ffn(x, gate_up, down)

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        """Rows sorted by expert: each weight is read once, and only if some token chose it."""
        tokens, k = ids.shape
        count = len(gate_up)
        if not isinstance(gate_up, list):
            # unbind, not [e]: the gradient of an index would fill a tensor of all experts for each.
            gate_up, down = gate_up.unbind(0), down.unbind(0)
        local = ids.flatten().long() - first
        local = torch.where((local >= 0) & (local < count), local, count)  # other ranks' rows last
        order = local.argsort(stable=True)
        rows = torch.bincount(local, minlength=count + 1).tolist()
        parts = x.index_select(0, order // k).split(rows)
        done = [
            _swiglu_ffn(part, gate_up_e, down_e)
            for part, gate_up_e, down_e in zip(parts, gate_up, down, strict=False)
            if len(part)
        ]
        if rows[count]:  # what other ranks' ids weigh is none of this rank's business, be it NaN
            weights = weights.masked_fill((local == count).view_as(ids), 0)
        done.append(x.new_zeros(rows[count], x.shape[1], dtype=done[0].dtype if done else x.dtype))
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        chosen = torch.cat(done).index_select(0, place).view(tokens, k, x.shape[1])
        return (up(chosen) * weights[..., None]).sum(1).to(x.dtype)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, LayerCache | None]:
        """The usual case, all rows at the same positions, needs no mask over the whole cache."""
        length = q.shape[1]
        start = int(positions[0, 0]) if positions.numel() else -1
        if start < 0 or not torch.equal(
            positions, torch.arange(start, start + length).expand_as(positions)
        ):
            return super().attention(q, k, v, cache, positions)
        if cache is not None:
            cache.k[:, start : start + length] = k
            cache.v[:, start : start + length] = v
            k, v = cache.k[:, : start + length], cache.v[:, : start + length]
        return _attend(q, k, v), cache


def _why_not_packed(dtype: torch.dtype) -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    if dtype not in PACKABLE:
        return f"oneDNN packs float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 for this processor (it needs AVX-512 or its like)"
    return None


def _packed(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PANEL_ROWS)
    return packed


def _linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    if not w.is_mkldnn:
        return F.linear(x, w, b)
    b = None if b is None else b.contiguous()  # it reads the storage, whatever the strides
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
    return y


def _swiglu_ffn(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up_ = _linear(x, gate_up).chunk(2, -1)
    return _linear(F.silu(gate) * up_, down)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last S positions over all N: q [B, S, H, d], k and v [B, N, Hkv, d]
    -> [B, S, H, d].
    """
    batch, length, heads, size = q.shape
    span, kv_heads = k.shape[1:3]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if length == 1:
        # The query heads of a key-value head become rows of one product: no mask, no repeated keys.
        rows = q.view(batch, kv_heads, heads // kv_heads, size)
        return F.scaled_dot_product_attention(rows, k, v).view(q.shape)
    mask = None
    if span > length:
        mask = torch.ones(length, span, dtype=torch.bool, device=q.device).tril(span - length)
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return mixed.transpose(1, 2)
