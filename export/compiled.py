"""Any module in ONNX Runtime: what `compile` makes of a module that is not a whole model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from moge_hal.errors import UserError
from moge_hal.export.cache import AppendLayer
from moge_hal.export.session import open_session, to_numpy
from moge_hal.export.walk import to_model


class CompiledModule:
    """A module as a session: called with the same arguments, tensors in and out.

    What is no tensor in the example (None, numbers, a RouteSpec) is part of the graph and must be
    the same in every call.
    """

    def __init__(
        self, module: nn.Module, example: tuple[Any, ...], dynamic: Mapping[str, int]
    ) -> None:
        """dynamic: name -> a size's value in `example`; every axis of that length varies."""
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
        """The module's result. Raises `UserError` if what is static differs from the example."""
        leaves, spec = _pytree.tree_flatten(args)
        static = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if spec != self.spec or static != self.static:
            raise UserError(
                f"this module was compiled for {self.static} in {self.spec}, not for {static} in "
                f"{spec}; compile it again"
            )
        feeds = {
            name: to_numpy(leaves[place])
            for name, place in zip(self.inputs, self.places, strict=True)
        }
        arrays = iter(self.session.run(self.outputs, feeds))
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
    """{length: name} of what varies, and the example's leaves. Its pasts, which are empty, become
    longer than everything else in it, so that their axis can be told by its length too.
    """
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
