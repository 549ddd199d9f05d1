"""The ten operations a second time: numpy, float64, no torch, written from the documentation alone.

Nothing is shared with `ops.py`, so an error of the specification, which is its own oracle, shows as
a difference. Slow and literal on purpose: a loop over tokens where a vector would hide the rule.
Arguments are those of `ops.py` by name, as arrays; every function returns a tuple of its outputs.
Letters as there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer[Any]]
# What each row of a batch has in its cache: position -> its key and value, [Hkv, d] each.
Past = list[dict[int, tuple[Array, Array]]]


def embed(ids: Ints, w: Array) -> tuple[Array]:
    """ids [T], w [V, D] -> [T, D]."""
    y = np.zeros((len(ids), w.shape[1]))
    for t, i in enumerate(ids):
        y[t] = w[i]
    return (y,)


def linear(x: Array, w: Array, b: Array | None = None) -> tuple[Array]:
    """x [T, I], w [O, I], b [O] -> [T, O]."""
    y = np.einsum("ti,oi->to", x, w)
    return (y if b is None else y + b,)


def rms_norm(x: Array, w: Array, eps: float) -> tuple[Array]:
    """x [T, D], w [D] -> [T, D]; epsilon inside the square root."""
    y = np.zeros_like(x)
    for t, row in enumerate(x):
        mean_square = float((row**2).sum()) / len(row)
        y[t] = w * row / (mean_square + eps) ** 0.5
    return (y,)


def add_rms_norm(x: Array, residual: Array, w: Array, eps: float) -> tuple[Array, Array]:
    """The norm of the sum, and the sum."""
    total = residual + x
    return rms_norm(total, w, eps)[0], total


def rotary(q: Array, k: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """Elements i and i + d/2 of a head are a complex number, turned by an angle: q [B, S, H, d], k
    [B, S, Hkv, d], cos and sin [B, S, d/2].
    """
    turn = (cos + 1j * sin)[:, :, None, :]
    half = cos.shape[-1]
    turned = ((x[..., :half] + 1j * x[..., half:]) * turn for x in (q, k))
    first, second = (np.concatenate([z.real, z.imag], -1) for z in turned)
    return first, second


def attention(
    q: Array,
    k: Array,
    v: Array,
    cache: Past | None,
    positions: Ints,
) -> tuple[Array]:
    """q [B, S, H, d], k and v [B, S, Hkv, d], positions [B, S] -> [B, S, H, d].

    The cache is filled. A padding token (position -1) gives zeros here; the specification promises
    no more than a finite number.
    """
    rows, length, heads, size = q.shape
    share = heads // k.shape[2]  # this many query heads read one key-value head
    past: Past = [{} for _ in range(rows)] if cache is None else cache
    y = np.zeros_like(q)
    for b in range(rows):
        for s in range(length):
            if positions[b, s] >= 0:
                past[b][int(positions[b, s])] = (k[b, s], v[b, s])
        for s in range(length):
            seen = [pair for place, pair in past[b].items() if place <= positions[b, s]]
            for h in range(heads if seen else 0):
                dots = np.array([float(q[b, s, h] @ key[h // share]) for key, _ in seen])
                share_of = np.exp((dots - dots.max()) / size**0.5)
                for weight, (_, value) in zip(share_of / share_of.sum(), seen, strict=True):
                    y[b, s, h] += weight * value[h // share]
    return (y,)


def swiglu_ffn(x: Array, gate_up: Array, down: Array) -> tuple[Array]:
    """x [T, D], gate_up [2F, D] (gate first), down [D, F] -> [T, D]."""
    width = down.shape[1]
    gate = np.einsum("td,fd->tf", x, gate_up[:width])
    up = np.einsum("td,fd->tf", x, gate_up[width:])
    with np.errstate(over="ignore"):  # exp of a very negative gate is infinite, and its silu 0
        silu = gate / (1 + np.exp(-gate))
    return (np.einsum("tf,df->td", silu * up, down),)


def router_logits(x: Array, w: Array) -> tuple[Array]:
    """x [T, D], w [E, D] -> [T, E]."""
    return linear(x, w)


def score(logits: Array, kind: str) -> Array:
    """Of every expert: softmax over all of them, or the sigmoid of each; [T, E]."""
    if kind == "sigmoid":
        with np.errstate(over="ignore"):  # exp may be infinite: the sigmoid is then 0
            return np.asarray(1 / (1 + np.exp(-logits)))
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def best(worth: Any, some: Sequence[int], count: int) -> list[int]:
    """The `count` indices, of some, whose worth is greatest; of equal ones the lowest."""
    return sorted(some, key=lambda i: (-worth[i], i))[:count]


def route(
    logits: Array, spec: Any, scale: Array | None = None, bias: Array | None = None
) -> tuple[Ints, Array]:
    """logits [T, E], scale and bias [E] -> ids [T, K], weights [T, K]. spec: a `RouteSpec`."""
    tokens, experts = logits.shape
    scores = score(logits, spec.score)
    # Scores follow their logits but may be equal where these are not (0 and 1 end their range).
    # Only exactly equal logits tie, so the logits decide as long as nothing is added or summed.
    alone = bias is None and spec.limit_groups is None
    rank = logits if alone else scores if bias is None else scores + bias
    members = experts // spec.groups
    ids, weights = np.zeros((tokens, spec.k), np.int32), np.zeros((tokens, spec.k))
    groups = [list(range(g * members, (g + 1) * members)) for g in range(spec.groups)]
    for t in range(tokens):
        if spec.limit_groups is None:  # MoGE: as many of each group
            chosen = [e for group in groups for e in best(rank[t], group, spec.k // spec.groups)]
        else:  # DeepSeek-V3: the best of the best groups
            worth = [sum(rank[t, e] for e in best(rank[t], group, 2)) for group in groups]
            kept = best(worth, range(spec.groups), spec.limit_groups)
            chosen = best(rank[t], [e for g in kept for e in groups[g]], spec.k)
        total = sum(scores[t, e] for e in chosen) if spec.renormalise else 1.0
        for slot, e in enumerate(chosen):
            ids[t, slot] = e
            weights[t, slot] = (
                scores[t, e] / total * spec.factor * (1 if scale is None else scale[e])
            )
    return ids, weights


def experts(
    x: Array, gate_up: Array, down: Array, ids: Ints, weights: Array, first: int = 0
) -> tuple[Array]:
    """x [T, D], gate_up [El, 2F, D], down [El, D, F], ids and weights [T, K] -> [T, D]: the part of
    experts first .. first + El - 1.
    """
    y = np.zeros_like(x)
    for t, row in enumerate(x):
        for e, weight in zip(ids[t], weights[t], strict=True):
            local = int(e) - first
            if 0 <= local < len(gate_up):
                y[t] += weight * swiglu_ffn(row[None], gate_up[local], down[local])[0][0]
    return (y,)


OPERATIONS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "embed": embed,
    "linear": linear,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "rotary": rotary,
    "attention": attention,
    "swiglu_ffn": swiglu_ffn,
    "router_logits": router_logits,
    "route": route,
    "experts": experts,
}
