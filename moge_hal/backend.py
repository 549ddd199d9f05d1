"""The contract: what a backend is. This page is the manual; a method says what its default does.

A backend is whoever runs the operations. A subclass with no methods is a correct one: every
operation defaults to its specification in `ops.py`, which is plain torch on `device()`. Override
what the hardware does better, give `why_not` a sentence for what an override cannot do, and let the
conformance suite judge it.

An override accepts every T, the empty one included, returns what the specification returns and
changes no input but the cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.cache import Cache, LayerCache
from moge_hal.config import Config
from moge_hal.router import RouteSpec


@dataclass(frozen=True)
class Probe:
    """Whether a backend can run here. If not: the reason, and what the user can do about it, each
    one sentence.
    """

    ok: bool
    reason: str = ""
    fix: str = ""
    device: str = ""  # what it would run on, in words
    # What the device is: "real", the chip itself; "simulated", another device that stands in for
    # it; "emulated", the chip's own software on an emulated driver. Every report says it.
    level: str = "real"


@dataclass(frozen=True)
class Facts:
    """All that is known of an operation when it is bound: static facts only, never B, S or T."""

    op: str
    dtype: torch.dtype
    training: bool
    # By letter: V, D, L, H, Hkv, d, E, G, K, F and Fs.
    sizes: Mapping[str, int] = field(default_factory=dict)
    route: RouteSpec | None = None


class StepOut(NamedTuple):
    """What a step returns. Routing is always observable: balance, load, auxiliary loss and every
    judgement rest on it. Logits and routes are the caller's to keep: no later step may write over
    them.
    """

    logits: Tensor  # [B, S or 1, V], at least float32
    cache: Any  # the cache to pass to the next step, None if none was given
    routes: Tensor  # [L, B*S, K] int32: the experts that each token went to
    router_logits: Tensor | None = None  # [L, B*S, E], in training only


class Step(Protocol):
    """All that the rest of the program sees of a model. ids and positions [B, S]; position -1 is
    padding.
    """

    def __call__(
        self, ids: Tensor, positions: Tensor, cache: Any, last_only: bool = False
    ) -> StepOut: ...


class Backend:
    """The default backend: the specification itself, on the CPU. Subclass it."""

    name = "default"
    # True: operations are lowerings, which run under export only, and `compile` returns what runs.
    graph = False
    # Parameter types that it computes in, the preferred first.
    dtypes: tuple[torch.dtype, ...] = (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
    )

    # Profiles of the conformance suite that it wants to be held to. core: right numbers in
    # inference; train: gradients too; capture: a step reads nothing on the host and no shape hangs
    # on data, so that it can be recorded once and replayed; bitwise: a row's bits do not depend on
    # the rows beside it.
    claims: tuple[str, ...] = ("core", "train")

    def __init__(self, index: int | None = None) -> None:
        """index: which device of the kind, as in `cuda:1`; None = the first."""
        self.index = index

    def probe(self) -> Probe:
        """Can it run here? Must be cheap, open nothing and never raise. Default: yes, unless a
        second device is asked for.
        """
        if self.index:
            reason = f"there is no {self.name}:{self.index}, only one."
            return Probe(False, reason, f"name {self.name} alone.")
        return Probe(True, device="CPU, plain torch")

    def device(self) -> torch.device:
        """Where parameters and the inputs of a step live. Default: the CPU."""
        return torch.device("cpu")

    def why_not(self, facts: Facts) -> str | None:
        """Why the override of `facts.op` cannot serve, or None. Asked once an operation, at bind.
        Default: it can.
        """
        return None

    def pack(self, role: str, weight: Tensor) -> Any:
        """Reorders or fuses a weight for its operation, in inference only, into something new: the
        weight itself is not written to. A packed model is read-only. Default: as it is.

        role: operation and argument, e.g. `experts.gate_up`. Asked only for operations that the
        backend overrides itself. Such an override meets weights as they are, too, when a default
        composite calls it (`swiglu_ffn` calls `linear`); `add_rms_norm` gets `rms_norm.w`.
        """
        return weight

    def new_cache(self, config: Config, batch: int, capacity: int, dtype: torch.dtype) -> Any:
        """A zero-filled cache: a pytree with attributes `layers` (what `attention` gets, one a
        layer), `batch` and `capacity`, and a method `with_layers(layers)` that gives the cache
        after a step. Default: position p in slot p, on `device()`.
        """
        return Cache.zeros(
            config.num_hidden_layers,
            batch,
            capacity,
            config.num_key_value_heads,
            config.head_dim,
            dtype,
            self.device(),
        )

    def compile(self, step: Any, example: tuple[Any, ...], dynamic: Mapping[str, int]) -> Any:
        """Turns a module into what runs it, called with the same arguments. Default: the module
        itself.

        dynamic: the sizes that vary, by name, with their value in `example`: values of at least 2,
        distinct from each other and from every static size, so that an axis can be told by its
        length.
        """
        return step

    def open(self, folder: Any, config: Config) -> Step | None:
        """A step that runs a model folder as it lies, without torch's weights. Default: None, bind
        the weights instead.
        """
        return None

    def synchronize(self) -> None:
        """Waits until all work is done. Default: nothing to wait for."""

    # The operations. Shapes and meaning: ops.py.

    def embed(self, ids: Tensor, w: Any) -> Tensor:
        return ops.embed(ids, w)

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return ops.linear(x, w, b)

    def rms_norm(self, x: Tensor, w: Any, eps: float) -> Tensor:
        return ops.rms_norm(x, w, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, w: Any, eps: float
    ) -> tuple[Tensor, Tensor]:
        return ops.add_rms_norm(x, residual, w, eps, rms_norm=self.rms_norm)

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rotary(q, k, cos, sin)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        """cache: one layer of what `new_cache` made, or None."""
        layer: LayerCache | None = cache
        return ops.attention(q, k, v, layer, positions)

    def swiglu_ffn(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        return ops.swiglu_ffn(x, gate_up, down, linear=self.linear)

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        return ops.router_logits(x, w)

    def route(
        self,
        logits: Tensor,
        spec: RouteSpec,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return ops.route(logits, spec, scale, bias)

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        return ops.experts(x, gate_up, down, ids, weights, first, swiglu_ffn=self.swiglu_ffn)
