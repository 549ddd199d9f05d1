"""The ten operations as `torch.library` operators `moge_hal::<operation>`, so that `torch.export`
keeps each as one node.

An operator's implementation is its specification in `moge_hal.ops`; its fake kernel says only the
shapes. `Lowering` is the backend that calls them: the one model, bound to it and exported, is a
graph of these operators (`walk.py` turns it into ONNX).
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.cache import LayerCache
from moge_hal.export.cache import AppendLayer
from moge_hal.router import RouteSpec

_LIBRARY = torch.library.Library("moge_hal", "DEF")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Defines `moge_hal::name`, given its fake kernel; decorates the implementation, and gives the
    operator.

    A fake kernel must return distinct tensors: torch.export merges two outputs that are one object.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    torch.library.register_fake(f"moge_hal::{name}", fake, lib=_LIBRARY)

    def decorate(implementation: _Function) -> _Function:
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        return cast(_Function, getattr(torch.ops.moge_hal, name))

    return decorate


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_operator(
    "embed(Tensor ids, Tensor w) -> Tensor", lambda ids, w: w.new_empty(*ids.shape, w.shape[1])
)
def _embed(ids: Tensor, w: Tensor) -> Tensor:
    return ops.embed(ids, w)


@_operator(
    "linear(Tensor x, Tensor w, Tensor? b) -> Tensor",
    lambda x, w, b: x.new_empty(x.shape[0], w.shape[0]),
)
def _linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return ops.linear(x, w, b)


@_operator("rms_norm(Tensor x, Tensor w, float eps) -> Tensor", lambda x, w, eps: _like(x))
def _rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return ops.rms_norm(x, w, eps)


@_operator(
    "add_rms_norm(Tensor x, Tensor residual, Tensor w, float eps) -> (Tensor, Tensor)",
    lambda x, residual, w, eps: (_like(x), _like(x)),
)
def _add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return ops.add_rms_norm(x, residual, w, eps)


@_operator(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    lambda q, k, cos, sin: (_like(q), _like(k)),
)
def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return ops.rotary(q, k, cos, sin)


@_operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor positions) -> Tensor",
    lambda q, k, v, p: _like(q),
)
def _attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    return ops.attention(q, k, v, None, positions)[0]


def _fake_append(
    q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, seen: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, kv_heads, past, size = key.shape
    total = (batch, kv_heads, past + k.shape[1], size)
    return _like(q), key.new_empty(total), value.new_empty(total)


@_operator(
    "attention_append(Tensor q, Tensor k, Tensor v, Tensor key, Tensor value, Tensor seen, "
    "Tensor positions) -> (Tensor, Tensor, Tensor)",
    _fake_append,
)
def _attention_append(
    q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, seen: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification on a cache whose slots are those of the row's tokens, counted without the
    holes.
    """
    batch, kv_heads, past, size = key.shape
    valid = torch.cat([seen, positions >= 0], 1)
    places = torch.where(valid, valid.cumsum(1) - 1, -1)
    slots = k.new_zeros(2, batch, valid.shape[1] + 1, kv_heads, size)
    cache = LayerCache(slots[0], slots[1])
    rows = torch.arange(batch)[:, None]
    for held, old in zip(cache, (key, value), strict=True):
        held[rows, places[:, :past]] = old.transpose(1, 2)  # place -1 is the last slot: the bin
    mixed, _ = ops.attention(q, k, v, cache, places[:, past:])
    return mixed, torch.cat([key, k.transpose(1, 2)], 2), torch.cat([value, v.transpose(1, 2)], 2)


@_operator(
    "swiglu_ffn(Tensor x, Tensor gate_up, Tensor down) -> Tensor",
    lambda x, gate_up, down: x.new_empty(x.shape[0], down.shape[0]),
)
def _swiglu_ffn(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return ops.swiglu_ffn(x, gate_up, down)


@_operator(
    "router_logits(Tensor x, Tensor w) -> Tensor", lambda x, w: x.new_empty(x.shape[0], w.shape[0])
)
def _router_logits(x: Tensor, w: Tensor) -> Tensor:
    return ops.router_logits(x, w)


@_operator(
    "route(Tensor logits, Tensor? scale, Tensor? bias, int groups, int k, str score, "
    "int? limit_groups, bool renormalise, float factor) -> (Tensor, Tensor)",
    lambda logits, scale, bias, groups, k, *rest: (
        logits.new_empty(logits.shape[0], k, dtype=torch.int32),
        logits.new_empty(logits.shape[0], k),
    ),
)
def _route(
    logits: Tensor, scale: Tensor | None, bias: Tensor | None, *spec: Any
) -> tuple[Tensor, Tensor]:
    return ops.route(logits, RouteSpec(*spec), scale, bias)


@_operator(
    "experts(Tensor x, Tensor gate_up, Tensor down, Tensor ids, Tensor weights, int first) "
    "-> Tensor",
    lambda x, gate_up, down, ids, weights, first: _like(x),
)
def _experts(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, first: int
) -> Tensor:
    return ops.experts(x, gate_up, down, ids, weights, first)


@_operator(
    "split_mask(Tensor attention_mask, Tensor position_ids, Tensor key) -> (Tensor, Tensor)",
    lambda attention_mask, position_ids, key: (
        torch.empty_like(position_ids),
        attention_mask.new_empty(key.shape[0], key.shape[2], dtype=torch.bool),
    ),
)
def split_mask(attention_mask: Tensor, position_ids: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    past = key.shape[2]
    now = attention_mask[:, past:] != 0
    return torch.where(now, position_ids, -1), attention_mask[:, :past] != 0


class Lowering(Backend):
    """Every operation is one operator of the graph. It runs under export, or eagerly as the
    specification.
    """

    name = "lowering"
    graph = True
    dtypes = (torch.float32,)
    claims = ("core",)  # a graph cannot train

    def embed(self, ids: Tensor, w: Tensor) -> Tensor:
        return _embed(ids, w)

    def linear(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return _linear(x, w, b)

    def rms_norm(self, x: Tensor, w: Tensor, eps: float) -> Tensor:
        return _rms_norm(x, w, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, w: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return _add_rms_norm(x, residual, w, eps)

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return _rotary(q, k, cos, sin)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: AppendLayer | None, positions: Tensor
    ) -> tuple[Tensor, AppendLayer | None]:
        if cache is None:
            return _attention(q, k, v, positions), None
        mixed, key, value = _attention_append(q, k, v, *cache, positions)
        return mixed, AppendLayer(key, value, torch.cat([cache.seen, positions >= 0], 1))

    def swiglu_ffn(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return _swiglu_ffn(x, gate_up, down)

    def router_logits(self, x: Tensor, w: Tensor) -> Tensor:
        return _router_logits(x, w)

    def route(
        self,
        logits: Tensor,
        spec: RouteSpec,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        s = spec
        return _route(
            logits, scale, bias, s.groups, s.k, s.score, s.limit_groups, s.renormalise, s.factor
        )

    def experts(
        self, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        return _experts(x, gate_up, down, ids, weights, first)
