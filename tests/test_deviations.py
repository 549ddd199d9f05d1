"""Known deviations: what their file may say, and what a run makes of it."""

import subprocess
from pathlib import Path

import pytest
import torch
from commands import PYTHON, refused
from commands import run as command
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.conformance import run
from moge_hal.conformance.deviations import Deviation, Deviations
from moge_hal.conformance.result import Outcome
from moge_hal.errors import UserError

COARSE = "test_deviations:Coarse"
RIGHT = "linear/f32/T0-I48-O40/scale1/value"  # there is nothing to be wrong about
WRONG = "linear/f32/T1-I48-O40/scale1/value"
ENTRY = '[[deviation]]\ncase = "{}"\nreason = "multiplies in bfloat16"\n'


class Coarse(Backend):
    """Its matrix products have the precision of bfloat16."""

    name = "coarse"
    dtypes = (torch.float32,)

    def linear(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return ops.linear(x, w, b).bfloat16().float()


def write(folder: Path, text: str) -> Path:
    path = folder / "known.toml"
    path.write_text(text, "utf-8")
    return path


def outcomes(path: Path, *filters: str) -> tuple[dict[str, Outcome], int, str]:
    """By id, the exit code and the report of a run of the coarse backend."""
    result = run(COARSE, filters, deviations=path, echo=False)
    return {o.id: o for o in result.outcomes}, result.exit_code, result.report()


def test_a_listed_failure_deviates_and_is_shown(tmp_path: Path) -> None:
    assert outcomes(write(tmp_path, ""), WRONG, RIGHT)[1] == 1
    by_id, code, report = outcomes(write(tmp_path, ENTRY.format(WRONG)), WRONG, RIGHT)
    assert code == 0
    assert {id: o.outcome for id, o in by_id.items()} == {WRONG: "deviates", RIGHT: "passed"}
    found = by_id[WRONG]
    assert "multiplies in bfloat16" in found.reason and len(found.reason) > 30  # and what was seen
    assert found.error is not None and found.limit is not None and found.error > found.limit
    assert "multiplies in bfloat16" in report and WRONG in report


def test_a_listed_case_that_passes_is_a_failure(tmp_path: Path) -> None:
    path = write(tmp_path, ENTRY.format("linear/f32/T[01]-I48-O40/scale1/value"))
    by_id, code, report = outcomes(path, WRONG, RIGHT)
    assert code == 1
    assert {id: o.outcome for id, o in by_id.items()} == {WRONG: "deviates", RIGHT: "failed"}
    assert str(path) in by_id[RIGHT].reason and "take it out" in by_id[RIGHT].reason
    assert RIGHT in report


def test_an_entry_whose_cases_are_all_skipped_is_a_failure(tmp_path: Path) -> None:
    skipped = "linear/bf16/T1-I48-O40/scale1/value"
    path = write(tmp_path, ENTRY.format(WRONG) + ENTRY.format("linear/bf16/*"))
    by_id, code, report = outcomes(path, WRONG, RIGHT, skipped)
    assert by_id[skipped].outcome == "skipped" and code == 1
    sentence = "deviation 2: every case of 'linear/bf16/*' was skipped"
    assert sentence in report and "computes in float32 only" in report


def test_an_entry_for_what_is_not_run_is_left_alone(tmp_path: Path) -> None:
    other = ENTRY.format("attention/*").replace("case", 'backend = "mychip"\ncase')
    path = write(tmp_path, ENTRY.format(WRONG) + ENTRY.format("experts/*") + other)
    assert outcomes(path, WRONG, RIGHT)[1] == 0


def test_an_entry_holds_for_other_inputs_of_its_shape(tmp_path: Path) -> None:
    path = write(tmp_path, ENTRY.format(WRONG))
    result = run(COARSE, [WRONG, RIGHT], seed_offset=3, deviations=path, echo=False)
    assert sorted(o.outcome for o in result.outcomes) == ["deviates", "passed"]
    assert all("seed3" in o.id for o in result.outcomes)


def test_the_command_line_knows_them(tmp_path: Path) -> None:
    path = write(tmp_path, ENTRY.format(WRONG))
    options = ["--backend", COARSE, "--deviations", path, "--filter", WRONG, "--filter", RIGHT]
    result = command("conformance", *options)
    assert result.code == 0 and "multiplies in bfloat16" in result.out, result
    assert command("conformance", *options[:2], *options[4:]).code == 1
    refused(command("conformance", *options[:3], tmp_path / "no.toml"), "no.toml cannot be read")


def test_processes_that_share_the_work_know_them(tmp_path: Path) -> None:
    options = ["--backend", COARSE, "--filter", "linear/f32/T[01]-*/scale1/value", "--jobs", "2"]
    argv = [*PYTHON, "conformance", *options, "--deviations", write(tmp_path, ENTRY.format(WRONG))]
    result = subprocess.run(argv, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert result.returncode == 0 and "multiplies in bfloat16" in result.stdout, result


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("linear/bf61/*", "Did you mean 'bf16'"),
        ("linaer/*", "no operation 'linaer'. Did you mean 'linear'"),
        ("linear/f32/T1-I48-O40/scale1/valeu", "'value'"),
    ],
)
def test_an_entry_that_matches_no_case_is_refused_before_the_run(
    case: str, words: str, tmp_path: Path
) -> None:
    path = write(tmp_path, ENTRY.format(WRONG) + ENTRY.format(case))
    with pytest.raises(UserError) as error:
        run(COARSE, [RIGHT], deviations=path, echo=False)
    assert f"{path}, deviation 2: " in str(error.value) and words in str(error.value)


def test_one_of_several_backends_must_be_named(tmp_path: Path) -> None:
    path = write(tmp_path, ENTRY.format(WRONG))
    with pytest.raises(UserError) as error:
        run([COARSE, "null"], [WRONG], deviations=path, echo=False)
    rule = f'must say whose it is: add backend = "{COARSE}" or backend = "null"'
    assert str(error.value) == f"{path}, deviation 1 {rule}"
    named = ENTRY.format(WRONG).replace("case", f'backend = "{COARSE}"\ncase')
    result = run([COARSE, "null"], [WRONG, RIGHT], deviations=write(tmp_path, named), echo=False)
    words = {(o.backend, o.id): o.outcome for o in result.outcomes}
    assert words[COARSE, WRONG] == "deviates" and words["null", WRONG] == "passed"
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("backend", "asked", "holds"),
    [
        ("cuda", "cuda", True),
        ("cuda", "cuda:1", True),
        ("cuda:1", "cuda:1", True),
        ("cuda:1", "cuda", False),
        ("cuda:1", "cuda:2", False),
        ("cuda", "cudb", False),
        ("chip", "chip:Chip", False),
        ("chip:Chip", "chip:Chip", True),
        (None, "cuda:1", True),
    ],
)
def test_whose_an_entry_is(backend: str | None, asked: str, holds: bool) -> None:
    entry = Deviation("here", "experts/*", "slow", backend)
    assert Deviations((entry,)).match(asked, "experts/f32/x/scale1/value") is (
        entry if holds else None
    )
    assert Deviations((entry,)).match(asked, "linear/f32/x/scale1/value") is None


def test_the_first_entry_gives_the_reason(tmp_path: Path) -> None:
    text = ENTRY.format("linear/*") + ENTRY.format("*").replace("multiplies in", "all is")
    known = Deviations.read(write(tmp_path, text))
    reasons = [known.match("a", id) for id in ("linear/f32/x/y/z", "embed/f32/x/y/z")]
    assert [d and d.reason for d in reasons] == ["multiplies in bfloat16", "all is bfloat16"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[deviation]]\ncase = x", "is not TOML: Invalid value (at line 2, column 8)"),
        ('[deviation]\ncase = "*"', "must begin with the line [[deviation]]"),
        ('deviation = ["*"]', "deviation 1 must be a table"),
        ('[[deviations]]\ncase = "*"', "no key 'deviations'; there is deviation. Did you mean"),
        (ENTRY.format("*") + 'reson = "x"', "deviation 1: no key 'reson'; there is case, backend,"),
        ('[[deviation]]\nreason = "x"', 'deviation 1 has no case: add case = "..."'),
        ('[[deviation]]\ncase = "*"', 'deviation 1 has no reason: add reason = "..."'),
        ('[[deviation]]\ncase = "*"\nreason = " "', "reason = ' ' must be text, and not empty"),
        ('[[deviation]]\ncase = 3\nreason = "x"', "case = 3 must be text"),
        (ENTRY.format("*") + "backend = []", "backend = [] must be text"),
        (ENTRY.format("*") * 2, "deviation 2 says the same as "),
    ],
)
def test_a_file_that_says_something_else_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        Deviations.read(path)
    assert str(error.value).startswith(str(path)) and words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.toml cannot be read: No such file"):
        Deviations.read(tmp_path / "gone.toml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        Deviations.read(tmp_path)
    (tmp_path / "latin.toml").write_bytes("# é".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.toml is not UTF-8"):
        Deviations.read(tmp_path / "latin.toml")


def test_a_misspelt_backend_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "known.toml"
    file.write_text('[[deviation]]\ncase = "linear/*"\nbackend = "nul"\nreason = "old"\n')
    with pytest.raises(UserError, match=r"deviation 1: there is no backend 'nul'\. Did you mean"):
        Deviations.read(file).check(["null"])
