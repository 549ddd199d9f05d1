"""The format of golden cases as a stranger meets it: the example of the README, without torch."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import second_oracle as second
import torch
from torch import Tensor

from moge_hal.backend import Backend
from moge_hal.conformance.golden.check import judge_file
from moge_hal.conformance.golden.shipped import CASES, FOLDER, file_name, files
from moge_hal.conformance.golden.store import read, write
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure
from moge_hal.router import RouteSpec

Array = npt.NDArray[Any]
Run = Callable[[str, dict[str, Any], Any], tuple[list[Array] | None, Any]]
EXAMPLE = re.findall(
    r"```python\n(.*?)```", (FOLDER.parent / "README.md").read_text("utf-8"), re.S
)[0]
CHECK: dict[str, Any] = {"__name__": "example"}
exec(compile(EXAMPLE, "README.md", "exec"), CHECK)
shipped = pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)


def of(name: str) -> Path:
    """The shipped file of an id's end."""
    return next(FOLDER / file_name(case) for case in CASES if case.endswith(name))


def by_second(operation: str, args: dict[str, Any], cache: Any) -> tuple[list[Array], Any]:
    """The second oracle as somebody's runtime."""
    if "spec" in args:
        args = {**args, "spec": RouteSpec(**args["spec"])}
    if operation == "attention":
        cache = cache or [{} for _ in args["q"]]
        args = {**args, "cache": cache}
    wide = {
        n: v.astype(np.float64) if isinstance(v, np.ndarray) and v.dtype.kind == "f" else v
        for n, v in args.items()
    }
    return list(second.OPERATIONS[operation](**wide)), cache


def test_the_example_runs_as_pasted(tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    script.write_text(EXAMPLE + "\nassert 'torch' not in sys.modules\n", "utf-8")
    shown = subprocess.run(
        [sys.executable, script, FOLDER], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(shown) == len(files())
    ran = {line.split()[0] for line in shown if line.endswith(" right")}
    assert ran == {p.stem for p in files() if p.name.startswith(("linear", "rms_norm"))}
    broken = script.read_text("utf-8").replace('args["eps"]', '2 * args["eps"]')
    script.write_text(broken, "utf-8")
    wrong = subprocess.run([sys.executable, script, FOLDER], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert re.search(r"rms_norm_f32_T7-D12_scale0.01_value y is \S+ off, limit", wrong.stdout)


@shipped
def test_the_example_accepts_what_is_right(path: Path) -> None:
    assert CHECK["check"](path, by_second) == ""


def tampered(change: Callable[[list[Array], dict[str, Any]], list[Array]]) -> Run:
    def run(operation: str, args: dict[str, Any], cache: Any) -> tuple[list[Array], Any]:
        outputs, cache = by_second(operation, args, cache)
        return change(outputs, args), cache

    return run


def forgetful(operation: str, args: dict[str, Any], cache: Any) -> tuple[list[Array], Any]:
    return by_second(operation, args, None)


def reverse(outputs: list[Array], args: dict[str, Any]) -> list[Array]:
    return [y[:, ::-1] for y in outputs]


def nan_padding(outputs: list[Array], args: dict[str, Any]) -> list[Array]:
    (y,) = outputs
    return [np.where((args["positions"] < 0)[:, :, None, None], np.nan, y)]


def unlimited(operation: str, args: dict[str, Any], cache: Any) -> tuple[list[Array], Any]:
    return by_second(operation, {**args, "spec": {**args["spec"], "limit_groups": 4}}, cache)


MOGE, LIMIT = "route/f32/T17-E15-G3-K6/scale1/route.", "limit2/scale1/route."
NOT_BEST = "an expert is not among the best"


@pytest.mark.parametrize(
    ("name", "run", "fault"),
    [
        ("f32/B2-S9-H4-Hkv2-d4/scale1/decode", forgetful, "y is "),
        ("ragged", tampered(nan_padding), "the output of padding is not finite"),
        ("unselected", tampered(lambda y, a: [y[0][:, :-1]]), "the outputs have shapes"),
        ("expert-parallel", lambda o, a, c: by_second(o, {**a, "first": 0}, c), "y is "),
        (f"{MOGE}ties", tampered(reverse), "the ids are not the lowest"),
        (f"{MOGE}valid", tampered(reverse), NOT_BEST),
        (f"{MOGE}valid", tampered(lambda y, a: [y[0], 2 * y[1]]), "the weights are "),
        (f"{LIMIT}valid", lambda o, a, c: by_second(o, {**a, "bias": None}, c), NOT_BEST),
        (f"{LIMIT}valid", unlimited, NOT_BEST),
        (f"{LIMIT}valid", tampered(lambda y, a: [y[0], y[1] / 2.5]), "the weights are "),
    ],
)
def test_the_example_refuses_what_is_wrong(name: str, run: Run, fault: str) -> None:
    assert CHECK["check"](of(name), run).startswith(fault)


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize(("apart", "right"), [(2.0**-23, True), (2.0**-14, False)])
def test_what_is_closer_than_rounding_can_tell_may_go_either_way(
    limit: int | None, apart: float, right: bool, tmp_path: Path
) -> None:
    """Experts 1 and 2 are that far apart, and so are, with a limit, the two groups."""
    row = [0.5, 1.0, 1.0 + apart, 0.25, 0.5, 1.0, 1.0, 0.25]
    spec = RouteSpec(2, 2, "sigmoid" if limit else "softmax", limit)
    args = {"logits": torch.tensor([row]), "spec": spec}
    path = write(tmp_path / "case.npz", "route", args)
    assert read(path).want[0]["ids"].tolist() == ([[2, 1]] if limit else [[2, 5]])
    other = torch.tensor([[5, 6]] if limit else [[1, 6]], dtype=torch.int32)

    class Other(Backend):
        def route(self, logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            scores = logits.sigmoid() if limit else logits.softmax(-1)
            return other, scores.gather(1, other.long())

    def run(operation: str, args: dict[str, Any], cache: Any) -> tuple[list[Array], Any]:
        return [part.numpy() for part in Other().route(torch.tensor(args["logits"]))], cache

    assert CHECK["check"](path, run) == ("" if right else "an expert is not among the best")
    if right:
        judge_file(Subject(Other()), path)
    else:
        with pytest.raises(Failure, match="among the best"):
            judge_file(Subject(Other()), path)
