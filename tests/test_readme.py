"""The commands of README.md, read from it and run: what a reader copies works as it stands."""

import shlex
from pathlib import Path

import pytest
import typer.main
from commands import run
from training import write_novel

from moge_hal import cli

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
INDENTED = [line for line in README.splitlines() if line.startswith("    ")]
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
SHORTER = {  # appended to what README.md says
    "backends": "",
    "balance": "",
    "bisect": "",
    "export": "",
    "generate": "--max-new-tokens 4",
    "train": "--corpus novel.txt --rows 1 --length 32",
}
ELSEWHERE = {"conformance", "verify"}  # have tests of their own, and take longer
MANUAL = {"matrix", "new-backend"}  # are shown in backends/README.md, whose commands are run too


def commands() -> list[tuple[dict[str, str], list[str]]]:
    """The environment and the words after `moge-hal` of every command, in their order."""
    found = []
    for line in INDENTED:
        for part in line.split("&&"):
            before, name, after = part.partition("moge-hal ")
            if name:
                environment = dict(word.split("=", 1) for word in before.split())
                found.append((environment, shlex.split(after)))
    return found


def test_there_is_a_command_of_every_kind() -> None:
    assert {words[0] for _, words in commands()} == {*SHORTER, *ELSEWHERE}
    assert set(COMMANDS) == {*SHORTER, *ELSEWHERE, *MANUAL}
    assert [environment for environment, _ in commands() if environment] == [
        {"MOGE_HAL_BACKEND": "cpu"},
        {"MOGE_HAL_BACKEND": "onnx"},
        {"MOGE_HAL_BACKEND": "onnx"},
    ]


@pytest.mark.parametrize("words", [words for _, words in commands()], ids=" ".join)
def test_every_option_exists(words: list[str]) -> None:
    COMMANDS[words[0]].make_context(words[0], words[1:])  # raises if one does not


def test_the_commands_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOGE_HAL_CACHE", str(tmp_path / "cache"))
    write_novel(tmp_path)
    texts = []
    for environment, words in commands():
        if words[0] in ELSEWHERE:
            continue
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            result = run(*words, *SHORTER[words[0]].split())
        assert result.code == 0, (words, result)
        if "Call me Ishmael." in words:
            texts.append(result.out)
    assert len(texts) == 3 and len(set(texts)) == 1  # on cpu, on onnx, and from the exported folder
    assert (tmp_path / "balance.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "exported" / "model.onnx").is_file()
