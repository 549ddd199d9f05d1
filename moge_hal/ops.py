"""What every operation means, in plain torch. These functions ARE the specification.

Each is the default of every backend and, run in float64, the oracle of every test, so nothing here
may fall to float32 when it is given float64: `up` widens to at least float32 and never narrows.
Composites take the operation that they are made of as a keyword, so that a backend that overrides
the part has overridden it inside the whole.

Letters: T tokens, B batch, S sequence, N key slots, D hidden, F expert intermediate, E experts, G
groups, K experts per token, H heads, Hkv key-value heads, d head size, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moge_hal.cache import LayerCache
from moge_hal.router import RouteSpec

NAMES = (
    "embed",
    "linear",
    "rms_norm",
    "add_rms_norm",
    "rotary",
    "attention",
    "swiglu_ffn",
    "router_logits",
    "route",
    "experts",
)


def up(x: Tensor) -> Tensor:
    """At least float32; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def embed(ids: Tensor, w: Tensor) -> Tensor:
    """Rows of a table: ids [T] int, w [V, D] -> [T, D]."""
    return F.embedding(ids, w)


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x wT + b: x [T, I], w [O, I], b [O] -> [T, O]."""
    return F.linear(x, w, b)


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * w over the last axis, inside at least float32, rounded once: x
    [T, D], w [D] -> [T, D].
    """
    h = up(x)
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * up(w)).to(x.dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    w: Tensor,
    eps: float,
    *,
    rms_norm: Callable[..., Tensor] = rms_norm,
) -> tuple[Tensor, Tensor]:
    """x, residual [T, D] -> (rms_norm(x + residual), x + residual)."""
    total = x + residual
    return rms_norm(total, w, eps), total


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding over the whole head, half-split: element i is paired with element i + d/2
    (not with i + 1).

    q [B, S, H, d], k [B, S, Hkv, d], cos and sin [B, S, d/2] of each token's position.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]

    def turn(x: Tensor) -> Tensor:
        a, b = up(x).chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    return turn(q), turn(k)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, positions: Tensor
) -> tuple[Tensor, LayerCache | None]:
    """Grouped-query attention, causal by position; query head h reads key-value head h // (H/Hkv).

    q [B, S, H, d], k and v [B, S, Hkv, d], positions [B, S] int, -1 = padding -> [B, S, H, d],
    cache. The cache keeps position p in slot p and is written in place (it is donated); without one
    the call's own keys are all there is. A padding token is neither written nor seen, and its own
    output is finite. Slots that were never written may hold anything, NaN included. Scores are
    rounded to the dtype, the softmax is at least float32.
    """
    batch, length, heads, size = q.shape
    if cache is None:
        held = positions
    else:
        rows = torch.arange(batch, device=q.device)[:, None]
        bin_slot = cache.k.shape[1] - 1  # one slot more than the capacity: where padding goes
        slots = torch.where(positions < 0, bin_slot, positions)
        cache.k[rows, slots] = k
        cache.v[rows, slots] = v
        k, v = cache.k[:, :-1], cache.v[:, :-1]
        held = torch.arange(k.shape[1], device=q.device).expand(batch, -1)
    visible = (held[:, None] >= 0) & (held[:, None] <= positions[:, :, None])  # [B, S, N]
    # A masked score alone would not do: 0 * NaN of a slot that nobody wrote is NaN.
    v = v.masked_fill(~visible.any(1)[:, :, None, None], 0)
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, size)
    # q is divided, not the product, which float16 cannot always hold.
    scores = torch.einsum("bsgrd,bngd->bgrsn", grouped / math.sqrt(size), k)
    lowest = torch.finfo(scores.dtype).min  # finite, so that a row with nothing to see is no NaN
    scores = scores.masked_fill(~visible[:, None, None], lowest)
    mixed = torch.einsum("bgrsn,bngd->bsgrd", up(scores).softmax(-1).to(v.dtype), v)
    return mixed.reshape(q.shape), cache


def swiglu_ffn(
    x: Tensor, gate_up: Tensor, down: Tensor, *, linear: Callable[..., Tensor] = linear
) -> Tensor:
    """(silu(x gateT) * (x upT)) downT: x [T, D], gate_up [2F, D] (gate rows first), down [D, F] ->
    [T, D].
    """
    gate, up_ = linear(x, gate_up).chunk(2, -1)
    return linear(F.silu(gate) * up_, down)


def router_logits(x: Tensor, w: Tensor) -> Tensor:
    """x wT inside at least float32 whatever the dtype of the model: x [T, D], w [E, D] -> [T, E]
    float32.

    Logits in bfloat16 change a selected expert for 1.7-3.5 % of the tokens of a layer and tie
    exactly in 0.4-0.9 % of groups.
    """
    with torch.autocast(x.device.type, enabled=False):  # not even training's may narrow it
        return F.linear(up(x), up(w))


def route(
    logits: Tensor, spec: RouteSpec, scale: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which experts, and with what weight: logits [T, E], scale and bias [E] -> ids [T, K] int32,
    weights [T, K].

    score = softmax over all experts or sigmoid; bias is added for the selection only; ids come
    group by group, best first, and on exactly equal logits the lowest index wins. weight =
    score[id], renormalised if the spec says so, times spec.factor, times scale[id] (MoGE's
    router_scale: it does not take part in the selection). Weights are at least float32.
    """
    tokens, experts = logits.shape
    eligible = (spec.limit_groups or spec.groups) * (experts // spec.groups)
    if experts % spec.groups or spec.k > eligible:
        raise ValueError(f"{spec} cannot choose among {experts} experts")
    scores = up(logits).softmax(-1) if spec.score == "softmax" else up(logits).sigmoid()
    # Both scores rise with their logit, so logits rank alike, and do not tie where scores underflow
    # to 0 or saturate at 1.
    ranked = up(logits) if bias is None and spec.limit_groups is None else scores
    order = ranked.detach() if bias is None else ranked.detach() + up(bias)
    grouped = order.view(tokens, spec.groups, experts // spec.groups)
    if spec.limit_groups is None:
        best = _best(grouped, spec.k // spec.groups)
        start = torch.arange(0, experts, experts // spec.groups, device=logits.device)
        ids = (best + start[:, None]).flatten(1)
    else:
        pairs = grouped.sort(-1, descending=True).values[..., :2].sum(-1)
        kept = torch.zeros_like(pairs, dtype=torch.bool)
        kept = kept.scatter(1, _best(pairs, spec.limit_groups), True)
        ids = _best(grouped.masked_fill(~kept[..., None], -math.inf).flatten(1), spec.k)
    weights = scores.gather(1, ids)
    if spec.renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    if spec.factor != 1.0:
        weights = weights * spec.factor
    if scale is not None:
        weights = weights * up(scale)[ids]
    return ids.int(), weights


def _best(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest along the last axis, ties to the lowest. Not torch.topk: it breaks
    ties arbitrarily.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    first: int = 0,
    *,
    swiglu_ffn: Callable[..., Tensor] = swiglu_ffn,
) -> Tensor:
    """Sum over a token's experts of weight * swiglu_ffn: x [T, D], gate_up [El, 2F, D], down [El,
    D, F], ids and weights [T, K].

    The weights given are those of experts first .. first + El - 1; an id outside adds nothing.
    Summing the results of all ranks is expert parallelism. Only selected experts are computed, so a
    NaN in another one cannot leak. -> [T, D]
    """
    out = torch.zeros_like(up(x))
    for e, (gate_up_e, down_e) in enumerate(zip(gate_up.unbind(0), down.unbind(0), strict=True)):
        token, slot = torch.nonzero(ids == first + e, as_tuple=True)
        rows = up(swiglu_ffn(x[token], gate_up_e, down_e)) * weights[token, slot, None]
        out = out.index_add(0, token, rows)
    return out.to(x.dtype)
