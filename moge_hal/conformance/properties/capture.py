"""Capture: a step reads nothing on the host, and no shape hangs on data. Proved without the chip.

A device graph (a CUDA graph, or its like on another chip) is recorded once and replayed without the
host. What reads a number of the device, waits for it, or copies to or from the host's memory breaks
the recording or, worse, is frozen into it. The rules:

- No `.item()`, `bool(tensor)`, `nonzero` or boolean index: no value is known while recording.
- No copy from the device to the host.
- No copy from the host to the device either, be it of a constant. torch.tensor(.., device=..) in a
  step, or an index that lies on the host, is a copy from pageable memory, for which torch waits,
  and a replay would read that memory again. Constants are made by `__init__` or `pack`, or on the
  device (torch.full, torch.arange). A host tensor without dimensions as an operand is no copy: its
  value becomes part of the call.

They are those of https://docs.pytorch.org/docs/stable/notes/cuda.html (CUDA Graphs, Constraints)
and https://docs.nvidia.com/dl-cuda-graph/torch-cuda-graph/quick-checklist.html.

The operation runs on fake tensors (`faking.py`): shape, dtype and the device cuda:0, whatever chip
the backend is for, and no data. This proves the backend's code. It does not see what waits inside a
kernel, and an operator of the backend's own must have a fake kernel. `compile` is left out: it is
there that a backend records. What a backend keeps for later calls is kept on a copy of it.
"""

import copy
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from moge_hal.backend import Backend
from moge_hal.bind import bind
from moge_hal.conformance.cases import Case
from moge_hal.conformance.inputs import draw, integers
from moge_hal.conformance.properties.faking import CHIP, Recording, fake_chip, where
from moge_hal.conformance.subject import ROLES, Subject
from moge_hal.conformance.verdict import Failure, Verdict
from moge_hal.conformance.weights import model_weights

Place = Callable[[Tensor], Tensor]  # a tensor of the host -> its like on the device
Watch = Callable[..., Any]  # (function, its arguments) -> what it returns, or a Failure
ROWS, PROMPT = 2, 9  # of a model's prefill; a decode step of one token follows


def no_sync(subject: Subject, case: Case) -> Verdict:
    """The operation, or a model's prefill and decode step, can be recorded.

    Guards against: counts of tokens that are read back to split a batch; a fast path that looks at
    the positions first; a table that is copied to the device in every step. All of them give right
    numbers and cost a wait a layer, until somebody records the step and it fails.
    """
    prepared = model_weights(case) if case.op == "model" else draw(case)
    scene: Callable[..., None] = _model if case.op == "model" else _operation
    stand_in = Subject(_on_fakes(subject.backend), subject.label)
    with fake_chip() as recording:
        try:
            scene(stand_in, case, prepared, _fake, lambda f, *given: _record(recording, f, given))
        except Failure:
            raise
        except Exception as error:  # whatever a backend raises where its tensors have no data
            if recording.blames:
                raise Failure(f"{case.op}: {recording.blames[0]}") from None
            place = where(traceback.extract_tb(error.__traceback__))
            fault = f"{type(error).__name__}: {error}".splitlines()[0]
            raise Failure(f"{case.op}: cannot run on fake tensors: {fault} ({place})") from error
    device = subject.backend.device()
    if device.type != "cuda" or not torch.cuda.is_available():
        return Verdict(level="simulated")
    for watch in (_call, _watch_hardware):  # libraries that start up may wait
        scene(subject, case, prepared, lambda x: x.to(device), watch)
    return Verdict()


def _on_fakes(backend: Backend) -> Backend:
    """A copy of the backend for the fake device."""

    def device(self: Backend) -> torch.device:
        return CHIP

    def compile_nothing(self: Backend, step: Any, example: Any, dynamic: Any) -> Any:
        return step

    kind = type(backend)
    members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    stand_in = copy.copy(backend)
    replaced = {"device": device, "compile": compile_nothing}
    stand_in.__class__ = type(kind.__name__, (kind,), {**members, **replaced})
    return stand_in


def _fake(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device=CHIP)


def _operation(
    subject: Subject, case: Case, args: dict[str, Any], place: Place, watch: Watch
) -> None:
    """The operation as a model runs it: bound, on packed weights; attention with a cache too."""
    bound = subject.bound(case)
    given = {n: place(v) if isinstance(v, Tensor) else v for n, v in args.items()}
    for name, value in given.items():
        role = ROLES.get((case.op, name), "")
        choice = bound.choices.get(role.partition(".")[0])
        if isinstance(value, Tensor) and choice is not None and choice.own:
            given[name] = bound.backend.pack(role, value)
    call = getattr(bound.backend, case.op)
    watch(call, *given.values())
    if case.op != "attention":
        return
    cache = subject.new_cache(case, case.sizes["B"])
    _require_there(cache, subject.backend.device(), "new_cache")
    layer, length = cache.layers[0], case.sizes["S"]
    for part in (slice(0, length - 1), slice(length - 1, length)):
        tokens = {n: place(v[:, part]) for n, v in args.items() if isinstance(v, Tensor)}
        _, layer = watch(call, *{**args, **tokens, "cache": layer}.values())


def _model(subject: Subject, case: Case, prepared: Any, place: Place, watch: Watch) -> None:
    """A prompt and one token, with a cache; as a step runs them, after the host's checks."""
    config, weights = prepared
    placed = {name: place(weight) for name, weight in weights.items()}
    model = bind(config, placed, subject.backend, dtype=case.dtype)
    cache = model.new_cache(ROWS, PROMPT + 1)
    _require_there(cache, subject.backend.device(), "new_cache")
    ids = integers(f"{case.id}/ids", ROWS, PROMPT + 1, low=0, high=config.vocab_size)
    positions = torch.arange(PROMPT + 1, device="cpu").repeat(ROWS, 1)
    for part in (slice(0, PROMPT), slice(PROMPT, None)):
        step = place(ids[:, part]), place(positions[:, part])
        cache = watch(model.run_step, *step, cache, True).cache


def _record(recording: Recording, function: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    recording.on = True
    try:
        with torch.no_grad():  # inference_mode would hide what a composite of torch is made of
            out = function(*given)
    finally:
        recording.on = False
    if recording.blames:  # the backend caught it
        raise recording.blames[0]
    _require_there(out, CHIP, "it")
    return out


def _require_there(tree: Any, device: torch.device, what: str) -> None:
    for leaf in _pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.device != device:
            raise Failure(f"{what} gives a tensor on {leaf.device}, must be on {device}")


def _call(function: Callable[..., Any], *given: Any) -> Any:
    with torch.inference_mode():
        return function(*given)


def _watch_hardware(function: Callable[..., Any], *given: Any) -> Any:
    """On a GPU, where torch itself raises when it waits for the device.

    NOT RUN YET, for want of one.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return _call(function, *given)
    except RuntimeError as error:
        place = where(traceback.extract_tb(error.__traceback__))
        raise Failure(f"{str(error).splitlines()[0]} ({place})") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)
