"""The exported folder: what is in it, who can run it, and that it computes what the model does."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import moge_hal
from moge_hal.backend import Backend
from moge_hal.bind import bind
from moge_hal.checkpoint import Checkpoint
from moge_hal.config import Config, preset
from moge_hal.errors import UserError
from moge_hal.export import CheckError, check, folder, to_onnx
from moge_hal.runtime import Model
from moge_hal.training.init import initial_weights

PROMPT = [1, 40, 7, 12, 99, 3]
NEW = 12
LIMIT = 2e-5  # of a row of logits, relative to its largest, against float64

Run = Callable[[dict[str, Any]], dict[str, Any]]


def greedy_in_torch(model: Model) -> list[int]:
    text = list(PROMPT)
    for _ in range(NEW):
        text.append(int(model([text])[0, -1].argmax()))
    return text


def model_of(config: Config, weights: dict[str, Tensor], dtype: torch.dtype) -> Model:
    """The specification itself."""
    return bind(config, weights, Backend(), dtype=dtype)


@pytest.fixture(scope="module")
def exact(weights: dict[str, Tensor]) -> Model:
    return model_of(preset("tiny"), weights, torch.float64)


@pytest.fixture(scope="module")
def small(weights: dict[str, Tensor]) -> Model:
    """One layer, where the model does not matter."""
    return model_of(preset("tiny", num_hidden_layers=1), weights, torch.float64)


@pytest.fixture(scope="module")
def exported(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preset "tiny" (five experts in each of three groups, two of each per token), with routes."""
    path = tmp_path_factory.mktemp("export") / "exported"
    return to_onnx(model_of(preset("tiny"), weights, torch.float32), path, routes=True)


@pytest.fixture(scope="module")
def graph(exported: Path) -> onnx.ModelProto:
    return onnx.load(exported / "model.onnx", load_external_data=False)


def onnxruntime_run(file: Path) -> Run:
    session = onnxruntime.InferenceSession(file)
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, feeds), strict=True))


def reference_run(file: Path) -> Run:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(file))
    names = evaluator.output_names
    return lambda feeds: dict(zip(names, evaluator.run(None, feeds), strict=True))


def openvino_run(file: Path) -> Run:
    openvino = pytest.importorskip("openvino")
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.compile_model(file, "CPU", options)
    names = [o.name for o in onnx.load(file, load_external_data=False).graph.output]

    def run(feeds: dict[str, Any]) -> dict[str, Any]:
        results = compiled(feeds)
        return {name: np.array(results[name]) for name in names}

    return run


def empty_past(config: Config, batch: int) -> dict[str, Any]:
    shape = (batch, config.num_key_value_heads, 0, config.head_dim)
    names = [f"{i}.{x}" for i in range(config.num_hidden_layers) for x in ("key", "value")]
    return {f"past_key_values.{name}": np.zeros(shape, np.float32) for name in names}


def present(out: dict[str, Any]) -> dict[str, Any]:
    """The past of the next call."""
    return {
        name.replace("present", "past_key_values"): value
        for name, value in out.items()
        if name.startswith("present")
    }


def whole_row(ids: list[int], past: dict[str, Any], before: int = 0) -> dict[str, Any]:
    """The inputs of a call with one row and no padding."""
    places = np.arange(before + len(ids))[None]
    return {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones_like(places),
        "position_ids": places[:, before:],
        **past,
    }


def error(got: Any, expected: Any) -> float:
    """Of the worst row, relative to its largest element."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float((np.abs(got - expected).max(-1) / np.abs(expected).max(-1)).max())


@pytest.mark.parametrize("runtime", [onnxruntime_run, reference_run, openvino_run])
def test_every_runtime_writes_what_torch_writes(
    runtime: Callable[[Path], Run], exported: Path, exact: Model
) -> None:
    run = runtime(exported / "model.onnx")
    text, past = list(PROMPT), empty_past(exact.config, 1)
    new, before = PROMPT, 0
    for _ in range(NEW):
        out = run(whole_row(new, past, before))
        expected = exact([text])[:, before:]
        assert error(out["logits"], expected) < LIMIT
        before, past = len(text), present(out)
        new = [int(out["logits"][0, -1].argmax())]
        text += new
    assert text == greedy_in_torch(exact)


def test_the_readme_loop_needs_no_torch(exported: Path, exact: Model, tmp_path: Path) -> None:
    """The first program of export/README.md as it stands there, in a process of its own."""
    readme = Path(folder.__file__).with_name("README.md").read_text(encoding="utf-8")
    program = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    alone = "import sys; print([n for n in ('torch', 'moge_hal', 'onnx') if n in sys.modules])"
    (tmp_path / "loop.py").write_text(program + alone, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, tmp_path / "loop.py"], cwd=exported.parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [str(greedy_in_torch(exact)), "[]"]


def test_the_folder_is_complete(exported: Path) -> None:
    names = {"README.md", "config.json", "genai_config.json", "model.onnx", "model.safetensors"}
    assert {file.name for file in exported.iterdir()} == names
    assert Config.from_json(exported / "config.json") == preset("tiny")
    assert len((exported / "README.md").read_text(encoding="utf-8").splitlines()) == 4


def test_genai_config_names_what_the_graph_has(exported: Path, graph: onnx.ModelProto) -> None:
    model = json.loads((exported / "genai_config.json").read_text(encoding="utf-8"))["model"]
    assert model["type"] == "decoder"
    decoder = model["decoder"]
    assert (exported / decoder["filename"]).is_file()
    layers = range(decoder["num_hidden_layers"])

    def named(table: dict[str, str]) -> set[str]:
        names = (name for name in table.values())
        return {name % i if "%d" in name else name for name in names for i in layers}

    assert named(decoder["inputs"]) == {i.name for i in graph.graph.input}
    assert named(decoder["outputs"]) | {"routes"} == {o.name for o in graph.graph.output}


def test_the_graph_is_portable(exported: Path, graph: onnx.ModelProto) -> None:
    """Standard domain, an opset that old compilers read, no functions, and the checker agrees."""
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 17)]
    assert {node.domain for node in graph.graph.node} == {""}
    assert graph.ir_version == 8 and not graph.functions
    assert not {"If", "Loop", "Scan", "NonZero"} & {node.op_type for node in graph.graph.node}
    onnx.checker.check_model(exported / "model.onnx", full_check=True)


def test_weights_lie_in_the_safetensors(exported: Path, graph: onnx.ModelProto) -> None:
    """Every released tensor is one initializer, and no number of it is in the graph's file."""
    from safetensors import safe_open

    with safe_open(exported / "model.safetensors", "np") as opened:
        released = set(opened.keys())
    external = {i.name for i in graph.graph.initializer if i.external_data}
    assert external == released
    inside = [i for i in graph.graph.initializer if not i.external_data]
    tables = {i.name: sum(i.dims) and i.ByteSize() for i in inside}
    rotary = tables.pop("rotary.low") + tables.pop("rotary.high")
    assert rotary < 20_000 and sum(tables.values()) < 10_000


def test_names_can_be_read(graph: onnx.ModelProto) -> None:
    names = [node.name for node in graph.graph.node]
    assert len(set(names)) == len(names)
    for name in (
        "embed_tokens/Gather",
        "layers.0.self_attn.q_proj/Gemm",
        "layers.1.self_attn/attention/Softmax",
        "layers.1.mlp/route/TopK",
        "layers.0.mlp.experts/14/Gemm",
        "layers.0.mlp.shared_expert/Gemm",
        "lm_head/Gemm",
    ):
        assert name in names


def test_two_exports_are_the_same_bytes(exported: Path, exact: Model, tmp_path: Path) -> None:
    again = to_onnx(exact, tmp_path / "again", routes=True, check=False)
    for file in exported.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_routes_are_the_specification_s(exported: Path, exact: Model) -> None:
    run = onnxruntime_run(exported / "model.onnx")
    ids = torch.arange(40).view(2, 20)
    expected = exact.step(ids, torch.arange(20).expand(2, 20), None).routes
    places = np.arange(20)[None].repeat(2, 0)
    feeds = {"input_ids": ids.numpy(), "attention_mask": places * 0 + 1, "position_ids": places}
    routes = run({**feeds, **empty_past(exact.config, 2)})["routes"]
    assert routes.dtype == np.int64
    np.testing.assert_array_equal(routes, expected.numpy())


def test_padding_on_either_side_changes_nothing(exported: Path, exact: Model) -> None:
    """Three rows of different lengths, padded left, right and not; then a step with holes behind.

    Whatever stands in a padded place, position or past, is not read: the past is NaN there.
    """
    run = onnxruntime_run(exported / "model.onnx")
    rows = [[5, 9, 200, 4, 8], [7, 7, 30], [250, 2]]
    starts = [0, 2, 0]  # the second row is padded left, the third right
    ids = np.full((3, 5), 11)
    mask, positions = np.zeros((3, 5), np.int64), np.full((3, 5), 77)
    for row, (tokens, start) in enumerate(zip(rows, starts, strict=True)):
        place = slice(start, start + len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
        positions[row, place] = np.arange(len(tokens))
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    out = run({**feeds, **empty_past(exact.config, 3)})
    assert np.isfinite(out["logits"]).all()
    for row, tokens in enumerate(rows):
        assert error(out["logits"][row][mask[row] == 1], exact([tokens])[0]) < LIMIT

    past = present(out)
    for value in past.values():
        value.transpose(0, 2, 1, 3)[mask == 0] = np.nan
    new = [[3], [4], [6]]
    feeds = {
        "input_ids": np.array(new),
        "attention_mask": np.concatenate([mask, np.ones((3, 1), np.int64)], 1),
        "position_ids": np.array([[len(tokens)] for tokens in rows]),
    }
    out = run({**feeds, **past})
    for row, tokens in enumerate(rows):
        assert error(out["logits"][row], exact([tokens + new[row]])[0, -1:]) < LIMIT


def test_an_unselected_expert_full_of_nan_changes_nothing(
    exported: Path, exact: Model, tmp_path: Path
) -> None:
    routes = exact.step(torch.tensor([PROMPT]), torch.arange(len(PROMPT))[None], None).routes
    shutil.copytree(exported, tmp_path / "spoilt")
    checkpoint = Checkpoint(tmp_path / "spoilt", exact.config)
    idle = 0
    with (tmp_path / "spoilt" / "model.safetensors").open("r+b") as file:
        for layer in range(2):
            for e in set(range(15)) - set(routes[layer].flatten().tolist()):
                idle += 1
                for matrix in ("gate", "up", "down"):
                    name = f"model.layers.{layer}.mlp.experts.{e}.{matrix}_proj.weight"
                    place = checkpoint.locate(name)
                    file.seek(place.offset)
                    file.write(np.full(place.length // 4, np.nan, np.float32).tobytes())
    assert idle, "every expert is selected: choose another prompt"
    run = onnxruntime_run(tmp_path / "spoilt" / "model.onnx")
    out = run(whole_row(PROMPT, empty_past(exact.config, 1)))
    assert error(out["logits"], exact([PROMPT])) < LIMIT


def test_work_grows_with_k_and_not_with_e(graph: onnx.ModelProto, exported: Path) -> None:
    """The rows that go into the experts' matrices are T*K in all: seen in a run, not supposed."""
    firsts = [f"layers.0.mlp.experts/{e}/Gemm" for e in range(15)]
    opened = onnx.load(exported / "model.onnx")
    inputs = {node.name: node.input[0] for node in opened.graph.node}
    for name in firsts:
        info = onnx.helper.make_tensor_value_info(inputs[name], onnx.TensorProto.FLOAT, None)
        opened.graph.output.append(info)
    session = onnxruntime.InferenceSession(opened.SerializeToString())
    feeds = whole_row(list(range(64)), empty_past(preset("tiny"), 1))
    parts = session.run([inputs[name] for name in firsts], feeds)
    assert len({inputs[name] for name in firsts}) == 15
    assert sum(len(part) for part in parts) == 64 * 6


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_checkpoint_s_folder_is_exported_without_binding_it(
    stored: torch.dtype, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    """From disk to disk, generation_config.json included; bfloat16 becomes float32."""
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    moge_hal.save(model_of(preset("tiny"), weights, torch.float32), source, dtype=stored)
    (source / "generation_config.json").write_text("{}", encoding="utf-8")
    stages: list[str] = []
    assert to_onnx(source, target, progress=stages.append) == target
    assert len(stages) == 3
    assert (target / "generation_config.json").read_text(encoding="utf-8") == "{}"
    outputs = onnx.load(target / "model.onnx", load_external_data=False).graph.output
    held = [f"present.{i}.{x}" for i in range(2) for x in ("key", "value")]
    assert [o.name for o in outputs] == ["logits", *held]  # routes were not asked for
    rounded = {name: w.to(stored).to(torch.float64) for name, w in weights.items()}
    expected = model_of(preset("tiny"), rounded, torch.float64)([PROMPT])
    out = onnxruntime_run(target / "model.onnx")(whole_row(PROMPT, empty_past(preset("tiny"), 1)))
    assert error(out["logits"], expected) < LIMIT
    assert moge_hal.load(target, "null")([PROMPT]).shape == (1, len(PROMPT), 259)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 24, "num_groups": 4, "num_experts_per_tok": 4},
        {"num_experts": 6, "num_groups": 6, "num_experts_per_tok": 6},
        {"num_experts": 8, "num_groups": 1, "num_experts_per_tok": 2},
        {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 3},
    ],
)
def test_other_shapes_export(changes: dict[str, int], tmp_path: Path) -> None:
    """Groups of six, of one, no groups; no grouped heads, and a context too short for the whole
    check.
    """
    config = preset("tiny", num_hidden_layers=1, **changes)
    weights = {n: w + 0.1 for n, w in initial_weights(config, 1).items()}
    to_onnx(model_of(config, weights, torch.float32), tmp_path / "exported")


def test_a_wrong_graph_is_refused_and_leaves_nothing(
    small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph whose norm forgets epsilon, and one that takes the second best experts."""
    from moge_hal.export import builders

    def forgetful(b: Any, x: Any, w: Any, eps: float) -> str:
        return builders.rms_norm(b, x, w, eps + 1e-3)

    def second_best(b: Any, logits: Any, *rest: Any) -> Any:
        return builders.route(b, logits.__class__(b.Neg(logits), logits.shape, logits.dtype), *rest)

    for name, wrong, reason in (
        ("rms_norm", forgetful, r"call 1 of 'one row' is off by .*limit 2e-05"),
        ("route", second_best, "chooses other experts"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(builders.BUILDERS, name, wrong)
            with pytest.raises(CheckError, match=reason):
                to_onnx(small, tmp_path / "wrong")
    assert not list(tmp_path.iterdir())


def test_large_models_are_checked_in_float32(
    small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "EXACT", 0)
    dtypes = []

    def seen(*args: Any, dtype: torch.dtype) -> Model:
        dtypes.append(dtype)
        return bind(*args, dtype=dtype)

    monkeypatch.setattr(check, "bind", seen)
    to_onnx(small, tmp_path / "exported")
    assert dtypes == [torch.float32]


def test_bad_targets_are_refused_before_any_work(small: Model, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("kept", encoding="utf-8")
    stages: list[str] = []
    with pytest.raises(UserError, match="not empty"):
        to_onnx(small, full, progress=stages.append)
    with pytest.raises(UserError, match="inside the model's own folder"):
        to_onnx(full, full / "onnx", progress=stages.append)
    with pytest.raises(UserError, match="does not exist"):
        to_onnx(tmp_path / "nowhere", tmp_path / "target")
    with pytest.raises(UserError, match="is a file"):
        to_onnx(small, full / "mine", progress=stages.append)
    assert not stages
    assert [file.name for file in tmp_path.rglob("*")] == ["full", "mine"]
