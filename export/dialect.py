"""The decoder in the dialect of the ecosystem's runtimes, as ONNX.

   input_ids, position_ids [batch, seq] int64
   attention_mask [batch, total] int64: 0 is padding; total = past + seq
   past_key_values.N.key, past_key_values.N.value [batch, Hkv, past, d] float32
-> logits [batch, seq, V] float32
   present.N.key, present.N.value [batch, Hkv, past + seq, d] float32
   routes [L, batch * seq, K] int64, on request: the experts of every token
"""

from collections.abc import Callable, Mapping
from typing import Any

import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn

from moge_hal.checkpoint import Checkpoint, Released
from moge_hal.errors import UserError
from moge_hal.export.cache import AppendCache, AppendLayer
from moge_hal.export.library import split_mask
from moge_hal.export.walk import WeightSource, to_model
from moge_hal.model import Transformer
from moge_hal.shards import Place


def past_names(layers: int) -> list[str]:
    """Names of the inputs that hold the past, in order."""
    return [f"past_key_values.{i}.{x}" for i in range(layers) for x in ("key", "value")]


def present_names(layers: int) -> list[str]:
    """Names of the outputs to pass as the past of the next call, in the order of `past_names`."""
    return [f"present.{i}.{x}" for i in range(layers) for x in ("key", "value")]


def route_names(layers: int) -> list[str]:
    """Values inside the graph: the experts [T, K] that each layer chose."""
    return [f"layers.{i}.mlp/route/ids" for i in range(layers)]


def decoder_graph(
    transformer: Transformer, weights: WeightSource, routes: bool = False
) -> onnx.ModelProto:
    """The graph of a transformer bound to `Lowering`; of its parameters only shapes are read."""
    config = transformer.config
    layers, heads, size = (
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.head_dim,
    )
    batch, length, past = 2, 3, 5  # any sizes: all of them vary

    # Every input is a tensor of its own: torch.export takes one that is passed twice for one input.
    def column(columns: int) -> Tensor:
        return torch.zeros(batch, columns, dtype=torch.long)

    def held() -> Tensor:
        return torch.zeros(batch, heads, past, size)

    pasts = [(held(), held()) for _ in range(layers)]
    two = {0: "batch", 1: "seq"}
    masked = {0: "batch", 1: "total"}
    before = {0: "batch", 2: "past"}
    dims = {name: torch.export.Dim(name) for name in ("batch", "seq", "total", "past")}

    def named(axes: dict[int, str]) -> dict[int, Any]:
        return {axis: dims[name] for axis, name in axes.items()}

    with torch.no_grad():
        program = torch.export.export(
            _Dialect(transformer, routes).eval(),
            (column(length), column(past + length), column(length), pasts),
            dynamic_shapes=(
                named(two),
                named(masked),
                named(two),
                [(named(before), named(before)) for _ in range(layers)],
            ),
            strict=False,
        )
    inputs = [("input_ids", two), ("attention_mask", masked), ("position_ids", two)]
    inputs += [(name, before) for name in past_names(layers)]
    outputs = ["logits", *present_names(layers), *(["routes"] if routes else [])]
    return to_model(program, weights, inputs, outputs, root="model")


class _Dialect(nn.Module):
    """The model's step with the ecosystem's inputs and outputs."""

    def __init__(self, model: Transformer, routes: bool) -> None:
        super().__init__()
        self.model = model
        self.routes = routes

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Any, ...]:
        positions, seen = split_mask(attention_mask, position_ids, past[0][0])
        cache = AppendCache([AppendLayer(k, v, seen) for k, v in past], capacity=0)
        out = self.model(input_ids, positions, cache)
        present = [(layer.key, layer.value) for layer in out.cache.layers]
        return (out.logits, present, out.routes) if self.routes else (out.logits, present)


def weights_in(checkpoint: Checkpoint) -> WeightSource:
    """Initializers that are places in a checkpoint's safetensors, by file name: the graph must be
    opened beside them.

    A fused or stacked weight is as many initializers as the file has tensors. Raises `UserError` if
    one is not float32.
    """
    return _weights(checkpoint.layout, checkpoint.locate)


def _weights(layout: Mapping[str, Released], locate: Callable[[str], Place]) -> WeightSource:
    def source(name: str) -> list[TensorProto] | None:
        if name not in layout:
            return None
        released = layout[name]
        shape = released.part if len(released.names) > 1 else released.shape
        return [_external(part, locate(part), shape) for part in released.names]

    return source


def _external(name: str, place: Place, shape: tuple[int, ...]) -> TensorProto:
    if place.dtype != torch.float32:
        raise UserError(f"{place.file}: tensor {name!r} is {place.stored}, the graph needs F32")
    tensor = TensorProto(
        name=name, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL, dims=shape
    )
    where = {"location": place.file.resolve().name, "offset": place.offset, "length": place.length}
    for key, value in where.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
