"""How each operation is written in ONNX's standard operators; every builder says its formula first.

What an operation means is `moge_hal.ops`. A builder gets the graph, the operator's arguments
(`Value`s, None and static numbers) and returns the names of its outputs. Whole numbers are int64
inside the graph. Every T works, the empty one included: a Reshape never has to infer a size beside
one that may be zero.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto

from moge_hal.export.graph import Builder, Value

# A masked score; finite, so that a row that sees nothing is no NaN.
LOWEST = float(np.finfo(np.float32).min)


def embed(b: Builder, ids: Value, w: Value) -> str:
    """y[t] = w[ids[t]]."""
    return str(b.Gather(w, ids, axis=0))


def linear(b: Builder, x: Any, w: Any, bias: Value | None = None) -> str:
    """y = x wT + b."""
    return str(b.Gemm(x, w, *([] if bias is None else [bias]), transB=1))


def rms_norm(b: Builder, x: Any, w: Value, eps: float) -> str:
    """y = x / sqrt(mean(x^2) + eps) * w."""
    mean = b.ReduceMean(b.Mul(x, x), axes=[-1], keepdims=1)
    return str(b.Mul(b.Div(x, b.Sqrt(b.Add(mean, float(eps)))), w))


def add_rms_norm(b: Builder, x: Value, residual: Value, w: Value, eps: float) -> tuple[str, str]:
    """s = x + residual; y = rms_norm(s)."""
    total = b.Add(x, residual)
    return rms_norm(b, total, w, eps), total


def rotary(b: Builder, q: Value, k: Value, cos: Value, sin: Value) -> tuple[str, str]:
    """With x = (x1, x2) the halves of a head: y = (x1 cos - x2 sin, x2 cos + x1 sin)."""
    half = q.shape[-1] // 2

    def per_head(table: Value) -> str:
        return str(b.shared("rotary", table.name, lambda: b.Unsqueeze(table, [2])))

    c, s = per_head(cos), per_head(sin)

    def turn(x: Value) -> str:
        x1, x2 = b.Split(x, [half, half], axis=-1, outputs=("first", "second"))
        y1 = b.Sub(b.Mul(x1, c), b.Mul(x2, s))
        y2 = b.Add(b.Mul(x2, c), b.Mul(x1, s))
        return str(b.Concat(y1, y2, axis=-1))

    return turn(q), turn(k)


def attention(b: Builder, q: Value, k: Value, v: Value, positions: Value) -> str:
    """y = softmax(q kT / sqrt(d), over tokens of no later position) v, within one call."""

    def visible() -> tuple[str, str]:
        own = b.Gather(positions, _query_of_row(b, q, k, positions), axis=1)  # [B, S*r]
        held = b.Unsqueeze(positions, [1])  # [B, 1, N]
        valid = b.GreaterOrEqual(positions, 0)
        earlier = b.LessOrEqual(held, b.Unsqueeze(own, [2]))  # [B, S*r, N]
        seen = b.And(earlier, b.Unsqueeze(valid, [1]))
        return valid, b.Unsqueeze(seen, [1])

    key, value = (b.Transpose(x, perm=[0, 2, 1, 3]) for x in (k, v))
    valid, seen = b.shared("visible", (positions.name, _rows(q, k)), visible)
    return _attend(b, q, k, key, value, valid, seen, positions)


def attention_append(
    b: Builder,
    q: Value,
    k: Value,
    v: Value,
    key: Value,
    value: Value,
    seen: Value,
    positions: Value,
) -> tuple[str, str, str]:
    """K = (key, k), V = (value, v); y = softmax(q KT / sqrt(d), over earlier slots, no holes) V."""

    def visible() -> tuple[str, str]:
        valid = b.Concat(seen, b.GreaterOrEqual(positions, 0), axis=1)  # [B, N]
        slot = b.Range(0, b.size(valid, 1), 1)
        own = b.Add(_query_of_row(b, q, k, positions), b.size(seen, 1))  # [S*r]
        earlier = b.LessOrEqual(slot, b.Unsqueeze(own, [1]))  # [S*r, N]
        return valid, b.And(earlier, b.Unsqueeze(valid, [1, 2]))

    keys, values = (
        b.Concat(old, b.Transpose(new, perm=[0, 2, 1, 3]), axis=2, outputs=(name,))
        for old, new, name in ((key, k, "key"), (value, v, "value"))
    )
    valid, mask = b.shared("visible", (positions.name, seen.name, _rows(q, k)), visible)
    return _attend(b, q, k, keys, values, valid, mask, positions), keys, values


def _rows(q: Value, k: Value) -> int:
    """r, the query heads that read one key-value head."""
    return int(q.shape[2] // k.shape[2])


def _query_of_row(b: Builder, q: Value, k: Value, positions: Value) -> str:
    """0 0 .. 1 1 .. S-1: a query's r heads are r rows of the matrix that meets a key-value head."""
    rows = b.Mul(b.size(positions, 1), _rows(q, k))
    return str(b.Div(b.Range(0, rows, 1), _rows(q, k)))


def _attend(
    b: Builder, q: Value, k: Value, key: str, value: str, valid: str, visible: str, positions: Value
) -> str:
    """y = softmax(q keyT / sqrt(d), where visible) value; every key-value head is read once.

    q [B, S, H, d], key and value [B, Hkv, N, d], valid [B, N], visible [1 or B, 1, S*r, N].
    """
    heads, kv_heads, size = q.shape[2], k.shape[2], q.shape[3]
    rows = heads // kv_heads

    def shapes() -> tuple[str, str]:
        batch, length = b.size(positions, 0), b.size(positions, 1)
        merged = b.vector(batch, kv_heads, b.Mul(length, rows), size)
        return merged, b.vector(batch, kv_heads, length, rows, size)

    merged, apart = b.shared("heads", (positions.name, kv_heads, rows, size), shapes)
    grouped = b.Transpose(b.Reshape(q, [0, 0, kv_heads, rows, size]), perm=[0, 2, 1, 3, 4])
    queries = b.Mul(b.Reshape(grouped, merged, allowzero=1), size**-0.5)  # [B, Hkv, S*r, d]
    scores = b.MatMul(queries, b.Transpose(key, perm=[0, 1, 3, 2]))
    weights = b.Softmax(b.Where(visible, scores, LOWEST), axis=-1)
    # 0 * NaN of a slot that nobody wrote would be NaN.
    clean = b.Where(b.Unsqueeze(valid, [1, 3]), value, 0.0)
    mixed = b.Reshape(b.MatMul(weights, clean), apart, allowzero=1)
    return str(b.Reshape(b.Transpose(mixed, perm=[0, 2, 1, 3, 4]), [0, 0, heads, size]))


def swiglu_ffn(b: Builder, x: Value, gate_up: Value, down: Value) -> str:
    """y = (silu(x gateT) * (x upT)) downT."""
    gate, up = b.matrices(gate_up, 2)
    return linear(b, _silu_times(b, linear(b, x, gate), linear(b, x, up)), down)


def _silu_times(b: Builder, gate: str, up: str) -> str:
    """silu(gate) * up, silu(a) = a sigmoid(a)."""
    return str(b.Mul(b.Mul(gate, b.Sigmoid(gate)), up))


def router_logits(b: Builder, x: Value, w: Value) -> str:
    """y = x wT, in float32."""
    return linear(b, x, w)


def route(
    b: Builder,
    logits: Value,
    scale: Value | None,
    bias: Value | None,
    groups: int,
    k: int,
    score: str,
    limit_groups: int | None,
    renormalise: bool,
    factor: float,
) -> tuple[str, str]:
    """s = softmax(logits) or sigmoid(logits); ids = the k/G best of s + bias in every group;
    w = s[ids] * factor * scale[ids], after dividing s[ids] by their sum if renormalise.

    limit_groups = n: ids = the k best of the n groups whose two best sum highest. On a tie ONNX's
    TopK gives the lowest index.
    """
    experts = logits.shape[1]
    members = experts // groups
    scores = b.Softmax(logits, axis=-1) if score == "softmax" else b.Sigmoid(logits)
    # As in ops.route: logits rank alike, and do not tie where scores underflow.
    ranked = logits if bias is None and limit_groups is None else scores
    order = ranked if bias is None else b.Add(ranked, bias)
    grouped = b.Reshape(order, [-1, groups, members])
    if limit_groups is None:
        best = _best(b, grouped, k // groups)[1]
        start = np.arange(0, experts, members).reshape(1, groups, 1)
        ids = b.Reshape(b.Add(best, start), [-1, k], outputs=("ids",))
    else:
        pairs = b.ReduceSum(_best(b, grouped, min(2, members))[0], [-1], keepdims=0)
        chosen = b.Unsqueeze(_best(b, pairs, limit_groups)[1], [2])  # [T, n, 1]
        hits = b.Cast(b.Equal(chosen, np.arange(groups)), to=TensorProto.FLOAT)
        kept = b.Greater(b.ReduceSum(hits, [1], keepdims=0), 0.0)  # [T, G]
        rivals = b.Where(b.Unsqueeze(kept, [2]), grouped, float("-inf"))
        _, ids = _best(b, b.Reshape(rivals, [-1, experts]), k, ("scores", "ids"))
    weights = b.GatherElements(scores, ids, axis=1)
    if renormalise:
        weights = b.Div(weights, b.ReduceSum(weights, [-1], keepdims=1))
    if factor != 1.0:
        weights = b.Mul(weights, float(factor))
    if scale is not None:
        weights = b.Mul(weights, b.Gather(scale, ids, axis=0))
    return ids, weights


def _best(
    b: Builder, x: str, count: int, outputs: tuple[str, str] = ("best", "index")
) -> tuple[str, str]:
    values, index = b.TopK(x, [count], axis=-1, largest=1, sorted=1, outputs=outputs)
    return values, index


def experts(
    b: Builder, x: Value, gate_up: Value, down: Value, ids: Value, weights: Value, first: int
) -> str:
    """y[t] = sum over j of weights[t, j] * swiglu_ffn(x[t]; expert ids[t, j]), over the experts
    first .. first + El - 1 that are here.

    The (token, expert) rows are sorted by expert and cut with ONE Split whose sizes are computed,
    so an expert does the work of its own rows and none touches another's: T*K rows in all, whatever
    E. Rows of experts that lie elsewhere never enter.
    """
    local, hidden, _ = down.shape
    k = ids.shape[1]
    expert = b.Reshape(ids, [-1])  # [T*K]
    total = b.Shape(expert)
    hits = b.Equal(b.Unsqueeze(expert, [1]), np.arange(first, first + local))
    counts = b.ReduceSum(b.Cast(hits, to=TensorProto.INT64), [0], keepdims=0, outputs=("counts",))
    before = b.ReduceSum(b.Cast(b.Less(expert, first), to=TensorProto.INT64), [0], keepdims=1)
    here = b.ReduceSum(counts, [0], keepdims=1)
    _, order = b.TopK(expert, total, axis=0, largest=0, sorted=1, outputs=("sorted", "order"))
    mine = b.Slice(order, before, b.Add(before, here))  # places among the T*K, in order of expert
    sorted_rows = b.Gather(x, b.Div(mine, k), axis=0)
    parts = b.Split(sorted_rows, counts, axis=0, outputs=("rows",) * local)
    parts = [parts] if local == 1 else parts
    halves = b.matrices(gate_up, 2 * local)
    gates, ups, downs = [], [], []
    for e, part in enumerate(parts):
        with b.scope(str(first + e)):
            gates.append(linear(b, part, halves[2 * e]))
            ups.append(linear(b, part, halves[2 * e + 1]))
    # Between the products an expert is no matter: once over all rows, not three nodes an expert.
    inner = _silu_times(b, b.Concat(*gates, axis=0), b.Concat(*ups, axis=0))
    parts = b.Split(inner, counts, axis=0, outputs=("inner",) * local)
    parts = [parts] if local == 1 else parts
    for e, (part, matrix) in enumerate(zip(parts, b.matrices(down, local), strict=True)):
        with b.scope(str(first + e)):
            downs.append(linear(b, part, matrix))
    shares = b.Gather(b.Reshape(weights, [-1]), mine, axis=0)
    weighted = b.Mul(b.Concat(*downs, axis=0), b.Unsqueeze(shares, [1]))
    # Back to the order of tokens; a row that lies elsewhere reads the row of zeros at the end.
    padded = b.Concat(weighted, np.zeros((1, hidden), np.float32), axis=0)
    source = b.ScatterElements(
        b.Expand(here, total), mine, b.Range(0, b.Squeeze(here, [0]), 1), axis=0
    )
    rows = b.Reshape(b.Gather(padded, source, axis=0), [-1, k, hidden])
    return str(b.ReduceSum(rows, [1], keepdims=0))


def split_mask(
    b: Builder, attention_mask: Value, position_ids: Value, key: Value
) -> tuple[str, str]:
    """seen = mask[:, :P] != 0; positions = position_ids where mask[:, P:] != 0, else -1."""
    past = b.Slice(b.Shape(key), [2], [3])
    mask = b.Cast(attention_mask, to=TensorProto.BOOL)
    seen = b.Slice(mask, [0], past, [1], outputs=("seen",))
    now = b.Slice(mask, past, b.Slice(b.Shape(mask), [1], [2]), [1])
    return b.Where(now, position_ids, -1, outputs=("positions",)), seen


BUILDERS: dict[str, Callable[..., str | tuple[str, ...]]] = {
    f.__name__: f
    for f in (
        embed,
        linear,
        rms_norm,
        add_rms_norm,
        rotary,
        attention,
        attention_append,
        swiglu_ffn,
        router_logits,
        route,
        experts,
        split_mask,
    )
}
