"""An exported folder: the graph, its weights, and what each runtime needs to open it."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, float32

import moge_hal
from moge_hal.backend import Step
from moge_hal.checkpoint import Checkpoint, save
from moge_hal.config import Config
from moge_hal.errors import UserError
from moge_hal.export import GRAPH
from moge_hal.export.check import check_step
from moge_hal.export.dialect import decoder_graph, past_names, weights_in
from moge_hal.export.library import Lowering
from moge_hal.export.session import OnnxStep
from moge_hal.files import new_folder
from moge_hal.loading import load
from moge_hal.model import Transformer
from moge_hal.runtime import Model
from moge_hal.shards import has_weights

README = (
    "An ONNX model, exported by moge_hal {version}: the graph is model.onnx, its weights are in "
    "the safetensors.\n"
    'moge_hal: `MOGE_HAL_BACKEND=onnx moge-hal generate "..." --model FOLDER`; other backends open '
    "it too.\n"
    "onnxruntime, OpenVINO: from input_ids, attention_mask, position_ids and "
    "past_key_values.N.key/value to logits and present.N.key/value.\n"
    "onnxruntime-genai: `onnxruntime_genai.Model(FOLDER)`.\n"
)


def to_onnx(
    model: Model | str | Path,
    path: str | Path,
    *,
    routes: bool = False,
    check: bool = True,
    progress: Callable[[str], object] | None = None,
) -> Path:
    """Writes a model as ONNX into a new folder, complete or not at all, and returns the folder.

    model: a `Model`, or the folder of a checkpoint, whose weights are then read one at a time.
    routes: add the experts of every token as a last output. check: compare the graph with torch
    before it takes its place. progress: told what is being done. Raises `UserError` if the target
    is no new folder or cannot be written, and `CheckError` if the graph differs from the model;
    nothing is left behind.
    """
    tell = progress or (lambda stage: None)
    target = Path(path).resolve()
    source = None if isinstance(model, Model) else Path(model).resolve()
    if source is not None and target.is_relative_to(source):
        raise UserError(f"{target} lies inside the model's own folder: give a folder elsewhere")
    with new_folder(target) as folder:
        if not isinstance(model, Model):
            tell("reading the model")
            model = load(model, _Unbound())
        tell("writing the model")
        checkpoint = write_model(model, folder, routes=routes)
        config = Config.from_json(folder / "config.json")
        onnx.checker.check_model(folder / GRAPH)
        write_extras(folder, config, source)
        if check:
            tell("checking it against torch")
            check_step(OnnxStep(folder / GRAPH, config), config, checkpoint)
    return target


def write_model(
    model: Model, folder: Path, transformer: Transformer | None = None, routes: bool = False
) -> Checkpoint:
    """Fills an empty folder: weights in float32, configuration, tokenizer, graph. -> the weights.

    transformer: bound to `Lowering`, for the graph; None = made here.
    """
    save(model, folder, dtype=float32)
    transformer = transformer or Transformer(model.config, Lowering(), float32)
    checkpoint = Checkpoint(folder, model.config)
    graph = decoder_graph(transformer, weights_in(checkpoint), routes)
    (folder / GRAPH).write_bytes(graph.SerializeToString())
    return checkpoint


def write_extras(folder: Path, config: Config, source: Path | None) -> None:
    """genai_config.json, README.md and, if the source folder has one, generation_config.json."""
    text = json.dumps(genai_config(config), indent=2) + "\n"
    (folder / "genai_config.json").write_text(text, encoding="utf-8")
    readme = README.format(version=moge_hal.__version__)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    if source is not None and (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")


def genai_config(config: Config) -> dict[str, Any]:
    """What onnxruntime-genai reads (https://onnxruntime.ai/docs/genai/reference/config.html).

    `decoder` is its type for models that it does not know by name. The cache grows by
    concatenation, so past and present cannot share one buffer.
    """
    end = config.eos_token_id
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": end, "pad_token_id": end}
    inputs = ("input_ids", "attention_mask", "position_ids")
    key, value = (name.replace(".0.", ".%d.") for name in past_names(1))
    return {
        "model": {
            "type": "decoder",
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            **{name: token for name, token in ids.items() if token is not None},
            "decoder": {
                "filename": GRAPH,
                "hidden_size": config.hidden_size,
                "head_size": config.head_dim,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "session_options": {"provider_options": []},
                "inputs": {
                    **{name: name for name in inputs},
                    "past_key_names": key,
                    "past_value_names": value,
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "max_length": config.max_position_embeddings,
            "past_present_share_buffer": False,
        },
    }


class _Unbound(Lowering):
    """Opens a checkpoint without binding its weights: the exporter reads them one at a time."""

    name = "export"

    def open(self, folder: Any, config: Config) -> Step | None:
        # Without weights, `load` asks for them next and says what is missing.
        return _refuse if has_weights(Path(folder)) else None


def unbound(config: Config, weights: Mapping[str, Tensor]) -> Model:
    """Weights as a model that can be written but not run."""
    return Model(config, Lowering(), _refuse, float32, [], weights)


def _refuse(*args: Any, **options: Any) -> Any:
    raise UserError("a model that is being exported does not run")
