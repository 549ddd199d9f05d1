"""The backend under judgement: runs one operation as a model would, and a model as a user would.

An operation is bound as in a model (fallbacks included), its weights are packed, and the
one-operation module goes through the backend's `compile`. A graph backend so compiles one graph for
all inputs of the same static sizes; for an eager backend compiling changes nothing. A failed
compile is remembered, since every case of its sizes would fail in the same way.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moge_hal.backend import Backend
from moge_hal.bind import Choice, Mode, bind, bind_operations
from moge_hal.config import PRESETS, Config, preset
from moge_hal.conformance.cases import Case
from moge_hal.conformance.inputs import PER_TOKEN, Args
from moge_hal.conformance.levels import level_of
from moge_hal.conformance.oracle import Outputs
from moge_hal.conformance.verdict import Failure, Skip
from moge_hal.runtime import Model

# The weights that a model packs, by operation and argument; the role is that of the module that
# holds them (`model.py`).
ROLES = {
    ("embed", "w"): "embed.w",
    ("linear", "w"): "linear.w",
    ("linear", "b"): "linear.b",
    ("rms_norm", "w"): "rms_norm.w",
    ("add_rms_norm", "w"): "rms_norm.w",
    ("swiglu_ffn", "gate_up"): "swiglu_ffn.gate_up",
    ("swiglu_ffn", "down"): "swiglu_ffn.down",
    ("router_logits", "w"): "router_logits.w",
    ("route", "scale"): "route.scale",
    ("experts", "gate_up"): "experts.gate_up",
    ("experts", "down"): "experts.down",
}
_NOT_STATIC = ("T", "B", "S", "seed", "limit", "eps")
_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43)


class OneOperation(nn.Module):
    """One operation as a module: tensors and a layer's cache are arguments, the rest is fixed."""

    def __init__(self, backend: Backend, op: str, args: Args) -> None:
        super().__init__()
        self.backend = backend
        self.op = op
        self.names = list(args)
        self.fixed = {n: value for n, value in args.items() if not _varies(n, value)}

    def forward(self, *varying: Any) -> Any:
        given = iter(varying)
        args = [self.fixed[n] if n in self.fixed else next(given) for n in self.names]
        return getattr(self.backend, self.op)(*args)


@dataclass
class Bound:
    """What a model of a case's sizes would run."""

    backend: Backend  # with its fallbacks
    choices: dict[str, Choice]  # by operation


class Subject:
    """A backend under judgement. label: the name that it was asked for by."""

    def __init__(self, backend: Backend, label: str | None = None) -> None:
        self.backend = backend
        self.label = label or backend.name
        self.probe = backend.probe()  # asked once: it may be slow
        self.level = level_of(backend, self.probe)  # what its results ran on
        # A `why_not` that raises is found out here, not in every case.
        tiny = PRESETS["tiny"]
        bind_operations(backend, tiny.sizes, tiny.route, backend.dtypes[0], "infer")
        self._bound: dict[Any, Bound] = {}
        self._compiled: dict[Any, Callable[..., Any] | Exception] = {}
        self._models: dict[tuple[str, torch.dtype], Model] = {}

    def bound(self, case: Case, training: bool = False) -> Bound:
        """The operations, bound for the case's dtype and static sizes."""
        sizes = {letter: n for letter, n in case.sizes.items() if letter not in _NOT_STATIC}
        key = (case.dtype, training, case.spec, *sorted(sizes.items()))
        if key not in self._bound:
            sizes = {**PRESETS["tiny"].sizes, **sizes}
            mode: Mode = "train" if training else "infer"
            backend, choices = bind_operations(self.backend, sizes, case.spec, case.dtype, mode)
            self._bound[key] = Bound(backend, {choice.op: choice for choice in choices})
        return self._bound[key]

    def new_cache(self, case: Case, batch: int) -> Any:
        """The backend's cache of one layer, with room for two positions more than the sequence."""
        s = case.sizes
        heads = {"num_attention_heads": s["H"], "num_key_value_heads": s["Hkv"], "head_dim": s["d"]}
        config = preset("tiny", num_hidden_layers=1, **heads)
        return self.backend.new_cache(config, batch, s["S"] + 2, case.dtype)

    def run(self, case: Case, args: Args) -> Outputs:
        """The tensors that the case's operation returns for these arguments. See `call`."""
        out = self.call(case, args)
        if case.op == "attention":  # a cache is no output: what it holds shows in the next call
            out = out[0]
        return out if isinstance(out, tuple) else (out,)

    def call(self, case: Case, args: Args) -> Any:
        """All that the case's operation returns for these arguments, in inference.

        A layer's cache is donated. Raises `Failure` if another input is written to or an output
        lies on another device, and `Skip` for an operation that a graph backend refuses.
        """
        bound, device = self.bound(case), self.backend.device()
        own = {op for op, choice in bound.choices.items() if choice.own}
        overridden = getattr(type(self.backend), case.op) is not getattr(Backend, case.op)
        if self.backend.graph and overridden and case.op not in own:
            raise Skip(f"{case.op}: {bound.choices[case.op].reason}")
        placed = {n: place(v, n, case, device) for n, v in args.items() if isinstance(v, Tensor)}
        before = {name: value.clone() for name, value in placed.items()}
        given = {name: placed.get(name, v) for name, v in args.items() if _varies(name, v)}
        for name, value in placed.items():
            role = ROLES.get((case.op, name), "")
            if role.partition(".")[0] in own:
                given[name] = bound.backend.pack(role, value)
                if not same_bits(value, before[name]):
                    raise Failure(f"packing wrote to the weight {name}")
        step = self._compile(case, bound.backend, args, given)
        with torch.inference_mode():
            out = step(*given.values())
        self.backend.synchronize()
        for name, value in before.items():
            if given[name] is placed[name] and not same_bits(value, placed[name]):
                raise Failure(f"the input {name} was written to")
        for part in out if isinstance(out, tuple) else (out,):
            if isinstance(part, Tensor) and part.device != device:
                raise Failure(f"an output lies on {part.device}, must be on {device}")
        return out

    def _compile(self, case: Case, backend: Backend, args: Args, given: Args) -> Callable[..., Any]:
        """What runs the operation on all arguments that differ in no more than B, S and T."""
        axes = ("B", "S") if "B" in case.sizes else ("T",)
        cached = given.get("cache") is not None
        static = {
            name: tuple(value.shape[len(axes) if name in PER_TOKEN else 0 :])
            for name, value in args.items()
            if isinstance(value, Tensor)
        }
        fixed = tuple((n, v) for n, v in args.items() if not _varies(n, v))
        capacity = case.sizes["S"] if cached else 0
        key = (case.op, case.dtype, fixed, capacity, *static.items())
        if key not in self._compiled:
            taken = {size for shape in static.values() for size in shape}
            free = (prime for prime in _PRIMES if prime not in taken)
            dynamic = {axis: next(free) for axis in axes}
            example = dict(given)
            for name in static.keys() & PER_TOKEN:
                example[name] = given[name].new_zeros(*dynamic.values(), *static[name])
            if cached:
                example["cache"] = self.new_cache(case, dynamic["B"]).layers[0]
            try:
                module = OneOperation(backend, case.op, args).eval()
                self._compiled[key] = backend.compile(module, tuple(example.values()), dynamic)
            except Exception as error:  # a backend may raise anything, and the other cases must run
                self._compiled[key] = error
        step = self._compiled[key]
        if isinstance(step, Exception):
            raise Failure(f"cannot be compiled: {type(step).__name__}: {step}") from step
        return step

    def model(
        self, name: str, config: Config, weights: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Model:
        """The model bound to this backend; kept by its name and dtype."""
        key = (name, dtype)
        if key not in self._models:
            # Copies: a backend that writes to its weights must not reach the oracle's.
            own = {name: weight.clone() for name, weight in weights.items()}
            self._models[key] = bind(config, own, self.backend, dtype=dtype)
        return self._models[key]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, with every NaN equal to itself."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _varies(name: str, value: object) -> bool:
    return isinstance(value, Tensor) or (name == "cache" and value is not None)


def place(value: Tensor, name: str, case: Case, device: torch.device) -> Tensor:
    """A copy on the device, laid out as the shape's words say, with NaN where nobody may read."""
    blank = float("nan") if value.is_floating_point() else 0
    if "offset" in case.words:
        flat = value.new_full((value.numel() + 3,), blank, device=device)
        return flat[3:].view(value.shape).copy_(value)
    if "strided" in case.words and name in PER_TOKEN:
        wide = value.new_full((*value.shape[:-1], 2 * value.shape[-1]), blank, device=device)
        return wide[..., ::2].copy_(value)
    if "sliced" in case.words and name in PER_TOKEN:
        axes = (0, 2, 1, 3) if value.dim() == 4 else tuple(range(value.dim()))
        outer = value.permute(axes)
        size = outer.shape[-1]
        wide = outer.new_full((*outer.shape[:-1], 3 * size), blank, device=device)
        return wide[..., size : 2 * size].permute(axes).copy_(value)
    return value.to(device, copy=True)
