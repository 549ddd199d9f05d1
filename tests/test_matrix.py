"""The table of what runs where, from reports: what it says, and what it refuses to say."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from reports import changed, judged, whole, with_outcomes

from moge_hal.conformance.reports.matrix import BEGIN, END, in_readme, matrix
from moge_hal.conformance.reports.report import Report
from moge_hal.conformance.result import Selection
from moge_hal.errors import UserError
from moge_hal.ops import NAMES

CPU = judged("cpu")
FULL = judged("full", kind="full:Full", claims=["core", "train", "capture", "bitwise"])
GRAPH = judged(
    "graph",
    kind="graph:Graph",
    level="simulated",
    graph=True,
    claims=["core"],
    dtypes=["float32"],
)
UNWRITTEN = "attention/f32/B2-S17-H6-Hkv2-d8/scale1/unwritten"
VALUE = "linear/f32/T17-I40-O56/scale1/value"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def report() -> Report:
    return whole(CPU)


def put(name: str, report: Report) -> str:
    Path(name).write_text(json.dumps(report.data()), "utf-8")
    return name


def rows(table: str) -> dict[str, list[str]]:
    """The cells behind the name of a row."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    return {line[0].strip("`"): line[1:] for line in lines}


def count(report: Report, op: str, dtype: str, profile: str = "core") -> int:
    return sum(o.id.split("/")[:2] == [op, dtype] and o.profile == profile for o in report.outcomes)


def test_every_operation_and_every_profile_of_every_backend(report: Report) -> None:
    skip = {"outcome": "skipped", "error": None, "limit": None, "reason": "no | slots"}
    graph = changed(whole(GRAPH), UNWRITTEN, **skip)
    table = matrix([put("a.json", report), put("b.json", graph), put("c.json", whole(FULL))])
    found = rows(table)
    assert found["operation"] == ["cpu (real)", "graph (simulated)", "full (real)"]
    assert list(found)[2:] == [
        *NAMES,
        "whole models",
        "gradients (profile train)",
        "can be captured (profile capture)",
        "same bits in any batch (profile bitwise)",
    ]
    each = {d: count(report, "linear", d) for d in ("f32", "bf16", "f16")}
    assert found["linear"] == [
        f"f32 bf16 f16 · {sum(each.values())}",
        f"f32 · {each['f32']}",
        f"f32 bf16 f16 · {sum(each.values())}",
    ]
    many = count(report, "attention", "f32")
    assert found["attention"][1] == f"f32¹ · {many - 1} of {many}"
    assert "¹ skipped: no \\| slots" in table
    models = sum(count(report, "model", d) for d in ("f32", "bf16", "f16"))
    assert found["whole models"][0] == f"f32 bf16 f16 · {models}"
    train, capture, bitwise = list(found)[-3:]
    assert found[train][0].startswith("f32 bf16 f16 · ") and found[train][1] == "not claimed"
    assert found[capture][:2] == ["not claimed"] * 2
    assert found[capture][2].endswith(" (simulated)")  # on a real device, proved without it
    assert found[bitwise][2].startswith("f32 bf16 f16 · ") and "(" not in found[bitwise][2]
    assert "simulated: another device that computes in its place" in table
    assert "emulated" not in table
    assert table.splitlines()[-1] == (
        f"Written by `moge-hal matrix a.json b.json c.json`, from the reports of "
        f"{report.suite.cases:,} cases a backend."
    )


def test_a_failure_is_told_and_a_deviation_is_no_pass(report: Report) -> None:
    many = count(report, "linear", "f32")
    both = sum(count(report, "linear", d) for d in ("bf16", "f16"))
    failing = changed(report, VALUE, outcome="failed", error=1.0, reason="wrong")
    assert rows(matrix([put("a.json", failing)]))["linear"] == [
        f"bf16 f16 · {both}, **f32: 1 of {many} failed**"
    ]
    deviating = changed(report, VALUE, outcome="deviates", error=1.0, reason="until firmware 3")
    table = matrix([put("a.json", deviating)])
    assert rows(table)["linear"] == [f"f32¹ bf16 f16 · {both + many - 1} of {both + many}"]
    assert "¹ known deviation: until firmware 3" in table
    refusing = with_outcomes(
        report,
        [replace(o, outcome="deviates", reason="later")
         if o.id.startswith("embed/f16/") and o.profile == "core" else o
         for o in report.outcomes],
    )  # fmt: skip
    embed = rows(matrix([put("a.json", refusing)]))["embed"][0]
    assert embed.endswith(", f16: none passed¹")


def test_no_text_is_markup_or_a_link(report: Report) -> None:
    evil = "<b>|`*_[x](y) https://example.org www.example.org a@example.org #1 &lt; $x$ ~~y~~"
    skipping = changed(report, VALUE, outcome="deviates", error=1.0, reason=evil)
    (note,) = [line for line in matrix([put("a.json", skipping)]).splitlines() if "<b" in line]
    escaped = note.partition("known deviation: ")[2].removesuffix("<br>")
    assert re.sub(r"\\(\W|_)", r"\1", escaped) == evil
    assert not re.search(r"(?<!\\)[<>|`*_\[\]&~$@#]|://|www\.", escaped)


def test_a_name_with_control_characters_is_no_column(report: Report) -> None:
    named = with_outcomes(report, [replace(o, backend="cpu\n| x |") for o in report.outcomes])
    with pytest.raises(UserError, match="must be one line of plain text"):
        matrix([put("a.json", named)])


def test_the_same_on_every_machine(report: Report) -> None:
    other = replace(
        report,
        versions={"torch": "9.9"},
        git=None,
        machine=replace(report.machine, platform="elsewhere", threads=64),
        started="2031-01-01T00:00:00+00:00",
        seconds=0.1,
        backends=[replace(b, device="another CPU") for b in report.backends],
        outcomes=[replace(o, error=0.0, seconds=1.0) for o in report.outcomes],
    )
    assert matrix([put("a.json", report)]) == matrix([put("a.json", other)])
    said = matrix([put("a.json", replace(report, refused={"cuda": "torch 2.1 has no CUDA"}))])
    assert "Could not be judged: cuda." in said and "2.1" not in said


def test_what_does_not_belong_in_one_table_is_one_sentence(report: Report) -> None:
    put("a.json", report)

    def refused(*names: str) -> str:
        with pytest.raises(UserError) as error:
            matrix(names)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no report was named" in refused()
    put("b.json", whole(replace(CPU, name="the_same")))
    twice = "the_same (real) is in a.json and in b.json: give one report of it"
    assert refused("a.json", "b.json") == twice
    put("c.json", replace(report, suite=replace(report.suite, hash="0" * 16)))
    assert "c.json cannot be in the table: it was made by suite 00" in refused("c.json")
    put("d.json", whole(CPU, selection=Selection(quick=True)))
    assert "d.json cannot be in the table: only a part of the suite" in refused("a.json", "d.json")
    put("e.json", with_outcomes(report, report.outcomes[1:]))
    assert "e.json cannot be in the table: cpu: missing: embed/" in refused("e.json")
    put("f.json", whole(CPU, selection=Selection(seed_offset=5)))
    assert "it has other inputs (--seed-offset)" in refused("f.json")
    simulated = put("g.json", whole(judged("cpu", level="simulated")))
    assert rows(matrix(["a.json", simulated]))["operation"] == ["cpu (real)", "cpu (simulated)"]


def test_the_table_takes_its_place_in_a_text() -> None:
    text = f"# Title\n\n{BEGIN}\nold\n{END}\n\nMore.\n"
    once = in_readme(text, "| a |\n")
    assert once == f"# Title\n\n{BEGIN}\n\n| a |\n\n{END}\n\nMore.\n"
    assert in_readme(once, "| a |") == once
    for wrong in ("", BEGIN, END, f"{END} {BEGIN}", f"{BEGIN} {END} {END}", f"{BEGIN} {text}"):
        with pytest.raises(UserError, match=r"must hold .* each once"):
            in_readme(wrong, "| a |")
