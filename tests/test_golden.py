"""Golden cases: what is shipped is right by two oracles and catches wrong backends; what cannot be
saved or read is refused with a sentence.
"""

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import second_oracle as second
import torch
from mutants import attention, caches, experts, ffn, norms, rotary, routing, weighing
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.conformance import judge, oracle
from moge_hal.conformance.cases import parse
from moge_hal.conformance.golden.check import judge_file
from moge_hal.conformance.golden.shipped import CASES, FOLDER, file_name, files, regenerate
from moge_hal.conformance.golden.store import case_of, read, write
from moge_hal.conformance.inputs import Args, draw, normal
from moge_hal.conformance.limits import worst_row
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure, Skip
from moge_hal.errors import UserError
from moge_hal.registry import get_backend
from moge_hal.router import RouteSpec

Array = npt.NDArray[Any]
shipped = pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)


def of(name: str) -> Path:
    """The shipped file of an id's end: "route.ties", or more of it."""
    return next(FOLDER / file_name(case) for case in CASES if case.endswith(name))


def members(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def about(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(members(path)["about"].tobytes())
    return found


def test_the_shipped_files_are_the_list_and_cover_what_they_say() -> None:
    assert [path.name for path in files()] == sorted(map(file_name, CASES))
    assert len(CASES) >= 20
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 400_000
    cases = [read(path).case for path in files()]
    assert {case.op for case in cases} == set(ops.NAMES)
    for op in ("embed", "linear", "attention", "swiglu_ffn", "experts"):
        assert len({case.dtype for case in cases if case.op == op}) >= 2
    assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16, torch.float16}
    assert [len(read(p).calls) for p in files() if about(p)["cached"]] == [3, 3, 3]
    assert read(of("expert-parallel")).calls[0]["first"] > 0
    assert read(of("unselected")).calls[0]["down"].isnan().any()


def test_they_are_what_the_oracle_says_today(tmp_path: Path) -> None:
    """Inputs bit by bit, outputs up to the order of a float64 sum, limits roughly: plain torch, on
    which they are measured, adds up in another order on another processor.
    """
    first, again = regenerate(tmp_path / "a"), regenerate(tmp_path / "b")
    for new, twice in zip(first, again, strict=True):
        assert new.read_bytes() == twice.read_bytes()
        fresh, stored = members(new), members(FOLDER / new.name)
        said, says = about(new), about(FOLDER / new.name)
        for output, was in zip(said["outputs"], says["outputs"], strict=True):
            assert output.pop("limit") == pytest.approx(was.pop("limit"), rel=0.5)
        assert said == says
        assert list(fresh) == list(stored)
        for key, array in fresh.items():
            held = stored[key]
            assert (array.dtype, array.shape) == (held.dtype, held.shape)
            if ".out." in key and array.dtype == np.float64:
                assert worst_row(torch.from_numpy(array), torch.from_numpy(held)) <= 1e-13
            elif key != "about":
                assert array.tobytes() == held.tobytes()


@shipped
def test_they_are_what_the_second_oracle_says(path: Path) -> None:
    golden = read(path)
    past: Any = [{} for _ in golden.calls[0]["positions"]] if golden.cached else None
    for args, want in zip(golden.calls, golden.want, strict=True):
        wide = oracle.widen(args)
        arrays = {n: v.numpy() if isinstance(v, Tensor) else v for n, v in wide.items()}
        if golden.cached:
            arrays["cache"] = past
        for output, got in zip(
            golden.outputs, second.OPERATIONS[golden.case.op](**arrays), strict=True
        ):
            if output.name == "ids":
                assert np.array_equal(got, want["ids"])
            else:
                assert worst_row(torch.as_tensor(got), want[output.name]) <= 1e-12
        if "scores" in want:
            scores = torch.as_tensor(second.score(arrays["logits"], args["spec"].score))
            assert worst_row(scores, want["scores"]) <= 1e-12


@pytest.mark.parametrize("backend", ["moge_hal.backend:Backend", "cpu"])
def test_right_backends_pass_without_an_oracle(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*args: object, **named: object) -> None:
        raise AssertionError("an oracle ran")

    for module, name in ((oracle, "exact"), (judge, "exact"), (judge, "measure")):
        monkeypatch.setattr(module, name, none)
    subject = Subject(get_backend(backend))
    measured = 0
    for path in files():
        verdict = judge_file(subject, path)
        assert verdict.error is not None and verdict.limit is not None
        assert verdict.error <= verdict.limit
        measured += verdict.error > 0
    assert measured > 25  # the others have no rounding


# A wrong backend, and the end of the id of the case that must reject it.
REJECTED: list[tuple[type[Backend], str]] = [
    (norms.EpsilonOutside, "rms_norm/f32/T7-D12/scale0.01/value"),
    (rotary.RotaryInterleaved, "rotary/f32/B2-S5-H4-Hkv2-d6/scale1/value"),
    (ffn.GateAndUpSwapped, "swiglu_ffn/f32/T7-D12-F10/scale1/value"),
    (norms.ResidualInPlace, "add_rms_norm/f32/T7-D12/scale0.01/value"),
    (ffn.LowPrecisionRouter, "router_logits/f32/T7-D12-E15/scale1/value"),
    (routing.GlobalTopK, "route/f32/T17-E15-G3-K6/scale1/route.valid"),
    (weighing.Renormalised, "route/f32/T17-E15-G3-K6/scale1/route.valid"),
    (weighing.SoftmaxInsideGroups, "route/f32/T17-E15-G3-K6/scale1/route.valid"),
    (weighing.ScaleForgotten, "route/f32/T17-E15-G3-K6/scale1/route.valid"),
    (routing.TiesToTheHighest, "route/f32/T17-E15-G3-K6/scale1/route.ties"),
    (experts.FirstIgnored, "expert-parallel"),
    (experts.ClampedIds, "expert-parallel"),
    (experts.NegativeSkipped, "experts/f32/T7-D8-F6-E6-G3-K3/scale1/value"),
    (experts.DenseTimesZero, "unselected"),
    (attention.HeadsTiled, "attention/f32/B2-S7-H6-Hkv2-d4/scale1/value"),
    (attention.MaskOffByOne, "attention/f32/B2-S7-H6-Hkv2-d4/scale1/value"),
    (attention.DecodeOffByOne, "attention/f32/B2-S9-H4-Hkv2-d4/scale1/decode"),
    (caches.PaddingInSlotZero, "chunks"),
    (attention.PaddingIsNaN, "ragged"),
]


@pytest.mark.parametrize(("mutant", "name"), REJECTED, ids=lambda v: getattr(v, "name", v))
def test_wrong_backends_fail(mutant: type[Backend], name: str) -> None:
    judge_file(Subject(Backend()), of(name))
    with pytest.raises(Failure):
        judge_file(Subject(mutant()), of(name))


def test_a_dtype_that_a_backend_lacks_is_a_skip() -> None:
    class Narrow(Backend):
        dtypes = (torch.float32,)

    with pytest.raises(Skip, match="computes in float32 only"):
        judge_file(Subject(Narrow()), of("experts/bf16/T7-D8-F6-E6-G3-K3/scale1/value"))


# Files of one's own.


def test_any_call_can_be_saved_and_judged(tmp_path: Path) -> None:
    wide = normal("x", 5, 14).bfloat16()
    calls: list[tuple[str, Args]] = [
        ("linear", {"w": normal("w", 3, 7).bfloat16(), "x": wide[:, ::2]}),  # any order, no bias
        ("experts", {**draw(parse("experts/f32/T5-D4-F3-E6-G3-K3/scale1/value")), "first": 2}),
        (
            "route",
            {
                "logits": normal("logits", 9, 12),
                "spec": RouteSpec(4, 5, "softmax", 2, True, 0.5),
                "scale": None,
                "bias": normal("bias", 12, scale=0.01).float(),
            },
        ),
        ("route", {"logits": normal("logits", 9, 12).float(), "spec": RouteSpec(4, 4)}),
        ("embed", {"ids": torch.tensor([2, 0]), "w": normal("w", 3, 7).half()}),
    ]
    calls[2][1]["logits"] = calls[2][1]["logits"].float()
    for op, args in calls:
        path = write(tmp_path / "new" / "case.npz", op, args, note="layer 3 of ä model")
        golden = read(path)
        assert golden.note == "layer 3 of ä model" and about(path)["case"] is None
        for name, value in args.items():
            same = golden.calls[0][name]
            if isinstance(value, Tensor):
                assert same.dtype == value.dtype and torch.equal(same, value)
            else:
                assert same == value
        judge_file(Subject(Backend()), path)
    assert case_of("linear", read(write(path, *calls[0])).calls[0]).key == (
        "linear/bf16/T5-I7-O3-nobias/scale1"
    )

    class Off(Backend):
        def experts(self, *args: Any, **named: Any) -> Tensor:
            return super().experts(*args, **named) * 1.00001

    write(path, *calls[1])
    with pytest.raises(Failure, match="y is wrong in its worst row"):
        judge_file(Subject(Off()), path)


def attend(*positions: list[int]) -> Args:
    """One row at these positions."""
    at = torch.tensor([[*positions[0]]])
    name, length = str(positions), len(positions[0])
    q, k, v = (normal(f"{name}{n}", 1, length, 2, 4).float() for n in "qkv")
    return {"q": q, "k": k, "v": v, "positions": at}


def test_a_call_over_a_cache_is_saved_with_those_before_it(tmp_path: Path) -> None:
    path = tmp_path / "case.npz"
    subject = Subject(Backend())
    calls = [attend([0, 1, -1]), attend([2]), attend([-1, 3])]
    judge_file(subject, write(path, "attention", calls))
    assert read(path).cached and read(path).case.sizes["S"] >= 4
    alone = attend([5, 6, -1, 7])  # without a cache, any positions are right
    judge_file(subject, write(path, "attention", alone))
    assert not read(path).cached
    with pytest.raises(UserError, match=r"positions \[0, 1, 3\], which do not count up from 0"):
        write(path, "attention", [attend([0, 1]), attend([3])])
    with pytest.raises(UserError, match="a filled cache cannot be saved"):
        write(path, "attention", {**alone, "cache": object()})
    with pytest.raises(Failure, match="call 1: "):
        judge_file(Subject(attention.DecodeOffByOne()), write(path, "attention", calls))


X, W = normal("x", 3, 4).float(), normal("w", 2, 4).float()


@pytest.mark.parametrize(
    ("op", "calls", "sentence"),
    [
        ("linaer", {"x": X, "w": W}, "no operation 'linaer'. Did you mean 'linear'"),
        ("linear", {"x": X}, "not the arguments of linear: missing a required argument: 'w'"),
        ("linear", {"x": X, "w": W, "y": W}, "got an unexpected keyword argument 'y'"),
        ("linear", [{"x": X, "w": W}], "linear takes one call"),
        ("attention", [], "of at least 1"),
        ("linear", {"x": X.double(), "w": W.double()}, "float64 has no limits; it must be in f32"),
        ("linear", {"x": X / 0, "w": W}, "are not finite"),
    ],
)
def test_what_cannot_be_saved_is_a_sentence(
    op: str, calls: Any, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        write(tmp_path / "case.npz", op, calls)
    assert not list(tmp_path.iterdir())


def repack(path: Path, changes: dict[str, Any]) -> None:
    """The same file with other members; None leaves one out."""
    held: dict[str, Any] = {**members(path), **changes}
    with zipfile.ZipFile(path, "w") as archive:
        for key, array in held.items():
            if array is not None:
                packed = io.BytesIO()
                np.lib.format.write_array(packed, np.asarray(array), allow_pickle=True)
                archive.writestr(f"{key}.npy", packed.getvalue())


def text(**changes: Any) -> Array:
    said = about(of("linear/f32/T7-I12-O10/scale1/value"))
    return np.frombuffer(json.dumps({**said, **changes}).encode(), np.uint8)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"about": None}, "is no golden case"),
        ({"0.in.x": None}, "is no golden case"),
        ({"0.out.y": None}, "is no golden case"),
        ({"1.in.x": np.zeros(3)}, "is no golden case"),
        ({"0.in.x": np.array([{1: 2}])}, "is no golden case"),
        ({"about": text(version=2)}, "of version 2; this package reads 'moge-hal golden case'"),
        ({"about": text(operation="__init__")}, "is no golden case"),
        ({"about": text(case="linear/f32/T7/scale1/value")}, "a shape of linear must give T-I-O"),
        ({"about": text(outputs=[{"name": "y"}])}, "is no golden case"),
        ({"about": np.frombuffer(b"[1]", np.uint8)}, "is no golden case"),
    ],
)
def test_a_file_that_is_none_is_a_sentence(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "case.npz"
    path.write_bytes(of("linear/f32/T7-I12-O10/scale1/value").read_bytes())
    read(path)
    repack(path, changes)
    with pytest.raises(UserError, match=re.escape(sentence)):
        read(path)


def test_half_a_file_and_no_file_are_sentences(tmp_path: Path) -> None:
    path = tmp_path / "case.npz"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read(path)
    whole = files()[0].read_bytes()
    for data in (b"", whole[: len(whole) // 2], whole[:-100], b"text"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="is no golden case"):
            read(path)
