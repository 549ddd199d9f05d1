"""A run of the suite: what is selected, in how many processes, under which pytest; and that its
inputs are the same everywhere.
"""

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from commands import refused
from commands import run as command
from torch import Tensor

from moge_hal.backend import Backend
from moge_hal.conformance import list_cases, run
from moge_hal.conformance.cases import parse
from moge_hal.conformance.digest import digest
from moge_hal.conformance.listing import every_case
from moge_hal.errors import UserError

HERE = Path(__file__).parent
NULL = "moge_hal.backends.null:NullBackend"
SOME = ["linear/*/T17-I40-O56/*", "route/f32/*/route.ties"]
ALL_CLAIMS = ("core", "train", "capture", "bitwise")


class Wrong(Backend):
    """Wrong for one token alone."""

    name = "wrong"

    def linear(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return super().linear(x, w, b) * (1.01 if len(x) == 1 else 1)


def python(*args: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *args],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_profile_is_its_cases() -> None:
    by_profile = {name: set(list_cases(profile=name)) for name in ALL_CLAIMS}
    assert set().union(*by_profile.values()) == set(list_cases())
    assert sum(map(len, by_profile.values())) == len(list_cases())
    assert {parse(id).prop for id in by_profile["train"]} == {"gradients", "train-step"}
    with pytest.raises(UserError, match=r"no profile 'coer'.* Did you mean 'core'"):
        list_cases(profile="coer")


def test_the_quick_ones_are_few_and_of_every_kind() -> None:
    quick = [parse(id) for id in list_cases(quick=True)]
    assert {(c.op, c.prop) for c in quick} == {(c.op, c.prop) for c in every_case()}
    assert len(quick) < len(every_case()) / 8


@pytest.mark.parametrize(
    "options",
    [
        {"filters": ["route/*/gradients"], "profile": "core"},
        {"filters": ["linear/bf16/*"], "quick": True},
    ],
)
def test_a_selection_of_nothing_is_an_error(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="no case belongs to the filters"):
        list_cases(**options)  # type: ignore[arg-type]


def test_an_offset_gives_other_inputs_that_replay_by_their_own_ids() -> None:
    usual, other = list_cases(SOME), list_cases(SOME, seed_offset=7)
    assert len(usual) == len(other) and not set(usual) & set(other)
    assert other[0] == "linear/f32/T17-I40-O56-seed7/scale0.01/value"
    assert list_cases(other[:1]) == other[:1]
    assert digest(parse(usual[0])) != digest(parse(other[0]))
    models = [parse(id) for id in list_cases("model/*", seed_offset=7)]
    assert {m.shape for m in models} == {"tiny-seed7", "tiny-seed8", "shipped-seed7"}
    assert run(NULL, SOME, seed_offset=7, echo=False).exit_code == 0
    with pytest.raises(UserError, match="seed offset"):
        list_cases(seed_offset=-1)


def test_processes_share_the_work_and_tell_the_same(tmp_path: Path) -> None:
    names = f"{__name__}:Wrong,{NULL}"
    args = ["conformance", "--backend", names, "--json", "--report", str(tmp_path)]
    args += [word for glob in SOME for word in ("--filter", glob)]
    told = []
    for jobs in ("1", "2"):
        done = python("-m", "moge_hal", *args, "--jobs", jobs, PYTHONPATH=os.fspath(HERE))
        assert done.returncode == 1, done.stderr
        outcomes = json.loads(done.stdout)
        for outcome in outcomes:
            del outcome["seconds"]
        told.append(outcomes)
    assert told[0] == told[1]
    document = json.loads((tmp_path / "report.json").read_text())
    assert len(document["outcomes"]) == len(told[0])
    suites = ElementTree.parse(tmp_path / "junit.xml").getroot()
    failed = sum(outcome["outcome"] == "failed" for outcome in told[0])
    assert [int(suite.attrib["failures"]) for suite in suites] == [failed, 0] and failed
    assert sum(int(suite.attrib["tests"]) for suite in suites) == len(told[0])
    assert len(suites.findall("*/testcase/failure")) == failed


# The inputs of cases of every kind, from a process of its own.
DIGESTS = """
import sys
import torch
torch.set_num_threads(int(sys.argv[1]))
from moge_hal.conformance.cases import parse
from moge_hal.conformance.digest import digest
print([digest(parse(id)) for id in sys.argv[2:]])
"""


def test_inputs_are_the_same_bits_in_any_process_thread_count_and_order() -> None:
    ids = [case.id for case in every_case() if case.prop in ("value", "route.valid", "decode")][::7]
    here = [digest(parse(id)) for id in ids]
    assert len(set(here)) > 40 and "" not in here
    there = python("-c", DIGESTS, "2", *reversed(ids), PYTHONHASHSEED="5").stdout
    assert there.strip() == str(here[::-1])


@pytest.mark.parametrize("id", ["model/f32/shipped/trained/decode", "experts/*/T7-D5120*/value"])
def test_a_case_replays_alone_in_seconds(id: str) -> None:
    id = list_cases(id)[0]
    start = time.monotonic()
    done = python("-m", "moge_hal", "conformance", "--backend", NULL, "--filter", id)
    assert done.returncode == 0 and "1 passed" in done.stdout
    assert time.monotonic() - start < 20  # some 3 seconds on a quiet machine


def test_the_suite_runs_under_any_pytest(tmp_path: Path) -> None:
    """`pytest --pyargs`, in a project that has a configuration of its own."""
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    (tmp_path / "wrong.py").write_text(
        "from moge_hal import Backend\n\n\nclass Wrong(Backend):\n"
        "    def rms_norm(self, x, w, eps):\n        return x\n"
    )
    suite = ["-m", "pytest", "-q", "--rootdir", str(tmp_path), "-c", str(tmp_path / "pytest.ini")]
    suite += ["--pyargs", "moge_hal.conformance", "-p", "no:cacheprovider"]
    some = ["--moge-filter", "rms_norm/f32/*", "--moge-report", str(tmp_path / "report")]
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    right = python(*suite, "--moge-backend", NULL, *some, **path)
    assert right.returncode == 0, right.stdout
    assert "passed/failed/skipped" in right.stdout
    assert (tmp_path / "report" / "report.html").is_file()
    assert (tmp_path / "report" / "junit.xml").is_file()
    assert python(*suite, "--moge-backend", "wrong:Wrong", *some, **path).returncode == 1
    typo = python(*suite, "--moge-backend", "nul", **path)
    assert typo.returncode == 2 and "no backend 'nul'" in typo.stdout + typo.stderr


def test_a_backend_that_cannot_be_judged_leaves_the_others_to_be() -> None:
    result = run([f"{__name__}:Refuses", NULL], SOME, echo=False)
    assert result.exit_code == 1 and result.backends == (NULL,)
    assert "no chip" in result.refused[f"{__name__}:Refuses"]
    assert f"{__name__}:Refuses was not judged" in result.report()
    with pytest.raises(UserError, match="no chip"):
        run([f"{__name__}:Refuses"], SOME, echo=False)


class Refuses(Backend):
    """Its probe says no."""

    name = "refuses"

    def probe(self):  # type: ignore[no-untyped-def]
        from moge_hal.backend import Probe

        return Probe(False, "no chip.", "plug one in.")


def test_a_run_says_what_it_judged() -> None:
    result = run([NULL], SOME, echo=False)
    (judged,) = result.judged
    assert judged.name == NULL and judged.kind == NULL and judged.level == "real"
    assert judged.operations["float32 infer"]["linear"].startswith("default: ")
    assert {o.level for o in result.outcomes} == {"real"}
    assert all(o.seconds >= 0 and len(o.inputs) == 16 for o in result.outcomes)


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    run([NULL], SOME[:1], echo=False)
    assert torch.get_num_threads() == before


class Dies(Backend):
    """Takes its process with it."""

    name = "dies"

    def linear(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        if len(x) == 7:
            os._exit(7)
        return super().linear(x, w, b)


def test_a_backend_that_kills_its_process_is_named(tmp_path: Path) -> None:
    args = ["--backend", f"{__name__}:Dies", "--filter", "linear/f32/*/scale1/value", "-j", "2"]
    done = python(
        *["-m", "moge_hal", "conformance", *args, "--report", str(tmp_path / "report")],
        PYTHONPATH=os.fspath(HERE),
    )
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert f"linear/f32/T7-I48-O40/scale1/value killed its process on {__name__}:Dies" in (
        done.stdout
    )
    assert not (tmp_path / "report" / "report.json").exists()


def test_a_part_of_a_run_leaves_no_report(tmp_path: Path) -> None:
    """Neither does it replace one that is there."""
    (tmp_path / "report.json").write_text("mine")
    suite = ["-m", "pytest", "-q", "--pyargs", "moge_hal.conformance", "-p", "no:cacheprovider"]
    some = ["--moge-backend", NULL, "--moge-filter", "rms_norm/f32/*", "-k", "T17-D40-strided"]
    done = python(*suite, *some, "--moge-report", str(tmp_path))
    assert done.returncode == 1 and "no report was written" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "mine"


def test_what_a_backend_prints_is_no_json() -> None:
    args = ["--backend", f"{__name__}:Loud", "--filter", SOME[1], "--json"]
    done = python("-m", "moge_hal", "conformance", *args, PYTHONPATH=os.fspath(HERE))
    assert done.returncode == 0 and len(json.loads(done.stdout)) == len(list_cases(SOME[1]))


class Loud(Backend):
    """Prints when it is made."""

    name = "loud"

    def __init__(self, index: int | None = None) -> None:
        super().__init__(index)
        print("hello")


@pytest.mark.parametrize(
    "words",
    [["--list", "--report", "x"], ["--list", "--json"], ["--golden", "x.npz", "--quick"]],
)
def test_options_that_mean_nothing_together_are_refused(words: list[str]) -> None:
    refused(command("conformance", *words), "and with nothing else")
