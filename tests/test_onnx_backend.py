"""The `onnx` backend: how it opens models, its cache, and the walk from torch.export to ONNX."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moge_hal
from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.backends.onnx import OnnxBackend
from moge_hal.bind import bind
from moge_hal.config import preset
from moge_hal.errors import CacheFullError, UserError
from moge_hal.export import to_onnx
from moge_hal.export.cache import AppendCache, AppendLayer
from moge_hal.export.library import Lowering
from moge_hal.router import RouteSpec
from moge_hal.runtime import Model

LIMIT = 2e-5
CONFIG = preset("tiny")


def error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    return float(((got - expected).abs().amax(-1) / expected.abs().amax(-1)).max())


@pytest.fixture(scope="module")
def exact(weights: dict[str, Tensor]) -> Model:
    return bind(CONFIG, weights, Backend(), dtype=torch.float64)


@pytest.fixture(scope="module")
def model(weights: dict[str, Tensor]) -> Model:
    """Bound as any backend is: the weights are in memory."""
    return bind(CONFIG, weights, OnnxBackend())


@pytest.fixture(scope="module")
def small(weights: dict[str, Tensor]) -> Model:
    """One layer, for what is about files."""
    return bind(preset("tiny", num_hidden_layers=1), weights, Backend(), dtype=torch.float64)


@pytest.fixture(scope="module")
def exported(small: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_onnx(small, tmp_path_factory.mktemp("models") / "exported", check=False)


@pytest.fixture
def checkpoint(small: Model, tmp_path: Path) -> Path:
    moge_hal.save(small, tmp_path / "plain", dtype=torch.float32)
    return tmp_path / "plain"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder for exports."""
    monkeypatch.setenv("MOGE_HAL_CACHE", str(tmp_path / "store"))
    yield tmp_path / "store" / "onnx"


IDS = torch.randint(259, (3, 11), generator=torch.Generator().manual_seed(3))


def test_it_runs_every_operation_itself(model: Model) -> None:
    assert {c.implementation for c in model.choices} == {"onnx"}
    assert "ONNX Runtime" in model.report()
    probe = OnnxBackend().probe()
    assert probe.ok and probe.device.endswith("CPUExecutionProvider")


def test_probe_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object()
    )
    probe = OnnxBackend().probe()
    assert not probe.ok
    assert (probe.reason, probe.fix) == ("onnxruntime is not installed.", "pip install onnxruntime")


def test_prefill_and_decode_are_one_pass(model: Model, exact: Model) -> None:
    expected = exact(IDS)
    assert error(model(IDS), expected) < LIMIT
    cache, positions = model.new_cache(3, 11), torch.arange(11).expand(3, -1)
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 11)):
        out = model.step(IDS[:, start:end], positions[:, start:end], cache)
        cache = out.cache
        assert error(out.logits, expected[:, start:end]) < LIMIT
        assert out.routes.shape == (2, 3 * (end - start), 6) and out.routes.dtype == torch.int32
    with pytest.raises(CacheFullError):
        model.step(IDS[:, :1], positions[:, :1] + 11, cache)


def test_without_a_cache_none_comes_back(model: Model) -> None:
    out = model.step(IDS, torch.arange(11).expand(3, -1), None, last_only=True)
    assert out.cache is None and out.logits.shape == (3, 1, 259)
    assert torch.equal(out.logits[:, 0], model(IDS)[:, -1])


def test_routes_are_the_specification_s(model: Model, exact: Model) -> None:
    positions = torch.arange(11).expand(3, -1)
    got = model.step(IDS, positions, None).routes
    assert torch.equal(got, exact.step(IDS, positions, None).routes)


def test_rows_of_different_lengths_are_as_alone(model: Model, exact: Model) -> None:
    """Holes on the left, on the right and, after a second call, in the middle."""
    first = torch.tensor([[0, 1, 2, 3], [-1, -1, 0, 1], [0, -1, -1, -1]])
    second = torch.tensor([[4, 5], [2, 3], [1, -1]])
    cache = model.new_cache(3, 6)
    a = model.step(IDS[:, :4], first, cache)
    b = model.step(IDS[:, 4:6], second, a.cache)
    logits, positions = torch.cat([a.logits, b.logits], 1), torch.cat([first, second], 1)
    assert bool(logits.isfinite().all())
    for row in range(3):
        real = positions[row] >= 0
        alone = exact(IDS[row, :6][real][None])[0]
        assert error(logits[row, real], alone) < LIMIT


def test_what_a_hole_holds_does_not_matter(model: Model, exact: Model) -> None:
    positions = torch.tensor([[0, 1, -1, -1]])
    out = model.step(IDS[:1, :4], positions, model.new_cache(1, 8))
    with torch.inference_mode():  # which the step ran in
        for layer in out.cache.layers:
            for held in (layer.key, layer.value):
                held[:, :, 2:] = float("nan")
    after = model.step(IDS[:1, 4:5], torch.tensor([[2]]), out.cache)
    expected = exact(IDS[:1, [0, 1, 4]])[:, -1:]
    assert error(after.logits, expected) < LIMIT


def test_an_exported_folder_opens_as_it_lies(exported: Path, small: Model, store: Path) -> None:
    assert error(moge_hal.load(exported, "onnx")(IDS), small(IDS)) < LIMIT
    assert error(moge_hal.load(exported, "null")(IDS), small(IDS)) < LIMIT
    assert not store.exists()


def test_a_download_cache_s_links_are_followed(
    exported: Path, small: Model, tmp_path: Path
) -> None:
    blobs, links = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.copytree(exported, blobs)
    links.mkdir()
    for number, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / str(number))
        (links / file.name).symlink_to(blobs / str(number))
    assert error(moge_hal.load(links, "onnx")(IDS), small(IDS)) < LIMIT


def test_a_checkpoint_is_exported_once(
    checkpoint: Path, small: Model, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Float32 weights stay where they are; the second time nothing is said or made."""
    assert error(moge_hal.load(checkpoint, "onnx")(IDS), small(IDS)) < LIMIT
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(checkpoint) in said
    (entry,) = store.iterdir()
    assert {file.name for file in entry.iterdir()} == {"model.onnx", "sealed.json"}
    made = (entry / "model.onnx").stat().st_mtime_ns
    assert error(moge_hal.load(checkpoint, "onnx")(IDS), small(IDS)) < LIMIT
    assert capsys.readouterr().err == ""
    assert (entry / "model.onnx").stat().st_mtime_ns == made


def _cut_short(entry: Path) -> None:
    (entry / "model.onnx").write_bytes((entry / "model.onnx").read_bytes()[:5000])


def _changed(entry: Path) -> None:
    graph = (entry / "model.onnx").read_bytes()
    (entry / "model.onnx").write_bytes(graph.replace(b"Sigmoid", b"Softmax"))


def _half_written(entry: Path) -> None:
    (entry / "sealed.json").unlink()


@pytest.mark.parametrize("damage", [_cut_short, _changed, _half_written])
def test_a_damaged_entry_is_never_used(
    damage: Callable[[Path], None],
    checkpoint: Path,
    small: Model,
    store: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    moge_hal.load(checkpoint, "onnx")
    (entry,) = store.iterdir()
    damage(entry)
    capsys.readouterr()
    assert error(moge_hal.load(checkpoint, "onnx")(IDS), small(IDS)) < LIMIT
    assert "exporting" in capsys.readouterr().err


def test_a_changed_checkpoint_is_exported_again(
    checkpoint: Path, small: Model, store: Path
) -> None:
    moge_hal.load(checkpoint, "onnx")
    shutil.rmtree(checkpoint)
    changed = {name: w * 1.5 for name, w in small.weights.items()}
    other = bind(small.config, changed, Backend(), dtype=torch.float64)
    moge_hal.save(other, checkpoint, dtype=torch.float32)
    assert error(moge_hal.load(checkpoint, "onnx")(IDS), other(IDS)) < LIMIT
    assert len(list(store.iterdir())) == 2


def test_a_half_precision_checkpoint_is_converted(
    small: Model, store: Path, tmp_path: Path
) -> None:
    moge_hal.save(small, tmp_path / "half", dtype=torch.bfloat16)
    opened = moge_hal.load(tmp_path / "half", "onnx")
    rounded = {name: w.bfloat16() for name, w in small.weights.items()}
    expected = bind(small.config, rounded, Backend(), dtype=torch.float64)(IDS)
    assert error(opened(IDS), expected) < LIMIT
    (entry,) = store.iterdir()
    assert (entry / "model.safetensors").is_file()


@pytest.mark.skipif(os.name != "posix", reason="/proc is where nobody can write")
def test_a_cache_that_cannot_be_written_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOGE_HAL_CACHE", "/proc/store")
    with pytest.raises(UserError, match="MOGE_HAL_CACHE names another place"):
        moge_hal.load(checkpoint, "onnx")


def test_a_foreign_or_damaged_graph_is_refused(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(exported, path)
    graph, config = (path / "model.onnx").read_bytes(), (path / "config.json").read_text("utf-8")
    other = json.dumps({**json.loads(config), "head_dim": 10})
    (path / "config.json").write_text(other, encoding="utf-8")
    with pytest.raises(UserError, match=r"not moge_hal's graph of the model that config\.json"):
        moge_hal.load(path, "onnx")
    (path / "config.json").write_text(config, encoding="utf-8")
    (path / "model.onnx").write_bytes(graph[:-100])
    with pytest.raises(UserError, match=r"model\.onnx cannot be read"):
        moge_hal.load(path, "onnx")
    (path / "model.onnx").write_bytes(graph)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be opened by ONNX Runtime"):
        moge_hal.load(path, "onnx")


def test_a_folder_without_weights_is_not_opened(tmp_path: Path) -> None:
    assert OnnxBackend().open(tmp_path, CONFIG) is None


# Modules of single operations: what the conformance suite does not ask.


class Operation(nn.Module):
    def __init__(self, backend: Backend, name: str) -> None:
        super().__init__()
        self.backend, self.name = backend, name

    def forward(self, *args: object) -> object:
        return getattr(self.backend, self.name)(*args)


def compiled(name: str, example: tuple[object, ...], **dynamic: int) -> Operation:
    module: Operation = OnnxBackend().compile(Operation(OnnxBackend(), name), example, dynamic)
    return module


def test_ids_of_experts_elsewhere_add_nothing() -> None:
    """Whatever their weight is; a row with none here is exactly zero; no rows are no rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, 8), (3, 10, 8), (3, 8, 5))
    x, gate_up, down = (torch.randn(shape, generator=generator) for shape in shapes)
    ids = torch.tensor([[0, 4], [5, 9], [4, 6], [0, 9], [8, 1], [2, 5], [6, 7]]).int()
    weights = torch.rand(7, 2, generator=generator)
    weights[(ids < 4) | (ids > 6)] = float("nan")
    args = (x, gate_up, down, ids, weights, 4)
    run = compiled("experts", args, T=7)
    got = run(*args)
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got, ops.experts(*args))
    assert not got[3].any() and not got[4].any()
    empty = run(x[:0], gate_up, down, ids[:0], weights[:0], 4)
    assert isinstance(empty, Tensor) and empty.shape == (0, 8)


def test_ties_go_to_the_lowest_index() -> None:
    spec = RouteSpec(4, 8)
    ids, weights = compiled("route", (torch.randn(7, 20), spec), T=7)(torch.zeros(3, 20), spec)
    assert ids.dtype == torch.int32
    assert ids.tolist() == [[0, 1, 5, 6, 10, 11, 15, 16]] * 3
    assert torch.allclose(weights, torch.tensor(1 / 20))


def test_what_is_static_must_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    run = compiled("route", (torch.randn(7, 20), RouteSpec(4, 8)), T=7)
    with pytest.raises(UserError, match="compile it again"):
        run(torch.randn(3, 20), RouteSpec(4, 4))


def test_a_cached_attention_compiles_from_an_empty_past() -> None:
    """Three calls of other lengths against the operator's own implementation, which is the
    specification: outputs, keys, values and holes."""
    generator = torch.Generator().manual_seed(0)
    q, kv = (torch.randn(2, 9, h, 8, generator=generator) for h in (6, 2))
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [-1, 0, -1, 1, 2, 3, -1, 4, -1]])
    empty = AppendCache.empty(CONFIG, 2, 9).layers[0]
    example = (q[:, :5].clone(), kv[:, :5].clone(), kv[:, :5].clone(), empty, positions[:, :5])
    run = compiled("attention", example, S=5)
    mine = empty
    theirs: AppendLayer | None = empty
    for part in (slice(0, 5), slice(5, 6), slice(6, 9)):
        args = (q[:, part], kv[:, part], kv[:, part] * 2)
        got, mine = run(*args, mine, positions[:, part])
        expected, theirs = Lowering().attention(*args, theirs, positions[:, part])
        assert isinstance(mine, AppendLayer) and isinstance(theirs, AppendLayer)
        real = positions[:, part] >= 0
        torch.testing.assert_close(got[real], expected[real])
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)


def test_the_operators_are_the_specification(exact: Model, weights: dict[str, Tensor]) -> None:
    """The exported program and its eager run are one: the lowerings run as they are, uncompiled."""

    class Eager(Lowering):
        def new_cache(self, *args: object) -> AppendCache:
            return AppendCache.empty(CONFIG, 3, 11)

    eager = bind(CONFIG, weights, Eager())
    cache, positions = eager.new_cache(3), torch.arange(11).expand(3, -1)
    first = eager.step(IDS[:, :7], positions[:, :7], cache)
    second = eager.step(IDS[:, 7:], positions[:, 7:], first.cache)
    assert error(torch.cat([first.logits, second.logits], 1), exact(IDS)) < LIMIT


def test_a_node_without_a_rule_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            spectrum: Tensor = torch.fft.fft(x).real
            return spectrum

    with pytest.raises(UserError, match=r"cannot export aten\.fft.*has no rule"):
        OnnxBackend().compile(Odd(), (torch.randn(7, 3),), {"T": 7})


def test_plain_torch_between_operations_is_exact() -> None:
    """The table of export/aten.py, on sizes that the example did not have."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.arange(24.0).view(12, 2))

        def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, ...]:
            low, high = x.chunk(2, -1)
            near = torch.where(n % 5 >= 2, n // 5, -1)
            return (
                torch.stack([low * 2 - high, torch.cat([low, high[:, :0]], 1)], 1),
                x.view(x.shape[0], 2, -1).transpose(1, 2).reshape(-1, 2),
                nn.functional.embedding(near.clamp(min=0, max=11), self.table),
                near,
                x[:, 1::2].unsqueeze(1),
                n.to(torch.float32) / 3,
                (n != 4).permute(0),
                x,
            )

    module = Plain()
    run = OnnxBackend().compile(module, (torch.randn(7, 6), torch.arange(7)), {"T": 7})
    args = (torch.randn(11, 6), torch.arange(-4, 7).int())
    got, expected = run(*args), module(*args)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype or not b.is_floating_point()
        np.testing.assert_array_equal(a.numpy(), b.detach().numpy())
