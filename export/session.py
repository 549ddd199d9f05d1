"""A whole model in ONNX Runtime: the step that the rest of the program sees."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper
from torch import Tensor

from moge_hal.backend import StepOut
from moge_hal.config import Config
from moge_hal.errors import UserError
from moge_hal.export.cache import AppendCache, AppendLayer
from moge_hal.export.dialect import past_names, present_names, route_names


def open_session(model: onnx.ModelProto, folder: Path | None = None) -> Any:
    """A session with as many threads as torch has. folder: of the files that initializers name."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    if folder is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(folder))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


class OnnxStep:
    """`moge_hal.backend.Step` over a graph in the dialect of `dialect.py`, with `AppendCache`."""

    def __init__(self, file: Path, config: Config, weights: Path | None = None) -> None:
        """file: the graph. weights: the folder of its safetensors, None = beside the graph."""
        self.config = config
        try:
            model = onnx.load(file, load_external_data=False)
        except Exception as error:  # of the system, or of protobuf, which publishes no types
            raise UserError(f"{file} cannot be read ({error}): export it again") from error
        self._check(model, file)
        layers = config.num_hidden_layers
        # Routes are observable in every file: the values are inside.
        for name in route_names(layers):
            sizes = ("tokens", config.num_experts_per_tok)
            info = helper.make_tensor_value_info(name, onnx.TensorProto.INT64, sizes)
            model.graph.output.append(info)
        self.outputs = ["logits", *present_names(layers), *route_names(layers)]
        try:
            self.session = open_session(model, _follow_links(model, weights or file.parent))
        except Exception as error:  # ONNX Runtime has a class of its own for every kind of failure
            raise UserError(
                f"{file} cannot be opened by ONNX Runtime ({error}): export it again"
            ) from error
        self.keep: Any = None  # what must live as long as the session does

    def _check(self, model: onnx.ModelProto, file: Path) -> None:
        c = self.config
        values = {name for node in model.graph.node for name in node.output}
        inputs = {
            i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input
        }
        wanted = {
            name: [0, c.num_key_value_heads, 0, c.head_dim]
            for name in past_names(c.num_hidden_layers)
        }
        held = {name: shape for name, shape in inputs.items() if name.startswith("past_")}
        if held != wanted or not set(route_names(c.num_hidden_layers)) <= values:
            raise UserError(
                f"{file} is not moge_hal's graph of the model that config.json describes: "
                f"export it again with `moge-hal export`"
            )

    def __call__(
        self, ids: Tensor, positions: Tensor, cache: AppendCache | None, last_only: bool = False
    ) -> StepOut:
        """Without a cache, the call's own tokens are all there is. Shapes: `moge_hal.backend`."""
        layers = self.config.num_hidden_layers
        past = cache or AppendCache.empty(self.config, ids.shape[0], 0)
        seen = torch.cat([past.layers[0].seen, positions >= 0], 1)
        feeds = {
            "input_ids": ids,
            "attention_mask": seen.long(),
            "position_ids": positions.clamp(min=0),
        }
        held = [tensor for layer in past.layers for tensor in (layer.key, layer.value)]
        feeds |= dict(zip(past_names(layers), held, strict=True))
        arrays = {name: to_numpy(tensor) for name, tensor in feeds.items()}
        logits, *rest = map(torch.from_numpy, self.session.run(self.outputs, arrays))
        present, routes = rest[: 2 * layers], rest[2 * layers :]
        if cache is not None:
            pairs = zip(present[::2], present[1::2], strict=True)
            cache = cache.with_layers([AppendLayer(k, v, seen) for k, v in pairs])
        return StepOut(logits[:, -1:] if last_only else logits, cache, torch.stack(routes).int())


def _follow_links(model: onnx.ModelProto, folder: Path) -> Path:
    """The folder where the weights really lie; the graph then names the files as they are there.

    A download cache keeps a model as links to files of other names elsewhere, and ONNX Runtime
    refuses weights that a link leads out of the graph's folder.
    """
    places = [
        entry
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location" and Path(entry.value).name == entry.value
    ]
    real: dict[str, Path] = {place.value: (folder / place.value).resolve() for place in places}
    folders = {file.parent for file in real.values()}
    if len(folders) != 1:
        return folder  # ONNX Runtime will judge
    for place in places:
        place.value = real[place.value].name
    return folders.pop()


def to_numpy(tensor: Tensor) -> "np.ndarray[Any, Any]":
    """The tensor as a session takes it: on the host, contiguous, whole numbers as int64."""
    tensor = tensor.detach().cpu()
    if not (tensor.is_floating_point() or tensor.dtype == torch.bool):
        tensor = tensor.long()
    return tensor.contiguous().numpy()
