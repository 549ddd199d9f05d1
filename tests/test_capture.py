"""What a device graph could not record is found without the device, and what it could passes."""

import re
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moge_hal.backend import Backend
from moge_hal.backends.cpu import CpuBackend
from moge_hal.backends.cuda import CudaBackend
from moge_hal.cache import Cache
from moge_hal.config import Config
from moge_hal.conformance.cases import Case, parse
from moge_hal.conformance.judging import judge
from moge_hal.conformance.listing import every_case
from moge_hal.conformance.properties.capture import no_sync
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure, Skip, Verdict
from moge_hal.router import RouteSpec

NO_SYNC = [case for case in every_case() if case.prop == "no-sync"]
CASES = {case.op: case for case in reversed(NO_SYNC)}  # the first of every operation
SIMULATED = Verdict(level="simulated")


class Capture(Backend):
    """Claims what cuda claims, with cuda's experts."""

    name = "capture"
    claims = ("core", "capture")

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        return CudaBackend.experts(self, x, gate_up, down, ids, weights, first)  # type: ignore


class ReadsWeight(Capture):
    def route(
        self, logits: Tensor, spec: RouteSpec, scale: Any = None, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        ids, weights = super().route(logits, spec, scale, bias)
        return ids, weights / weights.max().item() * weights.max()


class LooksAtPositions(Capture):
    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        if (positions >= 0).all():
            return super().attention(q, k, v, cache, positions)
        return super().attention(q, k, v, cache, positions)


class ReadsPositionWithACache(Capture):
    """Without a cache nothing is wrong."""

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        if cache is not None and int(positions[0, 0]) < 0:
            raise AssertionError
        return super().attention(q, k, v, cache, positions)


class CacheOnTheHost(Capture):
    def new_cache(self, config: Config, batch: int, capacity: int, dtype: torch.dtype) -> Any:
        heads, size = config.num_key_value_heads, config.head_dim
        host = torch.device("cpu")
        return Cache.zeros(
            config.num_hidden_layers, batch, capacity, heads, size, dtype, device=host
        )


class UniqueTokens(Capture):
    """Every token of the vocabulary is looked up once, however often it occurs."""

    def embed(self, ids: Tensor, w: Any) -> Tensor:
        distinct, place = ids.unique(return_inverse=True)
        return super().embed(distinct, w)[place]


class GroupedProducts(Capture):
    """torch's grouped product reads its offsets on the host, which a fake does not show."""

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        ends = torch.full((len(gate_up),), 1, dtype=torch.int32, device=x.device)
        torch._grouped_mm(x, gate_up.mT, offs=ends)
        return super().experts(x, gate_up, down, ids, weights, first)


class CannotBePacked(Capture):
    def pack(self, role: str, weight: Tensor) -> Any:
        return weight / weight.abs().max().item()

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return super().linear(x, w, b)


class Linear(Capture):
    """Has a way with the inputs of its products."""

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return super().linear(self.change(x), w, b)

    def change(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class MaskRead(Linear):
    def change(self, x: Tensor) -> Tensor:
        return x[x[:, 0] > 0]


class MaskWritten(Linear):
    def change(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[y[:, 0].isnan()] = y[0]
        return y


class RoundTrip(Linear):
    def change(self, x: Tensor) -> Tensor:
        return x.cpu().to(x.device)


class StaysOnTheHost(Linear):
    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return torch.zeros(len(x), len(w))


class HostIndex(Linear):
    def change(self, x: Tensor) -> Tensor:
        return x[torch.arange(len(x))]


class ListIndex(Linear):
    def change(self, x: Tensor) -> Tensor:
        return x[list(range(len(x)))]


class FreshConstant(Linear):
    def change(self, x: Tensor) -> Tensor:
        return x * torch.tensor([1.0], device=x.device)


class TableOfTheHost(Linear):
    def __init__(self, index: int | None = None) -> None:
        super().__init__(index)
        self.table = torch.ones(1, 1)

    def change(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * self.table.to(x.device))


class CopiedFromNumpy(Linear):
    def change(self, x: Tensor) -> Tensor:
        return x * torch.from_numpy(np.ones(1, np.float32)).to(x.device, non_blocking=True)


class ScalarCopied(Linear):
    def change(self, x: Tensor) -> Tensor:
        return x * torch.empty_like(x[0, 0]).copy_(torch.tensor(1.0))


class ToNumpy(Linear):
    def change(self, x: Tensor) -> Tensor:
        return x.new_tensor(x.numpy().sum())


class ToList(Linear):
    def change(self, x: Tensor) -> Tensor:
        return x * len(x[0].tolist())


class Swallows(Linear):
    """Hides that it cannot be recorded."""

    def change(self, x: Tensor) -> Tensor:
        with suppress(Exception):
            x.nonzero()
        return x


REJECTED: list[tuple[type[Backend], str, str]] = [
    (Backend, "experts", r"aten\.nonzero\S+: the size .* hangs on data \(experts, ops\.py:\d+: "),
    (ReadsWeight, "route", r"aten\._local_scalar_dense\S+: .* a value \(route, .*\.item\(\)"),
    (LooksAtPositions, "attention", r"_local_scalar_dense\S+: .*if \(positions >= 0\)\.all\(\)"),
    (ReadsPositionWithACache, "attention", r"_local_scalar_dense\S+: .*int\(positions"),
    (CacheOnTheHost, "attention", "new_cache gives a tensor on cpu, must be on cuda:0"),
    (UniqueTokens, "embed", r"aten\._unique2\S+: the size of the result hangs on data"),
    (GroupedProducts, "experts", r"aten\._grouped_mm\S+: outside bfloat16 .* on the host"),
    (CannotBePacked, "linear", "cannot run on fake tensors|the host asks for a value"),
    (MaskRead, "linear", r"aten\.index\.Tensor: .* boolean index \(linear, test_capture\.py:\d+: "),
    (MaskWritten, "linear", r"aten\.index_put_\S+: .* boolean index \(.*= y\[0\]"),
    (RoundTrip, "linear", r"aten\._to_copy\S+: copies from the device to the host"),
    (StaysOnTheHost, "linear", "it gives a tensor on cpu, must be on cuda:0"),
    (HostIndex, "linear", r"aten\.index\.Tensor: a tensor of the host takes part"),
    (ListIndex, "linear", r"aten\.index\.Tensor: a list as an index is copied from the host"),
    (FreshConstant, "linear", r"aten\._to_copy\S+: copies from the host to the device"),
    (TableOfTheHost, "linear", r"aten\._to_copy\S+: copies from the host to the device"),
    (CopiedFromNumpy, "linear", r"aten\._to_copy\S+: copies from the host to the device"),
    (ScalarCopied, "linear", r"aten\.copy_\S+: a tensor of the host takes part"),
    (ToNumpy, "linear", r"cannot run on fake tensors: .*numpy"),
    (ToList, "linear", r"aten\._local_scalar_dense\S+: the host asks for a value"),
    (Swallows, "linear", r"aten\.nonzero\S+: the size of the result hangs on data"),
    (CpuBackend, "linear", "cannot run on fake tensors"),
    (UniqueTokens, "model", r"aten\._unique2\S+: .* \(embed, test_capture\.py"),
    (LooksAtPositions, "model", r"_local_scalar_dense\S+: the host asks for a value \(attention"),
    (ReadsWeight, "model", r"_local_scalar_dense\S+: the host asks for a value \(route"),
    (CacheOnTheHost, "model", "new_cache gives a tensor on cpu"),
    (Backend, "model", r"aten\.nonzero\S+: .* hangs on data \(experts"),
]


@pytest.mark.parametrize(
    ("kind", "op", "reason"), [pytest.param(*r, id=f"{r[0].__name__}-{r[1]}") for r in REJECTED]
)
def test_what_cannot_be_recorded_is_rejected(kind: type[Backend], op: str, reason: str) -> None:
    with pytest.raises(Failure) as error:
        no_sync(Subject(kind()), CASES[op])
    assert re.search(reason, error.value.reason), error.value.reason
    assert error.value.reason.startswith((f"{op}: ", "new_cache", "it gives"))


class Allowed(Linear):
    """All that can be recorded, and looks as if it could not."""

    def __init__(self, index: int | None = None) -> None:
        super().__init__(index)
        self.one = torch.tensor(1.0)

    def change(self, x: Tensor) -> Tensor:
        assert x.is_cuda and x.device == self.device() == torch.device("cuda", 0)
        y = x.to("cuda").to(x.device, torch.float64).cuda() * self.one  # no copy, and a number
        y[:, 0] = 2.0
        y[y.isnan()] = 0.0
        y[0] = torch.tensor(3.0)
        y[torch.arange(len(y), device="cuda"), 2] = y[:, 3]
        y.masked_fill_(y > 5, 1.0).index_add_(0, torch.zeros_like(y[:, 0]).long(), y)
        y = F.scaled_dot_product_attention(y[None], y[None], y[None])[0]
        y = torch.where(y > 0, y, torch.full((), 2.0, device=x.device)) + y.sort(-1).values
        table = self.one.item() * torch.arange(3, device=x.device)
        return y.to(x.dtype) + table[None, :1].expand(len(y), x.shape[1])


def test_what_can_be_recorded_passes() -> None:
    assert no_sync(Subject(Allowed()), CASES["linear"]) == SIMULATED


@pytest.mark.parametrize("case", NO_SYNC, ids=lambda case: case.id)
def test_cuda_can_be_recorded(case: Case) -> None:
    assert judge(Subject(CudaBackend()), case).level in ("simulated", None)
    assert judge(Subject(Capture()), case) == SIMULATED


def test_who_does_not_claim_it_is_not_asked() -> None:
    with pytest.raises(Skip, match="capture"):
        judge(Subject(Backend()), CASES["experts"])


class Remembers(Capture):
    """Keeps a table on itself, made when it is first needed."""

    table: Tensor | None = None

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        if self.table is None:
            self.table = torch.ones(1, device=x.device)
        return super().linear(x * self.table, w, b)


def test_nothing_fake_is_left_behind() -> None:
    """Neither in the inputs, which are shared by all cases, nor in the backend."""
    backend = Remembers()
    subject = Subject(backend)
    for op in ("linear", "model"):
        assert no_sync(subject, CASES[op]) == SIMULATED
    assert backend.table is None
    assert type(torch.ones(1)) is Tensor
    value = judge(subject, parse("linear/f32/T17-I40-O56/scale1/value"))
    assert value.error is not None
    assert judge(subject, parse("model/f32/tiny-seed0/random/decode")).error is not None
