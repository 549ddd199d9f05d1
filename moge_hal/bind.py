"""Who runs what: ties a model to a backend, operation by operation, and remembers why."""

import copy
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moge_hal import ops
from moge_hal.backend import Backend, Facts
from moge_hal.config import Config
from moge_hal.errors import UserError, close_matches
from moge_hal.model import Transformer, Weights
from moge_hal.router import RouteSpec
from moge_hal.runtime import Model

Mode = Literal["infer", "train"]


@dataclass(frozen=True)
class Choice:
    """Which implementation an operation got, and why."""

    op: str
    implementation: str  # the backend's name, or "default"
    reason: str
    own: bool = False  # the backend's own override serves (its name may well be "default")


def bind(
    config: Config,
    weights: Mapping[str, Tensor],
    backend: Backend,
    mode: Mode = "infer",
    overrides: Mapping[str, str] | None = None,
    *,
    strict: bool = False,
    dtype: torch.dtype | None = None,
) -> Model:
    """A model that runs. weights: canonical name (see `model.py`) -> tensor, asked for one at a
    time.

    overrides: {operation: "default"}. strict: an operation that the backend overrides but cannot
    serve is an error instead of a fallback. dtype: of the parameters, None = the backend's
    preferred one.
    """
    dtype = check_dtype(backend, dtype)
    if mode == "train" and backend.graph:
        raise UserError(f"backend {backend.name!r} runs exported graphs and cannot train; use cpu")
    bound, choices = bind_operations(
        backend, config.sizes, config.route, dtype, mode, overrides, strict
    )
    transformer = Transformer(config, bound, dtype)
    _fill(transformer, weights, bound, mode, dtype, {c.op for c in choices if c.own})
    transformer.train(mode == "train")
    step = bound.compile(transformer, (), {}) if mode == "infer" else transformer
    if mode == "train":
        weights = dict(transformer.named_parameters())
    return Model(config, bound, step, dtype, choices, weights)


def check_dtype(backend: Backend, dtype: torch.dtype | None) -> torch.dtype:
    """The parameter type to use, or a `UserError` if the backend does not compute in it."""
    if dtype is not None and dtype not in backend.dtypes:
        able = ", ".join(str(d).removeprefix("torch.") for d in backend.dtypes)
        asked = str(dtype).removeprefix("torch.")
        raise UserError(f"backend {backend.name!r} does not compute in {asked}; it does in {able}")
    return dtype or backend.dtypes[0]


def bind_operations(
    backend: Backend,
    sizes: Mapping[str, int],
    route: RouteSpec | None,
    dtype: torch.dtype,
    mode: Mode,
    overrides: Mapping[str, str] | None = None,
    strict: bool = False,
) -> tuple[Backend, list[Choice]]:
    """A copy of the backend, with defaults for what it cannot serve, and who serves what."""
    overrides = overrides or {}
    for op, implementation in overrides.items():
        if op not in ops.NAMES or implementation != "default":
            near = close_matches(op, ops.NAMES)
            raise UserError(f"override {op}={implementation}: must be an operation=default.{near}")
    choices = []
    for op in ops.NAMES:
        if op in vars(backend):
            raise UserError(
                f"backend {backend.name!r} sets {op} on the instance; make it a method of its class"
            )
        facts = Facts(op, dtype, mode == "train", sizes, route)
        choices.append(_choose(backend, facts, overrides, strict))
    bound = copy.copy(backend)
    # A subclass, so that composites, which call self, meet the default too.
    kind = type(type(backend).__name__, (type(backend),), {})
    for choice in choices:
        default = getattr(Backend, choice.op)
        setattr(kind, choice.op, _held_to_its_word(kind, choice.op) if choice.own else default)
    bound.__class__ = kind
    return bound, choices


def _choose(backend: Backend, facts: Facts, overrides: Mapping[str, str], strict: bool) -> Choice:
    if facts.op in overrides:
        return Choice(facts.op, "default", "asked for by MOGE_HAL_OPS")
    if getattr(type(backend), facts.op) is getattr(Backend, facts.op):
        return Choice(facts.op, "default", f"{backend.name} does not override it")
    # The contract forbids both faults, so the backend's author is to blame.
    try:
        reason: object = backend.why_not(facts)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        fault = f"raised {type(error).__name__} in why_not({facts.op}): {error}"
        raise UserError(f"backend {_path(type(backend))} {fault}") from error
    if reason is None:
        return Choice(facts.op, backend.name, "the backend's own", own=True)
    if not isinstance(reason, str) or not reason.strip():
        fault = f"answers why_not({facts.op}) with {reason!r}"
        rule = "None says that it can serve, a sentence says why it cannot"
        raise UserError(f"backend {_path(type(backend))} {fault}; {rule}")
    if strict:
        raise UserError(
            f"MOGE_HAL_STRICT: {backend.name} cannot serve {facts.op} ({reason}); allow the "
            f"default with MOGE_HAL_OPS={facts.op}=default, or unset MOGE_HAL_STRICT"
        )
    return Choice(facts.op, "default", reason)


def _held_to_its_word(kind: type[Backend], op: str) -> Callable[..., Any]:
    """The backend's own method. If it turns out not to be written, its `why_not` is to blame."""

    def call(self: Backend, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(super(kind, self), op)(*args, **kwargs)
        except SystemExit as error:
            fault = f"backend {_path(kind.__bases__[0])}: {op} asked for the end of the program"
            raise UserError(f"{fault} ({error!r})") from error
        except NotImplementedError as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"backend {_path(kind.__bases__[0])} says None in why_not({op}), but {op} raised "
                f"NotImplementedError ({error}) at {last.filename}:{last.lineno}; let why_not say "
                f"why it cannot serve"
            ) from error

    return call


def _path(kind: type) -> str:
    """A class, and not the name of its backend: an unfinished one is called "default"."""
    return f"{kind.__module__}:{kind.__qualname__}"


def _fill(
    transformer: Transformer,
    weights: Mapping[str, Tensor],
    backend: Backend,
    mode: Mode,
    dtype: torch.dtype,
    own: set[str],
) -> None:
    """Replaces the skeleton's parameters one at a time: no more than one weight exists twice."""
    device = backend.device()
    for path, module in transformer.named_modules():
        if not isinstance(module, Weights):
            continue
        for name, shape in [(n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)]:
            try:
                weight = weights[f"{path}.{name}"].detach()
            except KeyError:
                sentence = f"{path}.{name} of shape {shape} is missing from the weights"
                raise UserError(sentence) from None
            if tuple(weight.shape) != shape:
                raise UserError(f"{path}.{name} has shape {tuple(weight.shape)}, must be {shape}")
            # Training changes its weights, which must not be the caller's own.
            weight = weight.to(device=device, dtype=dtype, copy=mode == "train")
            role = module.roles[name]
            packed: Any = weight
            if mode == "infer" and role.split(".")[0] in own:
                packed = backend.pack(role, weight)
            delattr(module, name)
            if packed is weight:
                packed = nn.Parameter(weight, requires_grad=mode == "train")
            setattr(module, name, packed)
    transformer.rotary.to(device)
