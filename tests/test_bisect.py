"""`bisect` is itself under test: it must name what is wrong with a backend, and the layer."""

import importlib
import json
import pkgutil
import shlex
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import faults
import mutants
import pytest
import torch
from commands import refused, run
from faults import TINY, WEIGHTS
from torch import Tensor

import moge_hal
from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.backends.onnx import OnnxBackend
from moge_hal.bind import bind
from moge_hal.config import preset
from moge_hal.conformance.bisecting.bisect import Bisection, bisect
from moge_hal.conformance.bisecting.finding import Finding
from moge_hal.conformance.bisecting.locating import METHODS, Bench, fresh, locate, overrides
from moge_hal.conformance.bisecting.playlist import scenes
from moge_hal.conformance.cases import parse
from moge_hal.conformance.golden.check import judge_file
from moge_hal.conformance.judging import judge
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure
from moge_hal.conformance.weights import random_weights
from moge_hal.errors import UserError


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(TINY, WEIGHTS, torch.float32)


def label(kind: type[Backend]) -> str:
    """As `--backend` asks for it."""
    return f"{kind.__module__}:{kind.__name__}"


def found(backend: Backend, out: Path | None = None) -> Finding:
    """What is wrong; something must be."""
    finding = bisect(backend, label(type(backend)), out=out).finding
    assert finding is not None
    return finding


# Every wrong backend of the suite's own tests.


def every_mutant() -> Iterator[type[Backend]]:
    for info in pkgutil.iter_modules(mutants.__path__):
        module = importlib.import_module(f"mutants.{info.name}")
        for kind in vars(module).values():
            own = isinstance(kind, type) and kind.__module__ == module.__name__
            if own and issubclass(kind, Backend):
                yield kind


def place_is_right(bench: Bench, mutant: type[Backend], count: int | None) -> bool:
    """Bisects by the first `count` scenes. False: none of them shows the fault."""
    failed = bench.fault(mutant(), islice(scenes(TINY, bench.weights), count))
    if failed is None:
        return False
    shortest = bench.shortest(mutant(), failed[0])
    assert shortest is not None, mutant
    answer = locate(bench, mutant(), shortest[0], lambda stage: None)
    changed = [name for name in (*ops.NAMES, *METHODS) if overrides(mutant(), name)]
    assert answer.place in changed, (mutant, answer)
    assert answer.passes or len(changed) > 1, (mutant, answer)
    return True


def test_it_names_what_a_mutant_changed(bench: Bench) -> None:
    """A sample, and the scenes that take no time."""
    sample = list(every_mutant())[::6]
    assert sum(place_is_right(bench, mutant, 4) for mutant in sample) > len(sample) // 4


@pytest.mark.slow
def test_it_names_what_every_mutant_changed(bench: Bench) -> None:
    every = list(every_mutant())
    assert sum(place_is_right(bench, mutant, None) for mutant in every) > len(every) // 4


# Faults in one place.


@pytest.mark.parametrize(
    ("kind", "operation", "layer", "weight"),
    [
        (faults.OneWeight, "experts", 1, "layers.1.mlp.experts.gate_up"),
        (faults.OneExpert, "linear", 1, "layers.1.mlp.experts.down[11]"),
        (faults.FromTheSecondCall, "rotary", 1, ""),
        (faults.OutputProjection, "linear", None, "lm_head.weight"),
        (faults.ManyTokens, "add_rms_norm", 0, "layers.0.post_attention_layernorm.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_layer_and_weight(
    kind: type[Backend], operation: str, layer: int | None, weight: str, tmp_path: Path
) -> None:
    finding = found(kind(), tmp_path / "case.npz")
    wrong = finding.wrong
    assert finding.place == operation and finding.passes and wrong is not None
    assert (wrong.operation, wrong.layer, wrong.weight) == (operation, layer, weight)
    assert wrong.error is not None and wrong.limit is not None and wrong.error > wrong.limit
    assert finding.workaround == f"MOGE_HAL_OPS={operation}=default"
    words = shlex.split(finding.replay)
    assert words[:4] == ["moge-hal", "conformance", "--backend", label(kind)]
    with pytest.raises(Failure):  # what the command runs
        if finding.file is None:
            judge(Subject(kind()), parse(words[words.index("--filter") + 1]))
        else:
            assert words[-2:] == ["--golden", finding.file]
            judge_file(Subject(Backend()), finding.file)
            judge_file(Subject(kind()), finding.file)
    # Saved is what no case of the suite can show.
    assert (finding.file is not None) == (
        kind in (faults.OneWeight, faults.OneExpert, faults.OutputProjection)
    )


def test_the_step_is_the_first_that_is_wrong() -> None:
    wrong = found(faults.SecondStep()).wrong
    assert wrong is not None and wrong.scene == "decode"
    assert (wrong.step, wrong.steps, wrong.rows, wrong.positions) == (2, 9, 2, (13, 13))


# Faults that no operation shows alone.


def test_outputs_that_share_memory() -> None:
    finding = found(faults.OutputsInOneBuffer())
    assert finding.place == "linear" and finding.passes and finding.wrong is not None
    assert finding.wrong.reason.startswith("it wrote over layers.0.self_attn.")


def test_weights_that_an_operation_spoils() -> None:
    finding = found(faults.SpoilsItsWeights())
    assert finding.place == "swiglu_ffn" and finding.passes
    assert all(torch.equal(WEIGHTS[n], w) for n, w in random_weights(TINY, 0).items())


def test_an_input_that_is_written_to() -> None:
    finding = found(faults.WritesItsInput())
    assert finding.place == "router_logits" and finding.wrong is not None
    assert finding.wrong.reason == "it wrote over its input x"


def test_what_outlives_a_text_is_said() -> None:
    finding = found(faults.Remembers())
    assert finding.place == "attention" and finding.passes
    assert any("something outlives a text" in note for note in finding.notes)


def test_two_faults_are_two() -> None:
    finding = found(faults.Doubled())
    assert finding.place == "rms_norm" and finding.others == ["route"] and finding.passes
    assert finding.workaround == "MOGE_HAL_OPS=rms_norm=default,route=default"


# Methods that are no operations.


@pytest.mark.parametrize(
    ("kind", "place", "scene"),
    [
        (faults.FirstInsteadOfLast, "compile", "last-only"),
        (faults.OneBuffer, "new_cache", "two-caches"),
        (faults.OneSlotShort, "new_cache", "cache-full"),
        (faults.PacksNarrow, "pack", "one-pass"),
    ],
)
def test_a_method_that_is_no_operation(kind: type[Backend], place: str, scene: str) -> None:
    finding = found(kind())
    assert (finding.place, finding.scene, finding.passes) == (place, scene, True)
    assert finding.workaround == ""
    if place != "pack":
        case = shlex.split(finding.replay)[-1]
        assert case == f"model/f32/tiny-seed0/random/{scene}"
        with pytest.raises(Failure):
            judge(Subject(kind()), parse(case))


def test_what_raises_is_named() -> None:
    finding = found(faults.Crashes())
    assert finding.place == "rms_norm" and finding.passes and finding.error is None
    assert finding.wrong is not None and finding.wrong.step == 2
    assert finding.wrong.reason == "raised RuntimeError: no kernel for 2 rows"


def test_what_fails_only_once_is_not_blamed_on_anything() -> None:
    class Once(Backend):
        name = "once"
        times: list[int] = []  # noqa: RUF012 (of all instances)

        def embed(self, ids: Tensor, w: Any) -> Tensor:
            self.times.append(1)
            return ops.embed(ids, w) * (1 + (len(self.times) == 1))

    finding = found(Once())
    assert finding.place == "" and finding.wrong is None
    assert "does not compute the same every time" in finding.notes[0]
    assert finding.replay == f"moge-hal bisect --backend {label(Once)}"


# Graph backends.


@pytest.mark.parametrize(
    ("kind", "place", "layer", "number"),
    [
        (faults.NoBias, "linear", 0, 0),
        (faults.WrongPast, "attention", 0, 1),
        (faults.WrongInTheSecondLayer, "rotary", 1, 0),
        (faults.LastIsFirst, "compile", None, None),
    ],
)
def test_a_graph_backend(
    bench: Bench, kind: type[Backend], place: str, layer: int | None, number: int | None
) -> None:
    failed = bench.fault(kind(), scenes(TINY, bench.weights))
    assert failed is not None
    answer = locate(bench, kind(), failed[0][-1:], lambda stage: None)
    assert answer.place == place and answer.passes is not False
    suspect = answer.suspect
    assert (suspect.call.layer if suspect else None) == layer
    assert (suspect.number if suspect else None) == number


def test_a_graph_backend_s_replay() -> None:
    finding = found(faults.NoBias())
    assert finding.place == "linear" and finding.workaround == ""
    case = shlex.split(finding.replay)[-1]
    assert case.startswith("linear/f32/")
    with pytest.raises(Failure):
        judge(Subject(faults.NoBias()), parse(case))


# What is played.


@pytest.mark.parametrize("kind", [Backend, pytest.param(OnnxBackend, marks=pytest.mark.slow)])
def test_a_right_backend_is_right(kind: Callable[[], Backend]) -> None:
    result = bisect(kind(), "right")
    assert result.finding is None and set(result.scenes) == {"tiny-seed0", "tiny-seed1", "shipped"}
    assert all(count == 14 for count in result.scenes.values())
    assert result.report().startswith("right is right in every scene: 14 of tiny-seed0, ")


def test_a_backend_without_float32() -> None:
    class Half(Backend):
        name = "half"
        dtypes = (torch.bfloat16,)

    class WrongHalf(Half):
        def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            return ops.rotary(q, k, cos, -sin)

    bench = Bench(TINY, WEIGHTS, torch.bfloat16)
    assert bench.fault(Half(), scenes(TINY, bench.weights)) is None
    finding = found(WrongHalf())
    assert finding.place == "rotary" and "/bf16/" in finding.replay


def test_a_folder_and_a_prompt(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    changed = {name: weight * 1.25 for name, weight in WEIGHTS.items()}
    moge_hal.save(bind(TINY, changed, Backend(), dtype=torch.float32), folder, dtype=torch.float32)
    assert bisect(Backend(), "right", model=folder).scenes == {str(folder): 14}
    finding = bisect(faults.FromTheSecondCall(), "wrong", model=folder).finding
    assert finding is not None and finding.model == str(folder) and finding.place == "rotary"
    with pytest.raises(UserError, match="has no tokenizer"):
        bisect(Backend(), "right", model=folder, prompt="Once")
    assert bisect(Backend(), "right", prompt="It is a truth").scenes == {"shipped": 1}
    prompted = bisect(faults.FromTheSecondCall(), "wrong", prompt="It is a truth").finding
    assert prompted is not None and prompted.scene == "prompt"
    assert prompted.wrong is not None and (prompted.wrong.step, prompted.wrong.steps) == (1, 9)
    with pytest.raises(UserError, match=r"it must have from 1 to 1016, so that 8 more fit"):
        bisect(Backend(), "right", prompt="word " * 2000)


def test_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    class Wide(Backend):
        dtypes = (torch.float64,)

    with pytest.raises(UserError, match="computes in float64 only, which has no limits"):
        bisect(Wide(), "wide")
    with pytest.raises(UserError, match="cannot be written"):
        bisect(faults.OneWeight(), "wrong", out=tmp_path)
    folder = tmp_path / "short"
    config = preset("tiny", max_position_embeddings=2)
    moge_hal.save(bind(config, WEIGHTS, Backend(), dtype=torch.float32), folder)
    with pytest.raises(UserError, match="its context is too short for every scene"):
        bisect(Backend(), "right", model=folder)


# The command.


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    right = run("bisect", "--backend", "null", "--prompt", "Once")
    assert (right.code, right.out) == (0, "null is right in every scene: 1 of shipped\n")
    asked = ("bisect", "--backend", label(faults.OneWeight))
    wrong = run(*asked)
    assert wrong.code == 1
    for part in (
        f"WRONG: {asked[-1]} on tiny-seed0, scene one-pass",
        "experts, layer 1 (layers.1.mlp.experts.gate_up)",
        "step 1 of 1 of the scene one-pass: positions 0 to 32 of 2 rows",
        "with the default experts the scene passes",
        f"REPLAY: moge-hal conformance --backend {asked[-1]} --golden bisect-experts.npz",
    ):
        assert part in wrong.out
    replayed = run(*shlex.split(wrong.out.splitlines()[-1])[2:])
    assert replayed.code == 1 and replayed.out.startswith(f"FAILED on {asked[-1]}: ")
    data = json.loads(run(*asked, "--json").out)
    assert data["finding"]["wrong"]["layer"] == 1 and data["scenes"] == {"tiny-seed0": 1}
    refused(run("bisect", "--backend", "cpu", "--model", "gone"), "gone does not exist")
    monkeypatch.setenv("MOGE_HAL_BACKEND", "cuda,null")  # not a name that one could repeat
    assert run("bisect", "--prompt", "Once").out.split()[0] in ("null", "cuda")


def test_a_report_reads_in_words() -> None:
    result = bisect(faults.Doubled(), "x")
    assert isinstance(result, Bisection) and result.data()["level"] == "real"
    assert "with the default rms_norm and route the scene passes" in result.report()
    assert fresh(faults.Doubled()).name == faults.Doubled.name
