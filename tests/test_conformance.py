"""The suite as a tool: its ids, its selection, its runner, its report and its exit code."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moge_hal.backend import Backend
from moge_hal.bind import bind
from moge_hal.config import preset
from moge_hal.conformance import Outcome, Result, list_cases, run
from moge_hal.conformance.cases import DTYPES, LETTERS, PROPERTIES, parse
from moge_hal.conformance.judging import OPERATION_PROPERTIES, judge
from moge_hal.conformance.listing import every_case
from moge_hal.conformance.properties.caching import chunk_sizes, ragged_positions
from moge_hal.conformance.properties.whole_model import PROPERTIES as MODEL_PROPERTIES
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure, Skip
from moge_hal.conformance.weights import random_weights
from moge_hal.errors import UserError
from moge_hal.ops import NAMES

NULL = "moge_hal.backends.null:NullBackend"
LINEAR = "linear/f32/T7-I8-O4"


class Broken(Backend):
    """Right in float32 only where it does not raise."""

    name = "broken"
    dtypes = (torch.float32,)

    def linear(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        if len(x) == 64:
            raise RuntimeError("64 is too many")
        return super().linear(x, w, b) * (1 + 1e-4)

    def rms_norm(self, x: Tensor, w: Tensor, eps: float) -> Tensor:
        return super().rms_norm(x, w, eps) / 0


BROKEN = f"{__name__}:Broken"


def test_every_operation_is_in_the_list_with_all_its_properties() -> None:
    assert set(LETTERS) == set(PROPERTIES) == {*NAMES, "model"}
    cases = list(every_case())
    assert len({case.id for case in cases}) == len(cases) > 1300
    for op, names in PROPERTIES.items():
        table = MODEL_PROPERTIES if op == "model" else OPERATION_PROPERTIES
        for dtype in DTYPES:
            its = {case.prop for case in cases if (case.op, case.dtype_name) == (op, dtype)}
            assert its == set(names.split())
        assert set(names.split()) <= table.keys()


def test_the_list_has_what_hides_faults_elsewhere() -> None:
    for op in NAMES:
        cases = [case for case in every_case() if case.op == op]
        assert {case.scale for case in cases} >= {0.01, 1.0, 30.0}
        assert {"strided", "sliced", "offset"} <= set().union(*(c.words for c in cases))
        counts = {case.sizes.get("T", case.sizes.get("S")) for case in cases}
        assert {0, 1, 7, 17, 64, 512, 531} <= counts
    assert {case.sizes["I"] for case in every_case() if case.op == "linear"} >= {5120}
    groups = [c.sizes for c in every_case() if c.op in ("route", "experts")]
    assert any(s["G"] != s["E"] // s["G"] and s["K"] > s["G"] for s in groups)
    assert any(s["E"] == s["G"] for s in groups) and any(s["G"] == 1 for s in groups)
    assert all(s["G"] != s["E"] // s["G"] or s["E"] == 64 for s in groups)


def test_an_id_is_a_case() -> None:
    for case in every_case():
        assert parse(case.id) == case
    case = parse("experts/bf16/T17-D40-F24-E15-G3-K6-strided-seed7/scale0.01/value")
    assert case.sizes == {"T": 17, "D": 40, "F": 24, "E": 15, "G": 3, "K": 6, "seed": 7}
    assert case.words == {"strided"} and case.scale == 0.01 and case.dtype == torch.bfloat16
    seeds = [case for case in every_case() if "seed" in case.sizes]
    assert {case.op for case in seeds} == {"model"}  # others are for whoever asks for more inputs


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("linear", "must read operation/dtype/shape/scale/property"),
        ("linaer/f32/T7-I8-O4/scale1/value", "no operation 'linaer'. Did you mean 'linear'"),
        ("linear/fp32/T7-I8-O4/scale1/value", "no dtype 'fp32'. Did you mean 'f32'"),
        ("linear/f32/T7-I8-O4/scale1/valeu", "no property of linear 'valeu'. Did you mean 'value'"),
        ("linear/f32/T7-I8/scale1/value", "a shape of linear must give T-I-O"),
        ("linear/f32/T7-I8-O4-Q3/scale1/value", "a shape of linear must give T-I-O"),
        ("linear/f32/T7-I8-O4-wide/scale1/value", "no word for a shape of linear 'wide'"),
        ("linear/f32/T7-I8-O4/1/value", "must read scale1 or scale0.01"),
        ("route/f32/T7-E15-G4-K4/scale1/route.valid", "E must be a multiple of G"),
        ("route/f32/T7-E15-G3-K4/scale1/route.valid", "K must be a multiple of G"),
        ("route/f32/T7-E6-G3-K9/scale1/route.valid", "K must not exceed E"),
        ("model/f32/tiny-seed0/trained/decode", "models are tiny/random and shipped/trained"),
    ],
)
def test_a_wrong_id_is_a_clear_error(text: str, reason: str) -> None:
    with pytest.raises(UserError) as error:
        parse(text)
    assert reason in str(error.value)


def test_filters_select_and_a_typo_is_an_error() -> None:
    assert list_cases() == [case.id for case in every_case()]
    chosen = list_cases(["experts/*/value", "*/route.ties"])
    assert {case.split("/")[0] for case in chosen} == {"experts", "route", "router_logits"}
    assert list_cases(["route/*", "route/*"]) == list_cases(["route/*"])
    assert list_cases([f"{LINEAR}-seed9/scale1/value"]) == [f"{LINEAR}-seed9/scale1/value"]
    for glob, advice in {
        "expert/*": "no operation 'expert'. Did you mean 'experts'",
        "experts/fp32/*": "no dtype 'fp32'. Did you mean 'f32'",
        "experts/*/*/*/valeu": "no property 'valeu'. Did you mean 'value'",
        "expetrs*": "a glob on whole ids, such as 'experts/*'. Did you mean 'experts/*'",
    }.items():
        with pytest.raises(UserError, match=re.escape(f"no case matches '{glob}'")) as error:
            list_cases(["experts/*", glob])
        assert advice in str(error.value)
    with pytest.raises(UserError, match="no property of linear 'valeu'"):
        list_cases([f"{LINEAR}/scale1/valeu"])


def test_a_run_passes_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    result = run([NULL, "moge_hal.backend:Backend"], ["linear/*/scale1/*", "route/*/route.ties"])
    assert result.exit_code == 0
    unclaimed = {o.profile for o in result.outcomes if o.outcome == "skipped"}
    assert unclaimed == {"capture", "bitwise"}
    assert {o.outcome for o in result.outcomes} == {"passed", "skipped"}
    assert len(result.outcomes) == 2 * len(list_cases(["linear/*/scale1/*", "route/*/route.ties"]))
    worst = max(result.outcomes, key=lambda o: o.error or 0)
    assert worst.error is not None and worst.limit is not None and 0 < worst.error < worst.limit
    out = capsys.readouterr().out
    assert "passed/failed/skipped" in out and NULL in out
    assert out.splitlines()[-2].startswith("all")


def test_a_case_alone_is_the_case_in_the_list() -> None:
    result = run([NULL], ["experts/f32/*/scale30/value"], echo=False)
    for outcome in result.outcomes[::-4]:
        verdict = judge(Subject(Backend()), parse(outcome.id))
        assert (verdict.error, verdict.limit) == (outcome.error, outcome.limit)


def test_a_failure_is_listed_with_its_size_and_the_command_that_replays_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = f"{LINEAR}/scale1/value"
    raises = "linear/f32/T64-I8-O4/scale1/value"
    no_number = "rms_norm/f32/T7-D8/scale1/value"
    result = run([BROKEN, NULL], [wrong, raises, no_number, "linear/bf16/*"])
    assert result.exit_code == 1
    by_id = {o.id: o for o in result.outcomes if o.backend == BROKEN}
    failed = by_id[wrong]
    assert failed.outcome == "failed" and failed.error is not None and failed.limit is not None
    assert failed.error > 10 * failed.limit
    assert "RuntimeError: 64 is too many" in by_id[raises].reason
    assert f"{Path(__file__).name}:" in by_id[raises].reason
    assert by_id[no_number].error is None and "not finite" in by_id[no_number].reason
    skipped = [o for o in by_id.values() if o.outcome == "skipped"]
    assert {o.id for o in skipped} == set(list_cases(["linear/bf16/*"]))
    assert {o.reason for o in skipped} == {"computes in float32 only"}
    assert not [o for o in result.outcomes if o.backend == NULL and o.outcome == "failed"]
    out = capsys.readouterr().out
    assert f"moge-hal conformance --backend {BROKEN} --filter '{wrong}'" in out
    assert f"limit {failed.limit:.2g}" in out
    more = f"{skipped[0].id} and {len(skipped) - 1} more: computes in float32 only"
    assert f"skipped on {BROKEN}: {more}" in out
    assert json.loads(json.dumps(result.data(), allow_nan=False))[0].keys() == {
        "id", "backend", "outcome", "error", "limit", "reason", "level", "seconds", "inputs",
        "simulate",
    }  # fmt: skip


def test_a_run_that_judges_nothing_fails() -> None:
    result = run([BROKEN, NULL], ["linear/bf16/*"], echo=False)
    assert result.exit_code == 1
    assert f"nothing passed on {BROKEN}: that is a failure" in result.report()
    assert Result((), ()).exit_code == 1
    passed = Outcome("a/b", "x", "passed")
    assert Result(("x",), (passed,)).exit_code == 0
    assert Result(("x", "y"), (passed,)).exit_code == 1


def test_a_silent_run_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([NULL], [f"{LINEAR}/scale1/value"], echo=False).exit_code == 0
    assert capfd.readouterr() == ("", "")


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(UserError, match="cannot be imported"):
        run(["moge_hal.backends.null:NulBackend"], echo=False)
    with pytest.raises(UserError, match="no backend 'nulll'"):
        run(["nulll"], echo=False)
    with pytest.raises(UserError, match="no backend was named"):
        run([], echo=False)


def test_nothing_outside_decides_what_is_judged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "conftest.py").write_text("raise RuntimeError('a conftest was read')")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -k nothing")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k nothing")
    path, environment = list(sys.path), dict(os.environ)
    assert run([NULL], [f"{LINEAR}/scale1/value"], echo=False).exit_code == 0
    assert sys.path == path
    assert {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} == {
        k: v for k, v in environment.items() if k != "PYTEST_CURRENT_TEST"
    }


@pytest.mark.parametrize("op", NAMES)
def test_the_default_backend_passes(op: str) -> None:
    """All of float32 at scale 1; the other scales and dtypes are run by whoever runs the suite."""
    subject = Subject(Backend())
    for case in list_cases([f"{op}/f32/*/scale1/*"], profile="core"):
        judge(subject, parse(case))


@pytest.mark.parametrize(
    "name", [n for n in PROPERTIES["model"].split() if n not in ("bitwise", "no-sync")]
)
def test_the_default_backend_passes_whole_models(name: str) -> None:
    judge(Subject(Backend()), parse(f"model/f32/tiny-seed0/random/{name}"))


def test_a_backend_is_judged_as_it_would_be_bound() -> None:
    """Packed weights meet the override that packed them; what is refused runs as the default."""

    class Packs(Backend):
        name = "packs"
        packed = 0

        def pack(self, role: str, weight: Tensor) -> object:
            assert role in ("linear.w", "linear.b")
            Packs.packed += 1
            return [weight]

        def linear(self, x: Tensor, w: Any, b: Any = None) -> Tensor:
            return super().linear(x, w[0], None if b is None else b[0])

        def swiglu_ffn(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
            raise AssertionError("was refused")

        def why_not(self, facts: object) -> str | None:
            op, training = getattr(facts, "op", ""), getattr(facts, "training", False)
            return "no" if training or op == "swiglu_ffn" else None

    subject = Subject(Packs())
    judge(subject, parse(f"{LINEAR}/scale1/value"))
    assert Packs.packed == 2
    judge(subject, parse(f"{LINEAR}/scale1/gradients"))
    assert Packs.packed == 2
    judge(subject, parse("rms_norm/f32/T7-D8/scale1/gradients"))


def test_a_backend_without_a_name_is_judged_by_its_own_operations() -> None:
    """It is called "default" then, and the default backend passes everything."""

    class Nameless(Backend):
        def linear(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
            return torch.zeros(len(x), len(w))

    with pytest.raises(Failure):
        judge(Subject(Nameless()), parse(f"{LINEAR}/scale1/value"))


def test_a_graph_backend_compiles_one_graph_for_all_token_counts() -> None:
    class Graph(Backend):
        name = "graph"
        graph = True
        compiled: list[tuple[object, ...]] = []  # noqa: RUF012

        def compile(self, step: object, example: tuple[Tensor, ...], dynamic: object) -> object:
            Graph.compiled.append((tuple(example[0].shape), dynamic))
            return step

        def rotary(self, *args: Tensor) -> tuple[Tensor, Tensor]:
            raise AssertionError("was refused")

        def linear(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
            return super().linear(x, w, b)

        def why_not(self, facts: object) -> str | None:
            return "no rotary" if getattr(facts, "op", "") == "rotary" else None

    subject = Subject(Graph())
    for count in (0, 1, 17):
        judge(subject, parse(f"linear/f32/T{count}-I5-O7/scale1/value"))
    assert Graph.compiled == [((11, 5), {"T": 11})]  # unlike every static size
    with pytest.raises(Skip, match="no rotary"):
        judge(subject, parse("rotary/f32/B2-S7-H4-Hkv2-d8/scale1/value"))
    with pytest.raises(Skip, match="cannot train"):
        judge(subject, parse(f"{LINEAR}/scale1/gradients"))


def test_a_failed_compile_fails_every_case_of_its_graph_and_no_other() -> None:
    class Fails(Backend):
        name = "fails"
        tries = 0

        def compile(self, step: object, example: tuple[Tensor, ...], dynamic: object) -> object:
            Fails.tries += 1
            raise OSError("no compiler")

    subject = Subject(Fails())
    for count in (1, 7):
        with pytest.raises(Failure, match="cannot be compiled: OSError: no compiler"):
            judge(subject, parse(f"linear/f32/T{count}-I5-O7/scale1/value"))
    assert Fails.tries == 1


def test_random_weights_hide_nothing() -> None:
    config = preset("tiny")
    weights = random_weights(config, 0)
    assert all(w.dtype == torch.float32 and float(w.std()) > 0.01 for w in weights.values())
    scale = weights["layers.0.mlp.router_scale"]
    assert float(scale.abs().min()) > 0.5 and float(scale.abs().max()) <= 2
    assert float(scale.min()) < 0 < float(scale.max())
    other = random_weights(config, 1)
    assert not any(torch.equal(weights[name], other[name]) for name in weights)
    logits = bind(config, weights, Backend())(torch.arange(20)[None])
    assert 0.1 < float(logits.std()) < 100


def test_scenes_are_what_they_say() -> None:
    assert sum(chunk_sizes(50)) == 50 and chunk_sizes(12) == [1, 3, 7, 1]
    whole, left, right, middle = ragged_positions(4, 12).tolist()
    assert whole == list(range(12))
    assert left == [-1] * 6 + list(range(6))
    assert right == [*range(7), -1, -1, -1, -1, -1]
    assert middle == [0, 1, 2, 3, -1, -1, -1, -1, -1, 4, 5, 6]


def test_names_may_stand_in_one_text() -> None:
    result = run(f"{NULL}, cpu", [f"{LINEAR}/scale1/value"], echo=False)
    assert result.backends == (NULL, "cpu") and result.exit_code == 0
    assert list_cases("linear/*") == list_cases(["linear/*"])


def test_a_long_list_of_failures_is_cut() -> None:
    ids = [f"linear/f32/T{n}-I8-O8/scale1/value" for n in range(25)]
    report = Result(("x",), tuple(Outcome.of(i, "x", "failed", reason="wrong") for i in ids))
    text = report.report()
    assert text.count("FAILED on x") == 20
    assert "and on x: 5 more of linear/*/value" in text


def test_a_why_not_that_raises_is_one_sentence() -> None:
    class Raises(Backend):
        def linear(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
            return torch.zeros(len(x), len(w))

        def why_not(self, facts: object) -> str | None:
            raise KeyError("x")

    with pytest.raises(UserError, match=r"Raises raised KeyError in why_not\(linear\)"):
        Subject(Raises())
