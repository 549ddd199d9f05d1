"""A new backend's package: what `new-backend` writes passes the suite as it is, by the commands of
its own README.md; and the commands of backends/README.md are run as they stand.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from commands import PYTHON, refused, run

import moge_hal
from moge_hal import cli, scaffold
from moge_hal.conformance.deviations import Deviations
from moge_hal.errors import UserError
from moge_hal.registry import get_backend
from moge_hal.scaffold import LONGEST, new_backend

FILES = {
    ".github/workflows/conformance.yml",
    ".gitignore",
    "README.md",
    "deviations.toml",
    "moge_hal_my_chip/__init__.py",
    "moge_hal_my_chip/py.typed",
    "pyproject.toml",
    "tests/test_conformance.py",
}
MANUAL = (Path(__file__).parent.parent / "backends" / "README.md").read_text("utf-8")
RULES = "B,E,F,I,RUF,SIM,UP"  # those of this project, at ruff's own width of 88 columns
SHORTER = {"generate": ["--max-new-tokens", "4"], "conformance": ["--quick"]}


class Package:
    """A package and the folder that it is installed in."""

    def __init__(self, folder: Path, site: Path) -> None:
        self.folder, self.site = folder, site

    def run(self, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command in the package's folder, in a process that sees what is installed."""
        path = os.pathsep.join(filter(None, [str(self.site), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, **environment}
        return subprocess.run(
            argv, cwd=self.folder, env=environment, capture_output=True, text=True
        )

    def install(self) -> None:
        """As `pip install .`, but without a network."""
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
        result = self.run(*pip, "--no-build-isolation", "--target", str(self.site), ".")
        assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """`my-chip`, written by `new_backend` and installed."""
    folder = tmp_path_factory.mktemp("work")
    made = Package(new_backend("my-chip", folder), tmp_path_factory.mktemp("site"))
    assert made.folder == folder / "moge-hal-my-chip"
    files = (path for path in made.folder.rglob("*") if path.is_file())
    assert {path.relative_to(made.folder).as_posix() for path in files} == FILES
    made.install()
    return made


def commands(text: str) -> list[tuple[dict[str, str], list[str]]]:
    """The environment and the words of every command that is indented in a README."""
    found = []
    for line in re.findall(r"^    (\S.*)$", text, re.M):
        for part in line.split("&&"):
            words = shlex.split(part)
            values = [word for word in words if re.fullmatch(r"[A-Z_]+=.*", word)]
            found.append((dict(v.split("=", 1) for v in values), words[len(values) :]))
    return found


def test_nothing_of_the_templates_name_is_left(package: Package) -> None:
    for file in FILES:
        assert not re.search("chip_name|chip-name|ChipName", (package.folder / file).read_text())


def test_its_readme_leads_to_a_report(package: Package) -> None:
    seen = []
    for environment, words in commands((package.folder / "README.md").read_text("utf-8")):
        seen.append(words[:2] if words[0] == "moge-hal" else words[:1])
        if words[0] == "pip":
            continue  # done by the fixture, where no network is needed
        if words[0] == "pytest":
            result = package.run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
        else:
            result = package.run(*PYTHON, *words[1:], *SHORTER.get(words[1], []), **environment)
        assert result.returncode == 0, result
        if "backends" in words:
            assert re.search(r"^  my-chip +ok   the CPU, for my-chip$", result.stdout, re.M)
        if "generate" in words:
            assert result.stdout.startswith("Call me Ishmael.")
            assert re.search(r"^  rms_norm +my-chip +the backend's own$", result.stderr, re.M)
        if words[0] == "pytest":
            assert "1 passed" in result.stdout
    assert seen == [
        ["pip"],
        ["moge-hal", "backends"],
        ["moge-hal", "generate"],
        ["pytest"],
        ["moge-hal", "conformance"],
    ]
    assert (package.folder / "report" / "report.json").is_file()
    ignored = (package.folder / ".gitignore").read_text().split()
    assert {"report/", "build/", "*.egg-info/"} <= set(ignored)


def test_its_types_are_all_judged_and_found_right(package: Package) -> None:
    """The quick cases are all of float32."""
    options = ["--backend", "my-chip", "--filter", "rms_norm/*", "--filter", "add_rms_norm/*"]
    result = package.run(*PYTHON, "conformance", *options)
    assert result.returncode == 0, result.stdout
    assert "computes in float32, bfloat16 only" in result.stdout


def test_its_workflow_does_what_its_readme_says(package: Package) -> None:
    steps = (package.folder / ".github/workflows/conformance.yml").read_text("utf-8")
    lines = re.findall(r"^      - run: (.*)$", steps, re.M)
    readme = [" ".join(words) for _, words in commands((package.folder / "README.md").read_text())]
    assert set(lines) - set(readme) == {"pip install \"${{ vars.MOGE_HAL || 'moge-hal' }}\""}
    assert len(lines) == 5 and "path: report" in steps


def test_a_fault_makes_its_test_fail(package: Package, tmp_path: Path) -> None:
    """Else the first green run would say nothing."""
    source = (package.folder / "moge_hal_my_chip" / "__init__.py").read_text("utf-8")
    assert source.count(", w, eps)") == 1
    for file in FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text((package.folder / file).read_text("utf-8"), "utf-8")
    (tmp_path / "moge_hal_my_chip" / "__init__.py").write_text(
        source.replace(", w, eps)", ", w, 2 * eps)"), "utf-8"
    )
    wrong = Package(tmp_path, tmp_path)  # the changed module, with the installed entry point
    path = os.pathsep.join([str(tmp_path), str(package.site)])
    result = wrong.run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", PYTHONPATH=path)
    assert result.returncode == 1 and "FAILED on my-chip: rms_norm" in result.stdout


@pytest.mark.parametrize(
    "name", ["a", "x-chip_name", "chip-name-chip_name", "true", "backend", "probe", "c" * LONGEST]
)
def test_what_is_written_is_clean_whatever_the_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruff = pytest.importorskip("ruff") and [sys.executable, "-m", "ruff"]
    folder = new_backend(name, tmp_path)
    module = f"moge_hal_{name.replace('-', '_')}"
    (kind,) = re.findall(r"^class (\w+)", (folder / module / "__init__.py").read_text(), re.M)
    monkeypatch.syspath_prepend(str(folder))
    assert get_backend(f"{module}:{kind}").name == name
    for argv in (["format", "--check"], ["check", "--select", RULES]):
        result = subprocess.run(
            [*ruff, *argv, "--isolated", "--no-cache", "."],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout


def test_its_types_are_clean(package: Package, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    home = Path(moge_hal.__path__[0]).parent
    path = {} if home.name == "site-packages" else {"MYPYPATH": str(home)}
    options = ["--strict", "--follow-imports", "silent", "--cache-dir", str(tmp_path)]
    files = ["moge_hal_my_chip", "tests"]
    result = package.run(sys.executable, "-m", "mypy", *options, *files, **path)
    assert result.stdout == "Success: no issues found in 2 source files\n", result


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("MyChip", "must be lower-case letters and digits"),
        ("my chip", "must be lower-case"),
        ("my--chip", "must be lower-case"),
        ("-chip", "must be lower-case"),
        ("3chip", "must be lower-case"),
        ("chip:1", "must be lower-case"),
        ("../chip", "must be lower-case"),
        ("", "the name '' must be lower-case"),
        ("auto", "has a meaning of its own"),
        ("default", "has a meaning of its own"),
        ("all", "has a meaning of its own"),
        ("class", "is a word of Python"),
        ("c" * (LONGEST + 1), f"is longer than {LONGEST} characters"),
        ("cpu", "is taken by the backend 'cpu' of moge-hal"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        new_backend(name, tmp_path)
    assert words in str(error.value) and "choose another" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["my-chip", "my_chip"])
def test_a_name_is_taken_once_its_package_is_installed(
    name: str, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(package.site))
    with pytest.raises(UserError, match="is taken by the backend 'my-chip' of moge-hal-my-chip"):
        new_backend(name, tmp_path)


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "moge-hal-my-chip"
    folder.mkdir()
    for _ in range(2):  # empty, and not
        with pytest.raises(UserError, match="moge-hal-my-chip exists already"):
            new_backend("my-chip", tmp_path)
        (folder / "mine").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["moge-hal-my-chip", "mine"]


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scaffold._FILES, "z", "no-such-template")
    with pytest.raises(UserError, match="cannot be written"):
        new_backend("my-chip", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        new_backend("my-chip", tmp_path / "file")


def test_every_command_of_the_manual_exists() -> None:
    known = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    used = [words[1:] for _, words in commands(MANUAL) if words[0] == "moge-hal"]
    used += [shlex.split(part) for part in re.findall(r"`moge-hal ([^`]*)`", MANUAL)]
    for name, *options in used:
        known[name].make_context(name, options)  # raises if an option does not exist
    assert {name for name, *_ in used} == {
        "backends",
        "bisect",
        "conformance",
        "generate",
        "matrix",
        "new-backend",
        "verify",
    }


def test_the_commands_of_the_manual_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Package(tmp_path / "moge-hal-mychip", tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(made.site))
    for environment, words in commands(MANUAL):
        if words[0] == "cd":
            monkeypatch.chdir(words[1])
        elif words[0] == "pip":
            made.install()
        elif words[0] == "pytest":
            result = made.run(sys.executable, "-m", *words, "-p", "no:cacheprovider")
            assert result.returncode == 0, result
        elif "--jobs" in words:  # the processes that it starts see what this one saw when it began
            result = made.run(*PYTHON, *words[1:], *SHORTER[words[1]])
            assert result.returncode == 0, result
        else:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                # `verify` accepts no part of the suite.
                whole = words[-2:] == ["--report", "report"]
                told = run(*words[1:], *([] if whole else SHORTER.get(words[1], [])))
            assert told.code == 0, (words, told)
    assert "VERIFIED" in run("verify", "report/report.json", "--draw", 2).out


def test_the_deviations_of_the_manual_are_read(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", MANUAL, re.S)
    (tmp_path / "known.toml").write_text(example, "utf-8")
    known = Deviations.read(tmp_path / "known.toml")
    known.check(["mychip"])
    assert known.match("mychip", "experts/bf16/T17-D40-F24-E15-G3-K6/scale30/value")


def test_the_command_says_what_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("new-backend", "my-chip")
    assert result.code == 0 and "moge-hal-my-chip" in result.out + result.err
    refused(run("new-backend", "my-chip"), "moge-hal-my-chip exists already")
    refused(run("new-backend", "cpu"), "is taken by the backend 'cpu' of moge-hal")
