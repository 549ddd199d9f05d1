"""Backends that break the contract: each gets one sentence that names it, and the others run on.

Every one is a distribution of its own, with a module and a dist-info folder as pip leaves one.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import PYTHON, refused, run

HEAD = """
import torch
from moge_hal import Backend, Probe

class Chip(Backend):
    name = "{name}"
"""


class Bad(NamedTuple):
    """name: of the backend; body: what follows in its class; words: of the sentence about it."""

    name: str
    body: str
    words: str


# These cannot be listed as able to run.
UNABLE = [
    Bad("probe-raises", "def probe(self): raise OSError('no driver')", "raised OSError: no driver"),
    Bad("probe-exits", "def probe(self): raise SystemExit(3)", "its probe raised SystemExit: 3"),
    Bad("probe-none", "def probe(self): pass", "its probe returned None, which is no Probe"),
    Bad("probe-bool", "def probe(self): return True", "its probe returned True, which is no"),
    Bad("mute", "def probe(self): return Probe(False)", "says no, and gives no reason"),
    Bad(
        "level",
        "def probe(self): return Probe(True, level='dreamt')",
        "its probe says level 'dreamt'; the levels are real, simulated, emulated",
    ),
    Bad("import-raises", "raise OSError('libchip.so')", "cannot be imported (OSError: libchip.so)"),
    Bad("import-exits", "import sys; sys.exit(1)", "cannot be imported (SystemExit: 1)"),
    Bad("no-such", "pass\nChip, Other = None, Chip", "is not a subclass of moge_hal.Backend"),
    Bad("init-raises", "def __init__(self, index=None): 1 / 0", "(ZeroDivisionError: division by"),
    Bad("init-takes-none", "def __init__(self): pass", "cannot be created (TypeError: "),
    Bad("renamed", "name = 'other'", "its name is 'other', but its entry point says 'renamed'"),
    Bad("nameless", "name = Backend.name", "its name is 'default', but its entry point says 'na"),
    Bad("auto", "pass", "the name 'auto' has a meaning of its own"),
    Bad("two words", "pass", "the name 'two words' must be lower-case letters and digits"),
    Bad("no-dtypes", "dtypes = ()", "its dtypes = () must be a tuple of torch's types"),
    Bad("one-dtype", "dtypes = (torch.float32)", "its dtypes = torch.float32 must be a tuple"),
    Bad("text-dtype", "dtypes = ('float32',)", "its dtypes hold 'float32', which is no floating"),
    Bad("int-dtype", "dtypes = (torch.int8,)", "its dtypes hold torch.int8, which is no floating"),
    Bad("claims", "claims = ('core', 'trian')", "it claims 'trian'; the profiles are core, train"),
    Bad("one-claim", "claims = 'core'", "its claims = 'core' must be a tuple of profiles"),
    Bad("dtypes-raise", "dtypes = property(lambda self: 1 / 0)", "ZeroDivisionError: division by"),
    Bad("null", "pass", "both claim the backend name 'null'; uninstall one of them"),
]
# These can; what is wrong shows when a model is bound to them, or runs.
LINEAR = "\n    def linear(self, x, w, b=None): raise NotImplementedError('on this chip')"
LYING = [
    Bad("empty", f"def why_not(self, facts): return ''{LINEAR}", "answers why_not(linear) with ''"),
    Bad("true", f"def why_not(self, facts): return True{LINEAR}", "why_not(linear) with True"),
    Bad("false", f"def why_not(self, facts): return False{LINEAR}", "why_not(linear) with False"),
    Bad(
        "raises", f"def why_not(self, facts): 1 / 0{LINEAR}", "raised ZeroDivisionError in why_not"
    ),
    Bad(
        "unwritten",
        f"pass{LINEAR}",
        "says None in why_not(linear), but linear raised NotImplementedError (on this chip)",
    ),
]


def install(bad: Bad, folder: Path) -> None:
    """A distribution `bad-NAME` with a module of its own."""
    module = f"bad_{bad.name.replace('-', '_').replace(' ', '_')}"
    code = f"{HEAD.format(name=bad.name)}    {bad.body}\n"
    (folder / f"{module}.py").write_text(code, "utf-8")
    about = folder / f"{module}-1.0.dist-info"
    about.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: bad-{bad.name}\nVersion: 1.0\n"
    (about / "METADATA").write_text(metadata, "utf-8")
    points = f"[moge_hal.backends]\n{bad.name} = {module}:Chip\n"
    (about / "entry_points.txt").write_text(points, "utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where all of them are installed."""
    folder = tmp_path_factory.mktemp("site")
    for bad in (*UNABLE, *LYING):
        install(bad, folder)
    return folder


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(site))
    yield
    for name in [name for name in sys.modules if name.startswith("bad_")]:
        del sys.modules[name]


def command(site: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """`moge-hal argv` in a process of its own, which sees what is installed there."""
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([*PYTHON, *argv], env=environment, capture_output=True, text=True)


def test_the_table_has_a_line_for_each_and_the_others_as_usual(site: Path) -> None:
    result = command(site, "backends")
    assert result.returncode == 0 and result.stderr == ""
    found = [
        re.fullmatch(r"  (\S.*?) +(ok|no)   (\S.*)", line) for line in result.stdout.splitlines()
    ]
    lines = {m[1]: (m[2], m[3]) for m in found if m}
    for bad in UNABLE:
        word, line = lines[bad.name]
        assert word == "no" and bad.words in line and " Fix: " in line
        module = f"bad_{bad.name.replace('-', '_').replace(' ', '_')}:Chip"
        assert module in line or f"bad-{bad.name}" in line
    for bad in LYING:
        assert lines[bad.name][0] == "ok"
    assert lines["cpu"][0] == lines["onnx"][0] == "ok"
    assert len(lines) == len(found) == len(UNABLE) + len(LYING) + 4


def test_the_table_for_machines_has_them_too(site: Path) -> None:
    result = command(site, "backends", "--json")
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert not any(rows[bad.name]["probe"]["ok"] for bad in UNABLE)
    assert rows["mute"]["source"] == "bad-mute"
    assert rows["null"]["source"] == "bad-null, moge-hal"
    assert rows["cpu"]["probe"]["ok"]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("bad", [b for b in UNABLE if b.name != "auto"], ids=lambda bad: bad.name)
def test_one_that_cannot_run_is_refused_with_its_sentence(bad: Bad) -> None:
    result = run("generate", "A", "--backend", bad.name, "--max-new-tokens", 1)
    assert result.code == 2 and result.out == "" and "Traceback" not in result.err
    assert bad.words in result.err.splitlines()[0]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("bad", LYING, ids=lambda bad: bad.name)
def test_one_that_lies_is_refused_when_it_is_found_out(bad: Bad) -> None:
    result = run("generate", "A", "--backend", bad.name, "--max-new-tokens", 1)
    refused(result, bad.words, f"bad_{bad.name}:Chip")


def test_the_others_still_run(site: Path) -> None:
    for name in ("auto", "cpu"):
        result = command(site, "generate", "Emma", "--backend", name, "--max-new-tokens", "1")
        assert result.returncode == 0 and result.stdout.startswith("Emma"), result.stderr


ONE_CASE = "rms_norm/f32/T1-D24/scale1/value"


def test_a_run_judges_the_others_and_fails(site: Path) -> None:
    names = "mute,true,claims,cpu"
    result = command(site, "conformance", "--backend", names, "--filter", ONE_CASE)
    assert result.returncode == 1, result
    for bad in (*UNABLE, *LYING):
        told = f"{bad.name} was not judged: " in result.stdout and bad.words in result.stdout
        assert told == (bad.name in names.split(",")), bad
    assert "1/0/0" in result.stdout


def test_one_that_is_not_written_fails_its_cases_alone(site: Path) -> None:
    filters = ["--filter", "linear/f32/T1-I48-O40/scale1/value", "--filter", ONE_CASE]
    result = command(site, "conformance", "--backend", "unwritten", *filters)
    assert result.returncode == 1
    assert "NotImplementedError (on this chip)" in result.stdout
    assert "1/1/0" in result.stdout


def test_a_misspelt_name_ends_the_run_before_it_begins(site: Path) -> None:
    result = command(site, "conformance", "--backend", "cpu,mutee", "--filter", ONE_CASE)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("moge-hal: no backend 'mutee'. Did you mean 'mute'")
