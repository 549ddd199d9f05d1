"""Exported graphs in ONNX Runtime: any module, and the step of a whole model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper
from torch import Tensor, fx, nn
from torch.utils import _pytree

from moge_hal.backend import StepOut
from moge_hal.config import Config
from moge_hal.errors import UserError
from moge_hal.export.cache import AppendCache, AppendLayer
from moge_hal.export.dialect import past_names, present_names, route_names
from moge_hal.export.walk import to_model


def open_session(model: onnx.ModelProto, folder: Path | None = None) -> Any:
    """A session on as many threads as torch uses. folder: where the files lie that the initializers name."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = (
        3  # errors: its warnings concern graphs that were not built by hand
    )
    if folder is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(folder))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


class OnnxStep:
    """`moge_hal.backend.Step` over a graph in the dialect of `dialect.py`. Its cache is an `AppendCache`."""

    def __init__(self, file: Path, config: Config, weights: Path | None = None) -> None:
        """file: the graph. weights: the folder of its safetensors, None = beside the graph."""
        self.config = config
        model = onnx.load(file, load_external_data=False)
        self._check(model, file)
        layers = config.num_hidden_layers
        # Routes are observable whether the file has them as an output or not: the values are inside.
        for name in route_names(layers):
            sizes = ("tokens", config.num_experts_per_tok)
            info = helper.make_tensor_value_info(name, onnx.TensorProto.INT64, sizes)
            model.graph.output.append(info)
        self.outputs = ["logits", *present_names(layers), *route_names(layers)]
        self.session = open_session(model, weights or file.parent)
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
                f"{file} is not the graph of the model in {file.parent / 'config.json'}: "
                f"export it again with `moge-hal export`"
            )

    def __call__(
        self, ids: Tensor, positions: Tensor, cache: AppendCache | None, last_only: bool = False
    ) -> StepOut:
        """One step; without a cache the call's own tokens are all there is. See `moge_hal.backend.Step`."""
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


class CompiledModule:
    """A module as a session: called with the same arguments, tensors in and out.

    What is no tensor in the example (None, numbers, a RouteSpec) is part of the graph and must be the same in every call.
    """

    def __init__(
        self, module: nn.Module, example: tuple[Any, ...], dynamic: Mapping[str, int]
    ) -> None:
        """dynamic: name -> the varying size's value in `example`; every axis of that length varies."""
        leaves, self.spec = _pytree.tree_flatten(example)
        self.static = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        lengths, leaves = _with_past(example, dynamic)
        # Copies: torch.export takes a tensor that is passed twice for one input.
        tensors = [leaves[i].clone() for i in self.places]
        axes = [{i: lengths[n] for i, n in enumerate(t.shape) if n in lengths} for t in tensors]
        dims = {name: torch.export.Dim(name, min=0) for name in lengths.values()}
        flat = _Flat(module, self.spec, self.static, self.places)
        with torch.no_grad():
            program = torch.export.export(
                flat,
                tuple(tensors),
                dynamic_shapes=(tuple({i: dims[n] for i, n in a.items()} for a in axes),),
                strict=False,
            )
        self.inputs = [f"input{i}" for i in range(len(tensors))]
        self.result = list(program.graph.output_node().args[0])  # nodes, and what is no tensor
        self.result_spec = program.call_spec.out_spec
        results = [leaf for leaf in self.result if isinstance(leaf, fx.Node)]
        self.outputs = [f"output{i}" for i in range(len(results))]
        model = to_model(
            program,
            lambda name: None,
            list(zip(self.inputs, axes, strict=True)),
            self.outputs,
            root="module",
        )
        self.session = open_session(model)

    def __call__(self, *args: Any) -> Any:
        """The module's result for `args`. Raises `UserError` if something static differs from the example."""
        leaves, spec = _pytree.tree_flatten(args)
        static = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if spec != self.spec or static != self.static:
            raise UserError(
                f"this module was compiled for {self.static} in {self.spec}, not for {static} in {spec}; compile it again"
            )
        feeds = {
            name: to_numpy(leaves[place])
            for name, place in zip(self.inputs, self.places, strict=True)
        }
        arrays = self.session.run(self.outputs, feeds)
        arrays = iter(arrays)
        result = [
            torch.from_numpy(next(arrays)).to(leaf.meta["val"].dtype)
            if isinstance(leaf, fx.Node)
            else leaf
            for leaf in self.result
        ]
        return _pytree.tree_unflatten(result, self.result_spec)


class _Flat(nn.Module):
    """A module as a function of its tensors alone."""

    def __init__(self, module: nn.Module, spec: Any, static: list[Any], places: list[int]) -> None:
        super().__init__()
        self.module = module
        self.spec, self.static, self.places = spec, static, places

    def forward(self, *tensors: Tensor) -> Any:
        leaves = list(self.static)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return self.module(*_pytree.tree_unflatten(leaves, self.spec))


def _with_past(
    example: tuple[Any, ...], dynamic: Mapping[str, int]
) -> tuple[dict[int, str], list[Any]]:
    """Length -> name of the varying sizes, and the example's leaves with pasts long enough to be told from everything else."""
    sizes = {
        n for leaf in _pytree.tree_leaves(example) if isinstance(leaf, Tensor) for n in leaf.shape
    }
    past = max(sizes, default=0) + 1

    def lengthen(node: Any) -> Any:
        if not isinstance(node, AppendLayer):
            return node
        batch, heads, _, size = node.key.shape
        empty = torch.zeros(batch, heads, past, size)
        return AppendLayer(empty, empty.clone(), torch.zeros(batch, past, dtype=torch.bool))

    longer = _pytree.tree_map(lengthen, example, is_leaf=lambda n: isinstance(n, AppendLayer))
    lengths = {size: name for name, size in dynamic.items()} | {past: "past"}
    return lengths, _pytree.tree_leaves(longer)


def to_numpy(tensor: Tensor) -> "np.ndarray[Any, Any]":
    """The tensor as a session takes it: on the host, contiguous, whole numbers as int64."""
    tensor = tensor.detach().cpu()
    if not (tensor.is_floating_point() or tensor.dtype == torch.bool):
        tensor = tensor.long()
    return tensor.contiguous().numpy()
