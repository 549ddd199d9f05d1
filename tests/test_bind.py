"""Binding: who serves an operation, what the report says, when a weight is packed, what is refused.

The backends here override operations in ways that can be told from the outside: by a wrong factor,
or by a packed weight that only their own override can read.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moge_hal import ops
from moge_hal.backend import Backend, Facts
from moge_hal.bind import Mode, bind
from moge_hal.config import preset
from moge_hal.errors import UserError
from moge_hal.runtime import Model

TINY = preset("tiny")
IDS = torch.tensor([[1, 200, 31, 7]])
Weights = dict[str, Tensor]


class Twice(Backend):
    """Its linear is wrong by a factor of two, so that one can see where it was used."""

    name = "twice"

    def __init__(self, reason: str | None = None, op: str = "linear") -> None:
        super().__init__()
        self.reason, self.op = reason, op
        self.asked: list[Facts] = []

    def why_not(self, facts: Facts) -> str | None:
        self.asked.append(facts)
        return self.reason if facts.op == self.op else None

    def linear(self, x: Tensor, w: Any, b: Tensor | None = None) -> Tensor:
        return 2 * ops.linear(x, w, b)


class Sealed:
    """A packed weight that nobody but its backend can read."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


def unseal(w: Any) -> Tensor:
    return w.weight if isinstance(w, Sealed) else w


class Packing(Backend):
    """Seals what it is asked to pack; linear and experts open it, swiglu_ffn must not run."""

    name = "packing"

    def __init__(self) -> None:
        super().__init__()
        self.packed: list[str] = []

    def why_not(self, facts: Facts) -> str | None:
        return "it is being repaired" if facts.op == "swiglu_ffn" else None

    def pack(self, role: str, weight: Tensor) -> Any:
        self.packed.append(role)
        return Sealed(weight.clone())

    def linear(self, x: Tensor, w: Any, b: Any = None) -> Tensor:
        return ops.linear(x, unseal(w), None if b is None else unseal(b))

    def swiglu_ffn(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        raise AssertionError("the backend said that it cannot")

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        return ops.experts(x, unseal(gate_up), unseal(down), ids, weights, first)


def choice(model: Model, op: str) -> tuple[str, str]:
    (found,) = [c for c in model.choices if c.op == op]
    return found.implementation, found.reason


def test_every_operation_has_a_choice_and_a_line_in_the_report(weights: Weights) -> None:
    model = bind(TINY, weights, Twice(), dtype=torch.float64)
    assert [c.op for c in model.choices] == list(ops.NAMES)
    head, *lines = model.report().splitlines()
    assert head == "backend twice on CPU, plain torch, torch.float64"
    assert [line.split()[:2] for line in lines] == [
        [op, "twice" if op == "linear" else "default"] for op in ops.NAMES
    ]
    assert choice(model, "route") == ("default", "twice does not override it")
    assert lines[0].endswith("twice does not override it")


def test_facts_are_what_is_known_when_bound(weights: Weights) -> None:
    backend = Twice()
    bind(TINY, weights, backend, "train", dtype=torch.float64)
    facts = Facts("linear", torch.float64, True, TINY.sizes, TINY.route)
    assert backend.asked == [facts]  # once, and only for what it overrides
    assert facts.sizes["F"] == 24


def test_an_override_is_used_inside_composites_too(weights: Weights) -> None:
    """swiglu_ffn is made of linear, and experts of swiglu_ffn: twice a linear is 4 and 4 times."""
    bound = bind(TINY, weights, Twice(), dtype=torch.float64).backend
    x, gate, down = torch.randn(3, 5), torch.randn(4, 5), torch.randn(5, 2)
    inner = ops.swiglu_ffn(x, 2 * gate, 2 * down)
    assert torch.allclose(bound.swiglu_ffn(x, gate, down), inner)
    one = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    assert torch.allclose(bound.experts(x, gate[None], down[None], *one), inner)


@pytest.mark.parametrize("asked", [False, True])
def test_a_fallback_says_why_and_composites_meet_it(asked: bool, weights: Weights) -> None:
    """Whether the backend cannot or the user will not: the default runs, everywhere."""
    backend = Twice(None if asked else "its chip has no multiplier")
    model = bind(TINY, weights, backend, overrides={"linear": "default"} if asked else {})
    reason = "asked for by MOGE_HAL_OPS" if asked else "its chip has no multiplier"
    assert choice(model, "linear") == ("default", reason)
    assert f"linear         default  {reason}" in model.report()
    assert torch.equal(model(IDS), bind(TINY, weights, Backend())(IDS))
    assert not torch.equal(bind(TINY, weights, Twice())(IDS), model(IDS))


@pytest.mark.parametrize("answer", ["", " ", True, False, 0, ["no"]])
def test_why_not_answers_none_or_a_sentence(answer: Any, weights: Weights) -> None:
    """False would mean "it cannot" to whoever reads it as a bool, and so would None to another."""
    with pytest.raises(UserError) as error:
        bind(TINY, weights, Twice(answer))
    who = f"backend {Twice.__module__}:Twice answers why_not(linear) with {answer!r}"
    rule = "None says that it can serve, a sentence says why it cannot"
    assert str(error.value) == f"{who}; {rule}"


class Unwritten(Backend):
    """Says that it can, and cannot."""

    name = "unwritten"
    linear = staticmethod(ops.linear)  # what is no method is served as it is

    def swiglu_ffn(self, x: Tensor, gate_up: Any, down: Any) -> Tensor:
        raise NotImplementedError("no silu")


def test_an_operation_that_is_not_written_is_laid_to_why_not(weights: Weights) -> None:
    model = bind(TINY, weights, Unwritten())
    with pytest.raises(UserError) as error:
        model(IDS)
    who = f"backend {Unwritten.__module__}:Unwritten says None in why_not(swiglu_ffn)"
    what = f"swiglu_ffn raised NotImplementedError (no silu) at {__file__}:"
    assert str(error.value).startswith(f"{who}, but {what}")
    assert isinstance(error.value.__cause__, NotImplementedError)
    overrides = {"swiglu_ffn": "default"}
    fallback = bind(TINY, weights, Unwritten(), overrides=overrides)
    assert torch.equal(fallback(IDS), bind(TINY, weights, Backend())(IDS))


def test_strict_makes_a_fallback_an_error_unless_it_was_asked_for(weights: Weights) -> None:
    backend = Twice("its chip has no multiplier")
    with pytest.raises(UserError, match=r"twice cannot serve linear \(its chip has no multiplier"):
        bind(TINY, weights, backend, strict=True)
    bind(TINY, weights, backend, strict=True, overrides={"linear": "default"})
    bind(TINY, weights, Twice(), strict=True)  # what it does not override is no fallback


def test_the_instance_that_was_bound_is_left_as_it_was(weights: Weights) -> None:
    backend = Twice("its chip has no multiplier")
    before = dict(vars(backend))
    model = bind(TINY, weights, backend)
    assert type(backend) is Twice
    assert vars(backend) == before
    assert model.backend is not backend
    x, w = torch.randn(3, 5), torch.randn(4, 5)
    assert torch.equal(backend.linear(x, w), 2 * model.backend.linear(x, w))
    assert isinstance(model.backend, Twice)


def test_a_weight_is_packed_only_for_what_the_backend_runs_itself(weights: Weights) -> None:
    """linear and experts, but not swiglu_ffn, which it overrides and cannot serve. The default of
    swiglu_ffn calls the backend's linear, with weights as they are.
    """
    backend = Packing()
    model = bind(TINY, weights, backend)
    roles = {"linear.w", "linear.b", "experts.gate_up", "experts.down"}
    assert set(backend.packed) == roles
    layers = TINY.num_hidden_layers
    assert backend.packed.count("linear.w") == 4 * layers + 1
    assert backend.packed.count("linear.b") == 4 * layers
    assert backend.packed.count("experts.gate_up") == layers
    assert choice(model, "swiglu_ffn") == ("default", "it is being repaired")
    assert torch.equal(model(IDS), bind(TINY, weights, Backend())(IDS))
    backend.packed.clear()
    bind(TINY, weights, backend, overrides={"experts": "default"})
    assert set(backend.packed) == {"linear.w", "linear.b"}


def test_nothing_is_packed_in_training(weights: Weights) -> None:
    backend = Packing()
    model = bind(TINY, weights, backend, "train")
    assert backend.packed == []
    assert isinstance(model.run_step, nn.Module)
    parameters = dict(model.run_step.named_parameters())
    assert parameters.keys() == weights.keys() == model.weights.keys()
    assert all(p.requires_grad and type(p) is nn.Parameter for p in parameters.values())
    inference = bind(TINY, weights, Backend()).run_step
    assert isinstance(inference, nn.Module)
    assert not any(p.requires_grad for p in inference.parameters())


def test_training_leaves_the_callers_weights_alone(weights: Weights) -> None:
    """Else two models that start from one set of weights would train each other."""
    given = {name: w.clone() for name, w in weights.items()}
    model = bind(TINY, given, Backend(), "train")
    for parameter in model.weights.values():
        parameter.data.add_(1)
    assert all(torch.equal(given[name], w) for name, w in weights.items())


@pytest.mark.parametrize("name", ["lm_head.weight", "layers.1.mlp.experts.gate_up"])
def test_a_weight_of_another_shape_is_named(name: str, weights: Weights) -> None:
    shape = tuple(weights[name].shape)
    wrong = {**weights, name: weights[name].transpose(0, 1)}
    with pytest.raises(UserError) as error:
        bind(TINY, wrong, Backend())
    assert str(error.value).startswith(f"{name} has shape {(shape[1], shape[0], *shape[2:])}")
    assert str(shape) in str(error.value)


def test_a_weight_that_is_missing_is_named(weights: Weights) -> None:
    name = "layers.1.mlp.router_scale"
    less = {n: w for n, w in weights.items() if n != name}
    with pytest.raises(UserError, match=f"{name} .*is missing from the weights"):
        bind(TINY, less, Backend())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [({"expert": "default"}, "'experts'"), ({"experts": "cpu"}, "experts=cpu")],
)
def test_an_override_that_means_nothing_is_refused(
    overrides: dict[str, str], words: str, weights: Weights
) -> None:
    with pytest.raises(UserError, match=words):
        bind(TINY, weights, Backend(), overrides=overrides)


class Nameless(Packing):
    """An author's first minute: the class has no name of its own yet, so it is called "default"."""

    name = Backend.name


def test_a_backend_that_is_called_default_is_no_default(weights: Weights) -> None:
    backend = Nameless()
    model = bind(TINY, weights, backend)
    assert "experts.down" in backend.packed
    assert torch.equal(model(IDS), bind(TINY, weights, Backend())(IDS))
    with pytest.raises(UserError, match="cannot serve swiglu_ffn"):
        bind(TINY, weights, backend, strict=True)


class HalfOnly(Backend):
    name = "half"
    dtypes = (torch.bfloat16, torch.float16)


def test_a_dtype_is_the_backends_first_or_one_of_its_own(weights: Weights) -> None:
    assert bind(TINY, weights, HalfOnly()).dtype == torch.bfloat16
    model = bind(TINY, weights, HalfOnly(), dtype=torch.float16)
    assert model.dtype == torch.float16
    assert isinstance(model.run_step, nn.Module)
    assert {p.dtype for p in model.run_step.parameters()} == {torch.float16}
    sentence = "backend 'half' does not compute in float32; it does in bfloat16, float16"
    with pytest.raises(UserError, match=sentence):
        bind(TINY, weights, HalfOnly(), dtype=torch.float32)


class Graph(Backend):
    """A graph backend: what it compiles is what runs."""

    name = "graph"
    graph = True

    def compile(self, step: Any, example: tuple[Any, ...], dynamic: Any) -> Any:
        return lambda *args: (step, args)


def test_a_graph_backend_compiles_and_does_not_train(weights: Weights) -> None:
    model = bind(TINY, weights, Graph())
    step, args = model.run_step(IDS, IDS, None, True)  # type: ignore[misc]
    assert isinstance(step, nn.Module)
    assert args == (IDS, IDS, None, True)
    mode: Mode = "train"
    with pytest.raises(UserError, match="backend 'graph' runs exported graphs and cannot train"):
        bind(TINY, weights, Graph(), mode)
