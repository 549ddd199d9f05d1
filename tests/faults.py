"""Backends with one fault each that shows in a whole model, in one layer or for one weight only:
what `bisect` must find. Faults of whole operations are in `mutants`.
"""

from typing import Any

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.backends.onnx import OnnxBackend
from moge_hal.cache import Cache
from moge_hal.config import Config, preset
from moge_hal.conformance.weights import random_weights
from moge_hal.model import Transformer

TINY = preset("tiny")
WEIGHTS = random_weights(TINY, 0)


def is_weight(weight: Tensor, name: str) -> bool:
    return weight.shape == WEIGHTS[name].shape and bool((weight == WEIGHTS[name]).all())


class OneWeight(Backend):
    """The experts of layer 1 alone, known by their values."""

    name = "one-weight"

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        out = ops.experts(x, gate_up, down, ids, weights, first)
        return out.mul(1.001 if is_weight(down, "layers.1.mlp.experts.down") else 1.0)


class OneExpert(Backend):
    """`linear` with the down projection of expert 11 of layer 1."""

    name = "one-expert"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        down = WEIGHTS["layers.1.mlp.experts.down"][11]
        hit = w.shape == down.shape and bool((w == down).all())
        return ops.linear(x, w, b) * (1.01 if hit else 1.0)


class FromTheSecondCall(Backend):
    """`rotary` turns the wrong way from the second call of every step on: in all layers but the
    first."""

    name = "from-the-second-call"
    calls = 0

    def embed(self, ids: Tensor, w: Any) -> Tensor:
        self.calls = 0
        return ops.embed(ids, w)

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return ops.rotary(q, k, cos, sin if self.calls < 2 else -sin)


class OutputProjection(Backend):
    """`linear` of the vocabulary's size: the output projection alone."""

    name = "output-projection"

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return ops.linear(x, w, b).add(1e-3 if len(w) == TINY.vocab_size else 0.0)


class ManyTokens(Backend):
    """Of more than 512 tokens the last is lost."""

    name = "many-tokens"

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, w: Any, eps: float
    ) -> tuple[Tensor, Tensor]:
        normed, total = ops.add_rms_norm(x, residual, w, eps)
        last = torch.arange(len(x))[:, None] > 512
        return normed.masked_fill(last, 0.0), total


class SecondStep(Backend):
    """Attention over a cache does not see the newest key but one, if one token comes alone."""

    name = "second-step"

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        if cache is not None and q.shape[1] == 1 and q.shape[0] == 2:
            cache.v[:, 12] *= 1.5
        return ops.attention(q, k, v, cache, positions)


class OutputsInOneBuffer(Backend):
    """`linear` returns the same memory for outputs of one shape: keys become values."""

    name = "outputs-in-one-buffer"

    def __init__(self, index: int | None = None) -> None:
        super().__init__(index)
        self.buffers: dict[Any, Tensor] = {}

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        out = ops.linear(x, w, b)
        return self.buffers.setdefault(out.shape, torch.empty_like(out)).copy_(out)


class SpoilsItsWeights(Backend):
    """Right, but for what it leaves in the weights."""

    name = "spoils-its-weights"

    def swiglu_ffn(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        out = ops.swiglu_ffn(x, gate_up, down)
        down *= 1.01
        return out


class WritesItsInput(Backend):
    """The router takes its input for scratch memory."""

    name = "writes-its-input"

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        logits = ops.router_logits(x, w)
        x += 0.5
        return logits


class Remembers(Backend):
    """Attention keeps keys of its own, found by the size of the batch and the layer's turn."""

    name = "remembers"

    def __init__(self, index: int | None = None) -> None:
        super().__init__(index)
        self.kept: dict[Any, Any] = {}
        self.turn = [0]

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        self.turn[0] += 1
        if cache is None:
            return ops.attention(q, k, v, None, positions)
        key = (cache.k.shape, self.turn[0] % TINY.num_hidden_layers)
        return ops.attention(q, k, v, self.kept.setdefault(key, cache), positions)[0], cache


class Doubled(Backend):
    """Two faults, each enough to fail."""

    name = "doubled"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        return ops.rms_norm(x, w, 2 * eps)

    def route(self, logits: Tensor, spec: Any, scale: Any = None, bias: Any = None) -> Any:
        return ops.route(logits, spec, None, bias)


class FirstInsteadOfLast(Backend):
    """Asked for the last position's logits, gives the first one's."""

    name = "first-instead-of-last"

    def compile(self, step: Any, example: tuple[Any, ...], dynamic: Any) -> Any:
        def run(ids: Tensor, positions: Tensor, cache: Any, last_only: bool = False) -> Any:
            out = step(ids, positions, cache)
            return out._replace(logits=out.logits[:, :1]) if last_only else out

        return run if isinstance(step, Transformer) else step


class OneBuffer(Backend):
    """One buffer for all caches."""

    name = "one-buffer"
    buffers: dict[Any, Cache]

    def new_cache(self, config: Config, batch: int, capacity: int, dtype: torch.dtype) -> Cache:
        self.__dict__.setdefault("buffers", {})
        key = (config, batch, capacity, dtype)
        return self.buffers.setdefault(key, super().new_cache(*key))


class OneSlotShort(Backend):
    """Promises one slot more than it has."""

    name = "one-slot-short"

    def new_cache(self, config: Config, batch: int, capacity: int, dtype: torch.dtype) -> Cache:
        cache: Cache = super().new_cache(config, batch, capacity - 1, dtype)
        cache.capacity = capacity
        return cache


class PacksNarrow(Backend):
    """Weights lose half of their bits when they are packed."""

    name = "packs-narrow"

    def pack(self, role: str, weight: Tensor) -> Tensor:
        return weight.bfloat16().float() if weight.dim() == 2 else weight

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return ops.linear(x, w, b)


class Crashes(Backend):
    """Decoding raises."""

    name = "crashes"

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        if len(x) < 3:
            raise RuntimeError("no kernel for 2 rows")
        return ops.rms_norm(x, w, eps)


class NoBias(OnnxBackend):
    """A lowering that leaves out the bias."""

    def linear(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return super().linear(x, w, None)


class WrongPast(OnnxBackend):
    """A lowering that keeps keys for values: the first call over a cache is right."""

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        mixed, held = super().attention(q, k, v, cache, positions)
        return mixed, None if held is None else held._replace(value=held.key)


class WrongInTheSecondLayer(OnnxBackend):
    """Right alone, wrong where it is lowered for the second time in a step."""

    calls = 0

    def embed(self, ids: Tensor, w: Tensor) -> Tensor:
        self.calls = 0
        return super().embed(ids, w)

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return super().rotary(q, k, cos, sin if self.calls < 2 else cos)


class LastIsFirst(OnnxBackend):
    """Right operations in a wrong step."""

    def compile(self, step: Any, example: tuple[Any, ...], dynamic: Any) -> Any:
        run = super().compile(step, example, dynamic)
        if not isinstance(step, Transformer):
            return run
        return FirstInsteadOfLast().compile(step, example, dynamic)
