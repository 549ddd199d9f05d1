"""From the graph of `torch.export` to ONNX: a builder for every `moge_hal` operator, and a small
table for the plain torch nodes between them.

Names are readable and the same at every export: a node is called after the module whose weight it
uses, or else after the module and operation that it belongs to (`layers.0.self_attn.q_proj/Gemm`,
`layers.0.mlp/route/TopK`).
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx

import moge_hal
from moge_hal.errors import UserError
from moge_hal.export.aten import RULES, Result, onnx_type
from moge_hal.export.builders import BUILDERS
from moge_hal.export.graph import IR_VERSION, OPSET, Builder, Value

# A parameter's initializers by its name in the module: several when a fused weight lies in pieces;
# None = keep it in the graph.
WeightSource = Callable[[str], "list[TensorProto] | None"]


def to_model(
    program: torch.export.ExportedProgram,
    weights: WeightSource,
    inputs: Sequence[tuple[str, Mapping[int, str]]],
    outputs: Sequence[str],
    root: str = "",
) -> onnx.ModelProto:
    """The ONNX model of an exported program.

    inputs, outputs: names in order, an input's with {axis: name of its varying size}.
    root: the submodule whose path is left out of all names. Raises `UserError` for a node that has
    no rule.
    """
    return _Walk(program, weights, root).run(inputs, outputs)


class _Walk:
    def __init__(
        self, program: torch.export.ExportedProgram, weights: WeightSource, root: str
    ) -> None:
        self.program = program
        self.weights = weights
        self.root = root
        self.b = Builder()
        self.initializers: dict[str, TensorProto] = {}
        self.values: dict[fx.Node, Any] = {}
        self.labels: dict[str, str] = {}  # torch's symbol of a varying size -> our name for it
        self.owners: dict[fx.Node, str] = {}  # a weight's node -> the module that holds it

    def run(
        self, inputs: Sequence[tuple[str, Mapping[int, str]]], outputs: Sequence[str]
    ) -> onnx.ModelProto:
        nodes = list(self.program.graph.nodes)
        users = iter(inputs)
        infos = [
            self._input(node, *next(users))
            for node in nodes
            if node.op == "placeholder" and not self._held(node)
        ]
        live = _live(nodes)
        for node in nodes:
            if node not in live:
                continue
            if node.op == "placeholder" and (tensor := self._held(node)):
                self._weight(node, *tensor)
            elif node.op == "call_function":
                self._call(node)
        results = [n for n in _flat(nodes[-1].args) if isinstance(n, fx.Node)]
        if len(results) != len(outputs):
            raise UserError(
                f"the module returns {len(results)} tensors, not the {len(outputs)} that are named"
            )
        self._name_outputs([self.values[n].name for n in results], outputs)
        returned = [
            self._info(name, n.meta["val"]) for name, n in zip(outputs, results, strict=True)
        ]
        initializers = [*self.initializers.values(), *self.b.constants.values()]
        graph = helper.make_graph(self.b.nodes, "moge_hal", infos, returned, initializers)
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="moge_hal",
            producer_version=moge_hal.__version__,
        )

    def _held(self, node: fx.Node) -> tuple[str, Tensor] | None:
        """Name and tensor of a placeholder that is a parameter, a buffer or a constant of the
        module.
        """
        signature = self.program.graph_signature
        for names in (
            signature.inputs_to_parameters,
            signature.inputs_to_buffers,
            signature.inputs_to_lifted_tensor_constants,
        ):
            if node.name in names:
                name = names[node.name]
                held = self.program.state_dict.get(name)
                return name, self.program.constants[name] if held is None else held
        return None

    def _input(self, node: fx.Node, name: str, axes: Mapping[int, str]) -> onnx.ValueInfoProto:
        shape = _sizes(node.meta["val"])
        self.values[node] = Value(name, shape, node.meta["val"].dtype)
        for axis, label in axes.items():
            symbol = str(shape[axis])
            if isinstance(shape[axis], int):
                raise UserError(
                    f"torch.export fixed the varying size {label!r} of input {name!r} to {symbol}"
                )
            self.labels.setdefault(symbol, label)
            self.b.symbols.setdefault(symbol, (name, axis))
        return self._info(name, node.meta["val"])

    def _info(self, name: str, tensor: Tensor) -> onnx.ValueInfoProto:
        dims = [n if isinstance(n, int) else self._label(n) for n in _sizes(tensor)]
        return helper.make_tensor_value_info(name, onnx_type(tensor.dtype), dims)

    def _label(self, size: torch.SymInt) -> str:
        expression = size.node.expr
        names = {s: self.labels.get(str(s), str(s)) for s in expression.free_symbols}
        return " + ".join(sorted(str(term.subs(names)) for term in expression.as_ordered_terms()))

    def _weight(self, node: fx.Node, name: str, tensor: Tensor) -> None:
        shape = tuple(tensor.shape)
        local = name.removeprefix(f"{self.root}.") if self.root else name
        pieces = self.weights(local)
        if pieces is None:
            value = numpy_helper.from_array(tensor.detach().contiguous().numpy(), local)
            pieces = [value]
        self.initializers |= {p.name: p for p in pieces}
        self.owners[node] = local.rpartition(".")[0]
        names = tuple(p.name for p in pieces)
        single = names[0] if len(names) == 1 else ""
        self.values[node] = Value(single, shape, tensor.dtype, () if single else names)

    def _call(self, node: fx.Node) -> None:
        if not _is_tensor(node.meta.get("val")):
            return  # arithmetic on sizes: a rule reads the result's shape instead
        if node.target is operator.getitem:
            source: Any
            source, index = node.args
            self.values[node] = self.values[source][index]
            return
        target = str(node.target).removeprefix("aten.")
        args = [self._argument(a) for a in node.args]
        options = {k: self._argument(a) for k, a in node.kwargs.items() if k != "dtype"}
        made: Any
        with self.b.scope(self._scope(node)):
            if getattr(node.target, "namespace", "") == "moge_hal":
                made = BUILDERS[target.split(".")[1]](self.b, *args, **options)
            elif target in RULES:
                made = RULES[target](self.b, _result(node.meta["val"]), *args, **options)
            else:
                raise UserError(
                    f"cannot export {node.target} (node {node.name!r} in module "
                    f"{self._module(node)!r}): it has no rule; use an operation of "
                    f"moge_hal.Backend, or add a rule to export/aten.py"
                )
        self.values[node] = self._named(made, node.meta["val"])

    def _named(self, made: Any, result: Any) -> Any:
        if isinstance(result, tuple | list):
            return [self._named(m, r) for m, r in zip(made, result, strict=True)]
        name = made.name if isinstance(made, Value) else made
        return Value(name, _sizes(result), result.dtype)

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, tuple | list):
            return [self._argument(a) for a in argument]
        if isinstance(argument, fx.Node):
            known = self.values.get(argument)
            return argument.meta["val"] if known is None else known
        return argument

    def _module(self, node: fx.Node) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        paths = [path for path, _ in stack.values() if not path.startswith("_")]
        path = paths[-1] if paths else ""
        return path.removeprefix(self.root).removeprefix(".")

    def _scope(self, node: fx.Node) -> str:
        module = self._module(node)
        if getattr(node.target, "namespace", "") != "moge_hal":
            return module
        owner = next((self.owners[a] for a in node.all_input_nodes if a in self.owners), module)
        name = str(node.target).split(".")[1].removesuffix("_append")
        return owner if owner != module else f"{module}/{name}".removeprefix("/")

    def _name_outputs(self, made: list[str], outputs: Sequence[str]) -> None:
        """Gives results the names that the caller wants; one that is an input, or returned twice,
        is copied.
        """
        produced = {name for n in self.b.nodes for name in n.output}
        names: dict[str, str] = {}
        for value, wanted in zip(made, outputs, strict=True):
            if value in produced and value not in names:
                names[value] = wanted
            else:
                self.b.Identity(value, outputs=(wanted,))
        for node in self.b.nodes:
            for field in (node.input, node.output):
                field[:] = [names.get(n, n) for n in field]


def _live(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes that the output needs. Checks that torch.export adds have no users and drop out
    here.
    """
    live = {nodes[-1]}
    for node in reversed(nodes):
        if node in live:
            live.update(node.all_input_nodes)
    return live


def _flat(tree: Any) -> Iterable[Any]:
    if isinstance(tree, tuple | list):
        for branch in tree:
            yield from _flat(branch)
    else:
        yield tree


def _is_tensor(result: Any) -> bool:
    return isinstance(result, Tensor | tuple | list)


def _result(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_result(v) for v in value]
    return Result(_sizes(value), value.dtype)


def _sizes(tensor: Tensor) -> tuple[Any, ...]:
    """The shape; a size that torch computed and that came out fixed is an int."""
    fixed = (n if isinstance(n, int) else n.node.maybe_as_int() for n in tensor.shape)
    return tuple(n if f is None else f for n, f in zip(tensor.shape, fixed, strict=True))
