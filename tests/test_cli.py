"""The command line: every command runs, and says what it says where it should.

Most tests call `main` in this process; what only a process of its own can show (signals, pipes,
what is imported) starts one. What a user gets wrong: `test_cli_errors.py`.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer.main
from commands import PYTHON, TRAIN, Result, run, train

import moge_hal
from moge_hal import cli

COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Result]:
    corpus, out, result = train(tmp_path_factory.mktemp("trained"))
    assert result.code == 0, result
    return corpus, out, result


@pytest.fixture
def corpus(trained: tuple[Path, Path, Result]) -> Path:
    return trained[0]


@pytest.fixture
def model(trained: tuple[Path, Path, Result]) -> Path:
    return trained[1] / "model"


# Help.


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_helps_with_an_example_that_it_accepts(name: str) -> None:
    result = run(name, "--help")
    assert result.code == 0 and result.err == ""
    assert f" {name} [OPTIONS]" in result.out
    example = result.out.rpartition("Example: ")[2].split()
    assert example[:2] == ["moge-hal", name]
    words = shlex.split(str(COMMANDS[name].epilog).partition("[bold]")[2].removesuffix("[/bold]"))
    COMMANDS[name].make_context(name, words[2:])  # parses it: raises if an option is not there


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_the_commands_are_listed(argv: list[str]) -> None:
    result = run(*argv)
    assert all(f" {name} " in result.out + result.err for name in COMMANDS)
    assert {"backends", "generate", "train", "export", "balance"} <= set(COMMANDS)


def test_help_does_not_wait_for_torch() -> None:
    """In a process of its own, by `python -m moge_hal`."""
    code = (
        "import runpy, sys\n"
        "sys.argv = ['moge_hal', '--help']\n"
        "try:\n    runpy.run_module('moge_hal', run_name='__main__')\n"
        "except SystemExit as end:\n    code = end.code\n"
        'sys.exit(f\'{code}, {[m for m in ("torch", "numpy") if m in sys.modules]}\')\n'
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "Run, train, export and judge" in done.stdout
    assert done.stderr.strip() == "0, []"


# backends.


def test_backends_shows_every_backend() -> None:
    lines = run("backends").out.splitlines()
    found = {line.split()[0]: line for line in lines}
    assert {"ascend", "cpu", "cuda", "null", "onnx"} <= set(found)
    assert " ok " in found["cpu"]
    assert all(" ok " in line or " Fix: " in line for line in lines)


def test_backends_as_json() -> None:
    result = run("backends", "--json")
    rows = {row["name"]: row for row in json.loads(result.out)}
    assert result.code == 0 and rows["cpu"]["probe"]["ok"] and rows["null"]["probe"]["ok"]
    for row in rows.values():
        assert row["probe"]["ok"] or (row["probe"]["reason"] and row["probe"]["fix"])


# generate.


def test_generate_prints_prompt_and_text_and_nothing_else(model: Path) -> None:
    result = run("generate", "Call me", "--model", model, "--max-new-tokens", 9, "--report")
    options: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.8, "top_p": 0.95, "seed": 0}
    text = moge_hal.load(model).generate("Call me", **options).text
    assert (result.code, result.out) == (0, f"Call me{text}\n")
    assert "experts" in result.err and "backend" in result.err  # the report
    assert run("generate", "Call me", "--model", model, "--max-new-tokens", 9).err == ""


def test_the_same_seed_writes_the_same_text(model: Path) -> None:
    def text(*options: object) -> str:
        result = run("generate", "A", "--model", model, "--max-new-tokens", 9, *options)
        assert result.code == 0
        return result.out

    assert text("--seed", 5) == text("--seed", 5) != text("--seed", 6)
    assert text("--temperature", 0, "--seed", 5) == text("--temperature", 0, "--seed", 6)
    whole = text("--seed", 5)
    assert text("--seed", 5, "--stop", whole[4:7]) == whole[: whole.index(whole[4:7], 1)] + "\n"


def test_several_prompts_are_written_one_after_the_other(model: Path) -> None:
    argv = ["generate", "One", "Two words", "--model", model, "--max-new-tokens", 5]
    result = run(*argv, "--temperature", 0)
    loaded = moge_hal.load(model)
    one, two = loaded.generate(["One", "Two words"], max_new_tokens=5)
    assert result.out == f"One{one}\n\nTwo words{two}\n\n"


def test_a_prompt_comes_from_a_file_or_from_standard_input(model: Path, tmp_path: Path) -> None:
    prompt = "Für Elise — 爱\nLine two"
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    argv = ["generate", "--model", model, "--max-new-tokens", 5]
    wanted = run(*argv, prompt)
    assert wanted.code == 0 and wanted.out.startswith(prompt)
    assert run(*argv, "--prompt-file", tmp_path / "prompt.txt") == wanted
    assert run(*argv, "--prompt-file", "-", stdin=prompt.encode()) == wanted


def test_what_the_terminal_cannot_show_is_replaced(model: Path) -> None:
    argv = ["generate", "Für 爱", "--model", model, "--max-new-tokens", 2]
    result = run(*argv, encoding="ascii")
    assert result.code == 0 and result.out.startswith("F?r ?")


# train.


def test_train_says_what_came_of_it(trained: tuple[Path, Path, Result]) -> None:
    _, out, result = trained
    assert (result.code, result.out) == (0, "")
    assert "step 2: " in result.err and "step 4: " in result.err
    bits = json.loads((out / "training.json").read_bytes())["validation"]["bits_per_byte"]
    assert f"{bits:.4f} bits per byte of held-out text" in result.err
    assert f'moge-hal generate --model {out / "model"} "Once"' in result.err


def test_train_goes_on_where_it_ended(trained: tuple[Path, Path, Result]) -> None:
    corpus, out, _ = trained
    again = run("train", out, "--corpus", corpus, *TRAIN)
    assert again.code == 0 and "step 4" not in again.err


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_train_is_interrupted_and_goes_on(
    sent: signal.Signals, code: int, model: Path, corpus: Path, tmp_path: Path
) -> None:
    """By Ctrl-C and by SIGKILL, as soon as there is a state to go on from."""
    out = tmp_path / "run"
    argv = ["train", out, "--corpus", corpus, *TRAIN]
    with subprocess.Popen([*PYTHON, *map(str, argv)], stderr=subprocess.PIPE) as process:
        started = time.monotonic()
        while not (out / "state.safetensors").exists() and time.monotonic() < started + 120:
            time.sleep(0.01)
        process.send_signal(sent)
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert not (out / "model").exists()  # it was caught on its way
    assert run(*argv).code == 0
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (out / "model" / name).read_bytes() == (model / name).read_bytes()


# balance.


def test_balance_shows_a_table_and_draws_a_picture(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "balance.png"
    argv = ["balance", "--model", model, "--text", corpus]
    result = run(*argv, "--picture", picture)
    assert result.code == 0 and result.err == ""
    assert result.out.count("MoGE") == result.out.count("top-k") == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(run(*argv, "--json").out)
    assert [row["score"] for row in rows if row["router"] == "MoGE"] == [0, 0, 0]
    assert all(f" {row['score']:.3f} " in result.out for row in rows)


# Pipes.


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_reader_that_goes_away_is_no_stack_trace(model: Path) -> None:
    argv = [*PYTHON, "generate", "Once", "--model", str(model), "--max-new-tokens", "900"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(4) == b"Once"
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode not in (0, None) and said == b""


# The model that comes with the package.


def test_the_shipped_model_writes_and_is_balanced() -> None:
    result = run("generate", "It is a truth", "--max-new-tokens", 20)
    assert result.code == 0 and result.out.startswith("It is a truth")
    assert len(result.out) > len("It is a truth") + 20
    rows = json.loads(run("balance", "--json").out)
    assert [row["score"] for row in rows if row["router"] == "MoGE"] == [0, 0, 0]
    assert max(row["score"] for row in rows if row["router"] == "top-k") > 0.1
