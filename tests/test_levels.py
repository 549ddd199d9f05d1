"""What a result ran on is never said to be more than it was."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moge_hal.backend import Backend, Probe
from moge_hal.backends.cpu import CpuBackend
from moge_hal.backends.cuda import CudaBackend
from moge_hal.backends.null import NullBackend
from moge_hal.bind import bind
from moge_hal.config import preset
from moge_hal.conformance.cases import parse
from moge_hal.conformance.judging import judge
from moge_hal.conformance.levels import level_of, simulated
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure
from moge_hal.errors import UserError
from moge_hal.registry import find, source_of

NO_GPU = not torch.cuda.is_available()


class Says(Backend):
    """Its probe says any level, its device is any."""

    name = "says"

    def __init__(self, level: Any, device: str = "cpu") -> None:
        super().__init__()
        self.level, self.where = level, device

    def probe(self) -> Probe:
        return Probe(True, device="somewhere", level=self.level)

    def device(self) -> torch.device:
        return torch.device(self.where)


def test_a_backend_is_taken_at_its_word_where_its_tensors_are() -> None:
    assert level_of(Backend()) == level_of(CpuBackend()) == level_of(NullBackend()) == "real"
    for level in ("real", "simulated", "emulated"):
        assert level_of(Says(level)) == level


@pytest.mark.parametrize("level", ["Real", "", "hardware", None, 1])
def test_a_level_that_does_not_exist_is_an_error(level: Any) -> None:
    with pytest.raises(UserError, match=r"'says' .*:Says\) says level .* one of real, simulated"):
        level_of(Says(level))


@pytest.mark.parametrize("device", ["meta", "npu:0", "no such device"])
def test_a_device_that_holds_no_numbers_is_not_real(device: str) -> None:
    if device == "npu:0" and hasattr(torch, "npu"):
        pytest.skip("there is such a device here")
    assert level_of(Says("real", device)) == "simulated"
    assert level_of(Says("emulated", device)) == "emulated"


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_a_chip_that_is_not_here_is_not_real() -> None:
    assert level_of(Says("real", "cuda:0")) == level_of(CudaBackend()) == "simulated"


def test_a_device_made_of_python_is_not_real() -> None:
    with FakeTensorMode():
        assert level_of(Backend()) == "simulated"


def test_a_stand_in_computes_on_the_cpu_and_says_so(weights: dict[str, Tensor]) -> None:
    original = CudaBackend(1)
    stand_in = simulated(original)
    probe = stand_in.probe()
    assert probe.ok and probe.level == "simulated" == level_of(stand_in)
    assert "CPU" in probe.device and "cuda" in probe.device
    assert stand_in.device() == torch.device("cpu")
    stand_in.synchronize()
    assert (stand_in.name, stand_in.claims, stand_in.index) == ("cuda", CudaBackend.claims, 1)
    assert source_of(stand_in) == source_of(original)
    assert f"{type(stand_in).__module__}:{type(stand_in).__qualname__}" == (
        "moge_hal.backends.cuda.backend:CudaBackend"
    )
    assert isinstance(stand_in, CudaBackend) and original.device() == torch.device("cuda", 1)
    model = bind(preset("tiny"), weights, stand_in)
    assert {c.op for c in model.choices if c.own} == {"router_logits", "experts"}
    assert "CPU in place of cuda's chip" in model.report()
    logits = model([[5, 6, 7]])
    assert logits.device.type == "cpu"
    exact = bind(preset("tiny"), weights, Backend(), dtype=torch.float64)([[5, 6, 7]])
    assert (logits - exact).abs().max() <= 2e-5 * exact.abs().max()


class WrongExperts(CudaBackend):
    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        return super().experts(x, gate_up, down, ids, weights.abs(), first)


def test_a_stand_in_is_judged_by_its_own_operations() -> None:
    case = parse("experts/f32/T17-D40-F24-E15-G3-K6/scale1/value")
    judge(Subject(simulated(find("cuda"))), case)
    with pytest.raises(Failure):
        judge(Subject(simulated(WrongExperts())), case)
