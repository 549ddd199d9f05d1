"""Reports: what a run writes, and what can be read again."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reports import judged, whole

from moge_hal.conformance import run
from moge_hal.conformance.reports import provenance
from moge_hal.conformance.reports import report as report_module
from moge_hal.conformance.reports.report import Report, document, read
from moge_hal.conformance.result import Outcome, Result, Selection
from moge_hal.errors import UserError

VALUE = "linear/f32/T17-I40-O56/scale1/value"


@pytest.fixture(scope="module")
def report() -> Report:
    """Of the whole suite, on two backends."""
    return whole(judged(), judged("other", level="simulated", claims=["core"], dtypes=["float32"]))


def put(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), "utf-8")
    return path


def outcome(data: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A report's data with another first outcome."""
    first, *others = data["outcomes"]
    return {**data, "outcomes": [{**first, **fields}, *others]}


def within(data: dict[str, Any], name: str, **fields: Any) -> dict[str, Any]:
    return {**data, name: {**data[name], **fields}}


# Writing and reading


def test_a_run_writes_what_it_found_and_reads_it_again(tmp_path: Path) -> None:
    filters = ["linear/f32/*/value", "linear/f32/*/bitwise"]
    result = run("null", filters, report=tmp_path / "out", echo=False)
    written = read(tmp_path / "out" / "report.json")
    assert written.outcomes == list(result.outcomes)
    assert written.suite.selection == Selection(filters)
    assert written.suite.cases == len({o.id for o in result.outcomes})
    (backend,) = written.backends
    assert backend.name == "null" and backend.level == "real"
    assert backend.counts["passed"] == sum(o.outcome == "passed" for o in result.outcomes) > 20
    assert backend.counts["skipped"] > 0
    assert written.versions["torch"] and written.machine.threads >= 1 and written.seconds > 0
    html = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert VALUE in html and written.suite.hash in html
    again = document(result, 1.7e9, written.seconds)
    assert again["started"] == "2023-11-14T22:13:20+00:00"
    assert again == {**written.data(), "started": again["started"]}


def test_a_report_says_nothing_of_who_made_it(report: Report) -> None:
    text = json.dumps(report.data())
    assert str(Path.home()) not in text and str(Path.cwd()) not in text


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda d: "", "is not JSON, or was cut off"),
        (lambda d: json.dumps(d)[:-300], "is not JSON, or was cut off"),
        (lambda d: [], "it is [], must be an object"),
        (lambda d: {**d, "format": 2}, "of format 2, and this moge_hal reads format 1"),
        (lambda d: {**d, "format": True}, "it.format is true, must be a whole number"),
        (lambda d: {k: v for k, v in d.items() if k != "suite"}, "it has no 'suite'"),
        (lambda d: {**d, "score": 100}, "it has 'score', which does not belong there"),
        (lambda d: {**d, "seconds": "fast"}, 'it.seconds is "fast", must be a number'),
        (lambda d: {**d, "git": "abc"}, 'it.git is "abc", must be an object'),
        (lambda d: {**d, "outcomes": {}}, "it.outcomes is {}, must be a list"),
        (lambda d: {**d, "versions": {"torch": 2.1}}, "it.versions.torch is 2.1, must be text"),
        (lambda d: {**d, "backends": d["backends"] * 2}, "the backend 'null' is in it twice"),
        (lambda d: json.dumps(d).replace("1e-06", "NaN"), "NaN is no number in JSON"),
        (lambda d: json.dumps(d).replace("1e-06", "1e999"), "1e999 is too large a number"),
        (lambda d: json.dumps(d).replace("12.5", "9" * 5000), "no JSON that can be read"),
        (lambda d: "[" * 100_000, "no JSON that can be read"),
        (
            lambda d: json.dumps(d).replace('"passed", "error"', '"won", "error"'),
            'it.outcomes[0].outcome is "won", must be passed or failed or skipped or deviates',
        ),
        (
            lambda d: json.dumps(d).replace('"level"', '"id": "x", "level"'),
            "the key 'id' is there twice",
        ),
        (lambda d: {**d, "seconds": -1}, "seconds = -1 must not be below 0"),
        (lambda d: outcome(d, seconds=-0.5), "seconds = -0.5 must not be below 0"),
        (
            lambda d: outcome(d, seconds=10**400),
            "0... is too large a number",
        ),
        (lambda d: outcome(d, inputs="sixteen letters "), "the digest 'sixteen letters ' must be"),
        (lambda d: outcome(d, backend="a,b"), "the name 'a,b' must be a backend's: letters, "),
        (lambda d: within(d, "suite", hash="x"), "the suite 'x' must be 16 hexadecimal digits"),
        (lambda d: within(d, "suite", cases=-1), "cases = -1 must not be below 0"),
        (lambda d: within(d, "machine", threads=-4), "threads = -4 must not be below 0"),
        (
            lambda d: {**d, "git": {"commit": "main", "dirty": False}},
            "the commit 'main' must be one of git",
        ),
        (lambda d: {**d, "started": "today"}, "started = 'today' must be an ISO 8601 time"),
        (lambda d: {**d, "started": "2026-01-01T00:00:00"}, "must be an ISO 8601 time with its zo"),
        (
            lambda d: {**d, "refused": {"\n": "x"}},
            'a key of it.refused is "\\n", with the character',
        ),
        (lambda d: {**d, "broken": ["a\nb"]}, 'it.broken[0] is "a\\nb", with the character U+000A'),
        (
            lambda d: within(d, "suite", selection={**d["suite"]["selection"], "seed_offset": -1}),
            "the seed offset -1 must be of 0 to 999,999,999",
        ),
    ],
    ids=range(32),
)
def test_what_is_no_report_is_one_sentence(spoil: Any, reason: str, tmp_path: Path) -> None:
    short = whole(selection=Selection(["linear/f32/T1-*/value"]))
    with pytest.raises(UserError) as error:
        read(put(tmp_path / "r.json", spoil(short.data())))
    assert reason in str(error.value) and str(tmp_path / "r.json") in str(error.value)
    assert str(error.value).count("\n") == 0
    assert read(put(tmp_path / "r.json", short.data())) == short


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    """Whatever a backend and its exceptions say: the reader takes no line breaks."""
    only = Selection([VALUE])
    ugly = "raised \x1b[31mError\x1b[0m:\n  at\tline\u2028 1 \ud800"
    given = judged(device=ugly, operations={"float32 infer": {"linear": f"default: {ugly}"}})
    made = [Outcome(VALUE, "null", "failed", reason=ugly, inputs="0" * 16)]
    result = Result(("null",), tuple(made), (given,), {"ascend": f"no chip\n{ugly}"}, only, (ugly,))
    report_module.write(tmp_path, result, 1.7e9, 1.0)
    found = read(tmp_path / "report.json")
    plain = "raised [31mError [0m: at line 1"
    assert found.outcomes[0].reason == found.backends[0].device == found.broken[0] == plain
    assert found.refused == {"ascend": f"no chip {plain}"}
    assert found.backends[0].operations == {"float32 infer": {"linear": f"default: {plain}"}}
    assert "\x1b" not in (tmp_path / "report.html").read_text("utf-8")


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read(tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8 at byte 0"):
        read(tmp_path / "binary")


# Where it comes from


def test_the_hash_covers_what_judges_and_nothing_else() -> None:
    """What the suite imports is hashed, but for what only reads files or tells of it."""
    code = (
        "import sys, moge_hal.conformance.test_suite, moge_hal.conformance.session;"
        "print(*[name for name in sys.modules if name.startswith('moge_hal.')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = {name.removeprefix("moge_hal.").replace(".", "/") for name in said.stdout.split()}
    telling = {
        "conformance",
        "conformance/properties",
        "conformance/plugin",
        "conformance/result",
        "errors",
        "registry",
    }
    files = {"checkpoint", "files", "loading", "shards", "tokenizer"}  # inputs have digests
    assert found - telling - files == set(provenance.SOURCES)


def test_the_hash_sees_a_change_and_no_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = provenance.suite_hash()
    assert re.fullmatch("[0-9a-f]{16}", before)
    here = Path(provenance.__file__).parents[2]
    for name in provenance.SOURCES:
        text = (here / f"{name}.py").read_bytes().replace(b"\r\n", b"\n")
        copy = tmp_path / f"{name}.py"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(text.replace(b"\n", b"\r\n"))
    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path)
    assert provenance.suite_hash() == before
    with (tmp_path / "conformance" / "limits.py").open("ab") as file:
        file.write(b"_TINY = 1.0\n")
    assert provenance.suite_hash() != before


def test_the_checkout_is_that_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        names = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(
            ["git", "-C", str(tmp_path), *names, *words], check=True, capture_output=True
        )

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(provenance, "_PACKAGE", package)
    assert provenance.git() is None
    git("init")
    assert provenance.git() is None  # installed inside a checkout of something else
    git("add", ".")
    git("commit", "-m", "first")
    clean = provenance.git()
    assert clean is not None and re.fullmatch("[0-9a-f]{40,64}", clean.commit) and not clean.dirty
    (package / "report.json").write_text("{}")
    assert provenance.git() == clean
    (package / "backend.py").write_text("")
    assert provenance.git() == replace(clean, dirty=True)
