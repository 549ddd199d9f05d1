"""The whole model against a slow program, written from the paper and the names of the weights; and
the rules of a step: caches, padding, errors before anything is written.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moge_hal.backend import Backend
from moge_hal.bind import bind
from moge_hal.config import preset
from moge_hal.errors import CacheFullError, UserError
from moge_hal.model import skeleton
from moge_hal.registry import get_backend
from moge_hal.runtime import Model
from moge_hal.training.init import initial_weights

TINY = preset("tiny")
Array = npt.NDArray[np.float64]
Weights = dict[str, Tensor]


def silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)))


def norm(x: Array, w: Array) -> Array:
    return np.asarray(x / np.sqrt((x * x).mean() + TINY.rms_norm_eps) * w)


def turn(x: Array, position: int) -> Array:
    """Rotary embedding of one head [d]."""
    half = len(x) // 2
    angle = position * TINY.rope_theta ** (-np.arange(half) / half)
    a, b = x[:half], x[half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)]
    )


def experts_of(scores: Array) -> list[int]:
    """The k best of each group, in ascending order of group, best first."""
    members, k = TINY.num_experts // TINY.num_groups, TINY.num_experts_per_tok // TINY.num_groups
    return [
        e
        for g in range(TINY.num_groups)
        for e in sorted(range(g * members, (g + 1) * members), key=lambda e: -scores[e])[:k]
    ]


def slow_model(weights: Weights, ids: Sequence[int]) -> tuple[Array, list[list[list[int]]]]:
    """Token by token: ids [S] -> logits [S, V], the experts of every layer and token."""
    w: dict[str, Array] = {name: tensor.double().numpy() for name, tensor in weights.items()}
    heads, kv, d = TINY.num_attention_heads, TINY.num_key_value_heads, TINY.head_dim
    past: list[list[tuple[Array, Array]]] = [[] for _ in range(TINY.num_hidden_layers)]
    routes: list[list[list[int]]] = [[] for _ in past]
    logits = []
    for position, token in enumerate(ids):
        x = w["embed_tokens.weight"][token]
        for layer in range(TINY.num_hidden_layers):
            at = f"layers.{layer}."

            def project(name: str, vector: Array, at: str = at) -> Array:
                return (
                    w[f"{at}self_attn.{name}_proj.weight"] @ vector
                    + w[f"{at}self_attn.{name}_proj.bias"]
                )

            h = norm(x, w[at + "input_layernorm.weight"])
            q, k, v = (project(name, h).reshape(-1, d) for name in "qkv")
            q, k = (np.stack([turn(head, position) for head in z]) for z in (q, k))
            past[layer].append((k, v))
            mixed = []
            for head in range(heads):
                i = head // (heads // kv)
                scores = np.array([q[head] @ k[i] for k, _ in past[layer]]) / math.sqrt(d)
                shares = np.exp(scores - scores.max())
                mixed.append(
                    sum(s * v[i] for s, (_, v) in zip(shares, past[layer], strict=True))
                    / shares.sum()
                )
            x = x + project("o", np.concatenate(mixed))
            h = norm(x, w[at + "post_attention_layernorm.weight"])
            z = np.exp(w[at + "mlp.gate.weight"] @ h)
            chosen = experts_of(z)
            routes[layer].append(chosen)

            def expert(gate_up: Array, down: Array, h: Array = h) -> Array:
                gate, up = np.split(gate_up @ h, 2)
                return np.asarray(down @ (silu(gate) * up))

            for e in chosen:
                weight = z[e] / z.sum() * w[at + "mlp.router_scale"][e]
                x = x + weight * expert(
                    w[at + "mlp.experts.gate_up"][e], w[at + "mlp.experts.down"][e]
                )
            x = x + expert(w[at + "mlp.shared_expert.gate_up"], w[at + "mlp.shared_expert.down"])
        logits.append(w["lm_head.weight"] @ norm(x, w["norm.weight"]))
    return np.array(logits), routes


def tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, TINY.vocab_size, shape, generator=generator)


@pytest.fixture(scope="module")
def exact(weights: Weights) -> Model:
    """The oracle: the default backend in float64."""
    return bind(TINY, weights, Backend(), dtype=torch.float64)


def test_the_model_is_the_papers(exact: Model, weights: Weights) -> None:
    ids = tokens(2, 13)
    out = exact.step(ids, torch.arange(13).expand(2, 13), None)
    for row in range(2):
        expected, routes = slow_model(weights, ids[row].tolist())
        np.testing.assert_allclose(out.logits[row].numpy(), expected, rtol=1e-11, atol=1e-11)
        assert out.routes.view(TINY.num_hidden_layers, 2, 13, -1)[:, row].tolist() == routes
    assert out.routes.dtype == torch.int32
    assert out.cache is None


@pytest.mark.parametrize("backend", ["null", "cpu"])
def test_float32_is_near_float64_and_logits_are_float32(
    backend: str, exact: Model, weights: Weights
) -> None:
    model = bind(TINY, weights, get_backend(backend))
    ids = tokens(3, 21, seed=1)
    logits, expected = model(ids), exact(ids)
    assert (logits.dtype, expected.dtype) == (torch.float32, torch.float64)
    assert logits.shape == (3, 21, TINY.vocab_size)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_a_narrow_model_are_float32(dtype: torch.dtype, weights: Weights) -> None:
    model = bind(TINY, weights, Backend(), dtype=dtype)
    assert model([[1, 2, 3]]).dtype == torch.float32
    assert model.new_cache(1, 4).layers[0].k.dtype == dtype


@pytest.mark.parametrize("backend", ["null", "cpu"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_cut_and_any_padding_is_one_pass(
    backend: str, data: st.DataObject, weights: Weights
) -> None:
    """Rows of different lengths, cut into calls of different widths, padded on either side."""
    model = bind(TINY, weights, get_backend(backend), dtype=torch.float64)
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    rows = [tokens(n, seed=100 + n) for n in lengths]
    expected = [model(row[None])[0] for row in rows]
    cache: Any = model.new_cache(len(rows), max(lengths))
    cuts = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in lengths]
    bounds = [pairwise([0, *cut, n]) for cut, n in zip(cuts, lengths, strict=True)]
    for spans in zip(*bounds, strict=True):
        width = max(1, *(stop - start for start, stop in spans), data.draw(st.integers(0, 3)))
        left = data.draw(st.booleans())
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        positions = torch.full(ids.shape, -1)
        columns = []
        for b, (start, stop) in enumerate(spans):
            n = stop - start
            columns.append(slice(width - n, width) if left else slice(0, n))
            ids[b, columns[b]] = rows[b][start:stop]
            positions[b, columns[b]] = torch.arange(start, stop)
        out = model.step(ids, positions, cache)
        cache = out.cache
        assert out.logits.isfinite().all()
        for b, (start, stop) in enumerate(spans):
            got = out.logits[b, columns[b]]
            assert torch.allclose(got, expected[b][start:stop], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["null", "cpu"])
def test_last_only_is_the_last_column(backend: str, weights: Weights) -> None:
    model = bind(TINY, weights, get_backend(backend), dtype=torch.float64)
    ids, positions = tokens(2, 5), torch.arange(5).expand(2, 5)
    whole, last = (model.step(ids, positions, None, flag) for flag in (False, True))
    assert last.logits.shape == (2, 1, TINY.vocab_size)
    assert (last.logits[:, 0] - whole.logits[:, -1]).abs().max() < 1e-12
    assert torch.equal(last.routes, whole.routes)


@pytest.mark.parametrize("backend", ["null", "cpu"])
@pytest.mark.parametrize("shape", [(1, 0), (0, 3)])
def test_no_tokens_are_no_logits(backend: str, shape: tuple[int, int], weights: Weights) -> None:
    model = bind(TINY, weights, get_backend(backend))
    nothing = torch.zeros(shape, dtype=torch.int64)
    out = model.step(nothing, nothing, None)
    assert out.logits.shape == (*shape, TINY.vocab_size)
    assert out.routes.shape == (TINY.num_hidden_layers, 0, TINY.num_experts_per_tok)


def test_nested_lists_are_rows(exact: Model) -> None:
    assert torch.equal(exact([[1, 2], [3, 4]]), exact(torch.tensor([[1, 2], [3, 4]])))
    for wrong in ([1, 2], 3, [[[1]]]):
        with pytest.raises(UserError, match=r"input_ids must have shape \[B, S\], not"):
            exact(wrong)  # type: ignore[arg-type]
    for ragged in ([[1, 2], [3]], [["a"]]):
        with pytest.raises(UserError, match="input_ids must be rows of ids of one length"):
            exact(ragged)  # type: ignore[arg-type]


LONG = TINY.max_position_embeddings


@pytest.mark.parametrize("backend", ["null", "cpu"])
@pytest.mark.parametrize(
    ("ids", "positions", "kind", "words"),
    [
        ([1, 2], [3, 4], UserError, r"must both have shape \[B, S\], not \[2\] and \[2\]"),
        ([[1, 2]], [[3]], UserError, r"must both have shape \[B, S\], not \[1, 2\] and \[1, 1\]"),
        ([[1.0]], [[3]], UserError, "must be whole numbers"),
        ([[1]], [[3.0]], UserError, "must be whole numbers"),
        ([[259]], [[3]], UserError, "token id 259 is outside the vocabulary of 259"),
        ([[-1, 5]], [[3, 4]], UserError, "token id -1 is outside the vocabulary of 259"),
        ([[5, 6]], [[7, 8]], CacheFullError, "position 8 does not fit into a cache of 8 positions"),
        ([[5], [6]], [[3], [3]], UserError, "the cache is for 1 rows, .* have 2"),
    ],
)
def test_a_step_that_is_refused_has_written_nothing(
    backend: str, ids: Any, positions: Any, kind: type[Exception], words: str, weights: Weights
) -> None:
    model = bind(TINY, weights, get_backend(backend))
    cache = model.step(tokens(1, 3), torch.arange(3)[None], model.new_cache(1, 8)).cache
    before = [slots.clone() for layer in cache.layers for slots in layer]
    with pytest.raises(kind, match=words):
        model.step(torch.tensor(ids), torch.tensor(positions), cache)
    for old, slots in zip(before, (s for layer in cache.layers for s in layer), strict=True):
        assert torch.equal(old, slots)
    model.step(torch.tensor([[5]]), torch.tensor([[3]]), cache)  # and it can still be used


def test_the_context_ends_where_the_configuration_says(exact: Model) -> None:
    ids, last = torch.tensor([[7]]), torch.tensor([[LONG - 1]])
    assert exact.step(ids, last, exact.new_cache(1)).logits.isfinite().all()
    with pytest.raises(
        UserError, match=f"position {LONG} lies beyond the context of {LONG} tokens"
    ):
        exact.step(ids, last + 1, None)


def test_a_cache_holds_what_it_was_asked_to(exact: Model) -> None:
    assert exact.new_cache(3).capacity == LONG
    cache = exact.new_cache(3, 5)
    assert (cache.capacity, len(cache.layers)) == (5, TINY.num_hidden_layers)
    assert all(not slots.any() for layer in cache.layers for slots in layer)
    for batch, capacity in ((1, 0), (0, 5), (2, -1)):
        with pytest.raises(UserError, match="at least 1"):
            exact.new_cache(batch, capacity)


def test_router_logits_come_in_training_only(exact: Model, weights: Weights) -> None:
    ids, positions = tokens(2, 5), torch.arange(5).expand(2, 5)
    assert exact.step(ids, positions, None).router_logits is None
    model = bind(TINY, weights, Backend(), "train", dtype=torch.float64)
    out = model.run_step(ids, positions, None)
    assert out.router_logits is not None
    assert out.router_logits.shape == (TINY.num_hidden_layers, 10, TINY.num_experts)
    assert out.router_logits.requires_grad
    chosen = [experts_of(row) for layer in out.router_logits.detach().numpy() for row in layer]
    assert out.routes.flatten(0, 1).tolist() == chosen


def test_every_parameter_is_used(weights: Weights) -> None:
    """Each has a gradient that agrees with a finite difference along a random direction."""
    model = bind(TINY, weights, Backend(), "train", dtype=torch.float64)
    ids, positions = tokens(2, 7), torch.arange(7).expand(2, 7)

    def loss() -> Tensor:
        return model.run_step(ids, positions, None).logits.square().mean()

    loss().backward()
    generator, step = torch.Generator().manual_seed(5), 1e-6
    for name, w in model.weights.items():
        grad = w.grad
        assert grad is not None, name
        direction = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                w += sign * step * direction
                ends.append(loss())
                w -= sign * step * direction
        slope = ((ends[0] - ends[1]) / (2 * step)).item()
        assert slope == pytest.approx((grad * direction).sum().item(), rel=1e-4), name
        assert abs(slope) > 1e-6, name


def test_initial_weights() -> None:
    weights = initial_weights(TINY, 7)
    assert weights.keys() == dict(skeleton(TINY).named_parameters()).keys()
    again, other = initial_weights(TINY, 7), initial_weights(TINY, 8)
    for name, w in weights.items():
        assert w.dtype == torch.float32
        assert torch.equal(w, again[name])
        if name.endswith(("norm.weight", "router_scale")):
            assert torch.equal(w, torch.ones(w.shape)), name
        elif name.endswith("bias"):
            assert not w.any(), name
        else:
            std = TINY.initializer_range
            if name.endswith(("o_proj.weight", "down")):
                std /= math.sqrt(2 * TINY.num_hidden_layers)
            assert not torch.equal(w, other[name]), name
            assert w.std().item() == pytest.approx(std, rel=5 / math.sqrt(w.numel())), name


def test_the_router_is_float32_under_autocast_whatever_a_backend_does() -> None:
    class Plain(Backend):
        """Does not guard its product."""

        name = "plain"

        def router_logits(self, x: Tensor, w: Any) -> Tensor:
            return torch.nn.functional.linear(x.float(), w.float())

    ids, positions = torch.arange(12)[None], torch.arange(12)[None]
    model = bind(TINY, initial_weights(TINY, 1), Plain(), "train", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.run_step(ids, positions, None).router_logits
    assert logits is not None and logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
