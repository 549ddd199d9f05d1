"""The CUDA backend's own arithmetic, on the CPU in its place. No test here needs a GPU, and none
tells how it fares on one.
"""

import pytest
import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Facts
from moge_hal.backends.cuda import CudaBackend
from moge_hal.backends.cuda.experts import expert_by_expert, slot_by_slot
from moge_hal.bind import bind
from moge_hal.config import preset
from moge_hal.conformance.judging import judge
from moge_hal.conformance.levels import simulated
from moge_hal.conformance.listing import every_case
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Skip

CUDA = simulated(CudaBackend())
WAYS = ["slot by slot", "expert by expert"]
NAN = float("nan")


Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def run(
    way: str, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, first: int = 0
) -> Tensor:
    if way == "slot by slot":
        return slot_by_slot(x, gate_up, down, ids, weights, first)
    return expert_by_expert(x, gate_up, down, ids, weights, first, ops.swiglu_ffn)


def inputs(tokens: int, experts: int = 9, k: int = 3) -> Five:
    """x, gate_up, down, ids, weights in float64; weights of either sign."""
    generator = torch.Generator().manual_seed(tokens)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = rand(tokens, experts).argsort(-1)[:, :k].int()
    return rand(tokens, 8), rand(experts, 10, 8), rand(experts, 8, 5), ids, rand(tokens, k)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [0, 1, 4, 33])
def test_both_ways_are_the_specification(way: str, tokens: int) -> None:
    args = inputs(tokens)
    exact = ops.experts(*args)
    assert torch.allclose(run(way, *args), exact, rtol=1e-12, atol=1e-12)
    x, gate_up, down, ids, weights = args
    part = ops.experts(x, gate_up[2:5], down[2:5], ids, weights, first=2)
    got = run(way, x, gate_up[2:5], down[2:5], ids, weights, first=2)
    assert torch.allclose(got, part, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_leaks_from_what_nobody_chose(way: str) -> None:
    """An idle expert, another rank's weight, and the token beside may hold NaN."""
    x, gate_up, down, ids, weights = inputs(4)
    idle = [e for e in range(9) if e not in ids.tolist()[0]]
    gate_up[idle], down[idle] = NAN, NAN
    assert run(way, x, gate_up, down, ids, weights)[0].isfinite().all()
    x, gate_up, down, ids, weights = inputs(4)
    away = ids >= 5
    assert away.any()
    weights[away], x[3] = NAN, NAN
    got = run(way, x, gate_up[:5], down[:5], ids, weights)
    assert got[:3].isfinite().all()
    assert got[3].isnan().all() == bool((~away[3]).any())


def test_the_way_follows_from_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token of eight experts among 64 is copied out; three are not."""
    taken: list[str] = []
    for name in ("slot_by_slot", "expert_by_expert"):

        def note(*args: object, name: str = name) -> None:
            taken.append(name)

        monkeypatch.setattr(f"moge_hal.backends.cuda.backend.{name}", note)
    for tokens in (0, 1, 2, 3, 100):
        CUDA.experts(*inputs(tokens, 64, 8))
    assert taken == ["slot_by_slot"] * 3 + ["expert_by_expert"] * 2


def test_the_router_is_exact_to_the_last_bit_whatever_the_process_allows() -> None:
    """What float64 gives, rounded once: no float32 product took part, so no TF32 can."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5120, generator=generator)
    w = torch.randn(64, 5120, generator=generator)
    before = torch.get_float32_matmul_precision()
    for dtype in (torch.float32, torch.bfloat16):
        exact = (x.to(dtype).double() @ w.to(dtype).double().T).float()
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            try:
                got = CUDA.router_logits(x.to(dtype), w.to(dtype))
            finally:
                torch.set_float32_matmul_precision(before)
            assert got.dtype == torch.float32
            assert (got - exact).abs().max() <= 2**-23 * exact.abs().max()
    assert CUDA.router_logits(x.double(), w.double()).dtype == torch.float64


def test_training_takes_the_specifications_experts(weights: dict[str, Tensor]) -> None:
    model = bind(preset("tiny"), weights, CUDA, "train")
    chosen = {c.op: c for c in model.choices}
    assert not chosen["experts"].own and "gradients" in chosen["experts"].reason
    assert chosen["router_logits"].own
    assert CUDA.why_not(Facts("experts", torch.bfloat16, training=False)) is None


def test_the_probe_makes_no_context() -> None:
    before = torch.cuda.is_initialized()
    probe = CudaBackend(99).probe()
    assert not probe.ok and probe.reason and probe.fix
    assert torch.cuda.is_initialized() == before


@pytest.mark.parametrize("op", ["router_logits", "experts", "model"])
def test_the_suite_accepts_it_on_the_cpu(op: str) -> None:
    """Every case of what it overrides, in every dtype, gradients included."""
    subject, judged = Subject(CUDA), set()
    for case in every_case():
        if case.op != op or "shipped" in case.words:
            continue
        try:
            judge(subject, case)
        except Skip:
            assert case.profile == "bitwise"
        else:
            judged.add((case.dtype_name, case.profile))
    assert judged >= {(d, p) for d in ("f32", "bf16", "f16") for p in ("core", "train")}
    assert ("f32", "capture") in judged
