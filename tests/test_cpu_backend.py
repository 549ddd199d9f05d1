"""The CPU backend against the specification: its packed weights, its sorted experts, its attention
without a mask. What is packed, and what cannot be.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moge_hal
from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.backends.cpu import CpuBackend
from moge_hal.bind import bind
from moge_hal.cache import LayerCache
from moge_hal.config import preset

TINY = preset("tiny")
CPU = CpuBackend()
BF16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
# How many units of the dtype a result may be off; a third of it was measured.
UNITS = {torch.float32: 8, torch.bfloat16: 2, torch.float16: 2, torch.float64: 8}
NAN = float("nan")


def random(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def near(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within UNITS of the dtype, relative to the output's largest value."""
    assert got.dtype == dtype
    assert got.shape == exact.shape
    if exact.numel():
        error = (got.double() - exact).abs().max() / exact.abs().max()
        assert error <= UNITS[dtype] * torch.finfo(dtype).eps


def scattered(x: Tensor) -> Tensor:
    """The same values, neither contiguous nor at the start of their storage."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), 7)
    wide[..., 1::2] = x
    return wide[..., 1::2]


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("layout", [torch.clone, scattered])
@pytest.mark.parametrize("packed", [False, True])
def test_operations(
    dtype: torch.dtype, tokens: int, layout: Callable[[Tensor], Tensor], packed: bool
) -> None:
    rand = random(tokens)
    x, w, b = rand(tokens, 40), rand(33, 40), rand(33)
    gate_up, down, routing = rand(15, 48, 40), rand(15, 40, 24), rand(tokens, 15).softmax(-1)
    x, w, b, gate_up, down = (z.to(dtype) for z in (x, w, b, gate_up, down))
    weights, ids = routing.to(torch.float64 if dtype == torch.float64 else torch.float32).topk(6)
    ids = ids.int()
    exact = [z.double() for z in (x, w, b, gate_up, down, weights)]
    linear = ops.linear(*exact[:3])
    bare = ops.linear(*exact[:2])
    ffn = ops.swiglu_ffn(exact[0], exact[3][2], exact[4][2])
    routed = ops.experts(exact[0], exact[3], exact[4], ids, exact[5])
    rank = ops.experts(exact[0], exact[3][4:9], exact[4][4:9], ids, exact[5], first=4)
    x, w, b, gate_up, down, weights, ids = (
        layout(z) for z in (x, w, b, gate_up, down, weights, ids)
    )

    def pack(role: str, weight: Tensor) -> Any:
        return CPU.pack(role, weight) if packed else weight

    near(CPU.linear(x, pack("linear.w", w), b), linear, dtype)
    near(CPU.linear(x, pack("linear.w", w)), bare, dtype)
    sealed = pack("swiglu_ffn.gate_up", gate_up[2]), pack("swiglu_ffn.down", down[2])
    near(CPU.swiglu_ffn(x, *sealed), ffn, dtype)
    both = pack("experts.gate_up", gate_up), pack("experts.down", down)
    near(CPU.experts(x, *both, ids, weights), routed, dtype)
    some = pack("experts.gate_up", gate_up[4:9]), pack("experts.down", down[4:9])
    near(CPU.experts(x, *some, ids, weights, first=4), rank, dtype)


@pytest.mark.parametrize("packed", [False, True])
def test_an_expert_that_nobody_chose_may_hold_nan(packed: bool) -> None:
    rand = random(1)
    x, gate_up, down = rand(5, 8).float(), rand(4, 6, 8).float(), rand(4, 8, 3).float()
    gate_up[1], down[1] = NAN, NAN
    ids, weights = torch.tensor([[0, 3]] * 5), rand(5, 2).float()
    both = gate_up, down
    if packed:
        both = CPU.pack("experts.gate_up", gate_up), CPU.pack("experts.down", down)
    assert CPU.experts(x, *both, ids, weights).isfinite().all()


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("layout", [torch.clone, scattered])
@pytest.mark.parametrize(
    ("held", "starts", "length"),
    [
        (False, [0, 0], 5),
        (False, [3, 3], 4),
        (True, [0, 0], 5),
        (True, [4, 4], 3),
        (True, [6, 6], 1),  # decode: no mask
        (True, [6, 2], 1),  # ragged: the specification's own path
        (True, [4, 1], 3),
        (True, [-1, 5], 1),  # a row of padding
        (True, [11, 11], 1),  # the last slot
        (True, [0, 0], 0),
    ],
)
def test_attention(
    dtype: torch.dtype,
    layout: Callable[[Tensor], Tensor],
    held: bool,
    starts: list[int],
    length: int,
) -> None:
    """After a past of random keys, beyond which the slots hold NaN."""
    rand, capacity = random(length), 12
    q, k, v = (layout(rand(2, length, heads, 8).to(dtype)) for heads in (6, 2, 2))
    places = [torch.full((length,), -1) if a < 0 else torch.arange(a, a + length) for a in starts]
    positions = torch.stack(places)
    mine = theirs = None
    if held:
        past = LayerCache(
            rand(2, capacity + 1, 2, 8).to(dtype), rand(2, capacity + 1, 2, 8).to(dtype)
        )
        for row, start in enumerate(starts):
            for slots in past:
                slots[row, max(start, 0) :] = NAN
        mine = LayerCache(*(z.clone() for z in past))
        theirs = LayerCache(*(z.double() for z in past))
    got, _ = CPU.attention(q, k, v, mine, positions)
    exact, _ = ops.attention(q.double(), k.double(), v.double(), theirs, positions)
    near(got[positions >= 0], exact[positions >= 0], dtype)
    assert got.isfinite().all()
    for written, expected in zip(mine or (), theirs or (), strict=True):
        a, b = written[:, :-1].double(), expected[:, :-1]  # NaN where nothing was written
        assert torch.equal(a.nan_to_num(9.5), b.nan_to_num(9.5))


def packable(module: nn.Module) -> dict[str, list[Any]]:
    """The weights of products, by path; a layer's experts count as one name of many."""
    found = {}
    for path, part in module.named_modules():
        for name in ("weight", "gate_up", "down"):
            weight = getattr(part, name, None)
            if (
                weight is not None
                and "norm" not in path
                and not path.endswith(("gate", "embed_tokens"))
            ):
                found[f"{path}.{name}"] = weight if isinstance(weight, list) else [weight]
    return found


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not BF16, reason="no bfloat16 here")),
    ],
)
def test_inference_runs_on_packed_weights(dtype: torch.dtype, weights: dict[str, Tensor]) -> None:
    module = bind(TINY, weights, CpuBackend(), dtype=dtype).run_step
    assert isinstance(module, nn.Module)
    found = packable(module)
    assert len(found) == 1 + TINY.num_hidden_layers * (4 + 2 + 2)
    for path, parts in found.items():
        assert len(parts) == (TINY.num_experts if ".experts." in path else 1)
        assert all(p.is_mkldnn for p in parts), path
    assert not found.keys() & dict(module.named_parameters()).keys()  # nothing is held twice


@pytest.mark.parametrize(("mode", "dtype"), [("train", torch.float32), ("infer", torch.float16)])
def test_what_cannot_be_packed_is_not(
    mode: Any, dtype: torch.dtype, weights: dict[str, Tensor]
) -> None:
    model = bind(TINY, weights, CpuBackend(), mode, dtype=dtype)
    assert isinstance(model.run_step, nn.Module)
    parameters = dict(model.run_step.named_parameters())
    assert all(parameters[path] is part[0] for path, part in packable(model.run_step).items())
    chosen = {c.op: c for c in model.choices}
    reason = "have no gradient" if mode == "train" else "float32 and bfloat16, not float16"
    for op in ("linear", "swiglu_ffn"):
        assert chosen[op].implementation == "default"
        assert reason in chosen[op].reason
    assert chosen["experts"].implementation == "cpu"


OLD_PROCESSOR = """
import torch
from moge_hal.backend import Facts
from moge_hal.backends.cpu import CpuBackend
assert not torch.ops.mkldnn._is_mkldnn_bf16_supported()
cpu, w = CpuBackend(), torch.randn(3, 5, dtype=torch.bfloat16)
assert cpu.pack("linear.w", w) is w
print(cpu.why_not(Facts("linear", torch.bfloat16, False)))
"""


@pytest.mark.skipif(not BF16 or platform.machine() not in ("x86_64", "AMD64"), reason="x86 only")
def test_bfloat16_is_not_packed_where_onednn_has_none() -> None:
    """As on a processor without AVX-512, where reordering such a weight raises."""
    run = subprocess.run(
        [sys.executable, "-c", OLD_PROCESSOR],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        cwd=Path(moge_hal.__path__[0]).parent,
        capture_output=True,
        text=True,
    )
    assert "processor" in run.stdout, run.stderr


def test_gradients_are_the_specifications(weights: dict[str, Tensor]) -> None:
    """Of every parameter, through the whole model, over a batch."""
    ids = torch.randint(0, TINY.vocab_size, (2, 9), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(9).expand(2, 9)
    grads = []
    for backend in (CpuBackend(), Backend()):
        model = bind(TINY, weights, backend, "train", dtype=torch.float64)
        model.run_step(ids, positions, None).logits.square().mean().backward()
        grads.append({name: w.grad for name, w in model.weights.items()})
    for name, expected in grads[1].items():
        grad = grads[0][name]
        assert grad is not None, name
        assert expected is not None, name
        assert expected.abs().max() > 0, name
        assert (grad - expected).abs().max() <= 1e-11 * expected.abs().max(), name


def test_one_thread_is_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, words in ((1, "CPU, 1 thread, "), (2, "CPU, 2 threads, ")):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        assert CpuBackend().probe().device.startswith(words)
