"""The command line: every command runs, and whatever a user gets wrong is a sentence.

Most tests call `main` in this process, as the installed script does; what only a process of its own
can show (signals, pipes, bytes that are no text) starts one.
"""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

import moge_hal
from moge_hal import cli
from moge_hal.data import read_corpus
from moge_hal.load import SHIPPED

COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
TRAIN = ["--steps", "4", "--rows", "2", "--length", "32", "--warmup", "1", "--validate-every", "2"]
PYTHON = [sys.executable, "-m", "moge_hal"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(*argv: object, stdin: bytes = b"") -> Result:
    """`moge-hal argv`, in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moge-hal", *map(str, argv)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    texts = []
    for stream in (out, err):
        stream.seek(0)
        texts.append(stream.read())
    return Result(int(ended.value.code or 0), *texts)


def refused(result: Result, *parts: str) -> None:
    """Exit code 2 and one sentence on stderr that says all of `parts`."""
    assert result.code == 2, result
    assert result.out == ""
    assert result.err.startswith("moge-hal: ") and result.err.count("\n") == 1, result.err
    for part in parts:
        assert part in result.err


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "novel.txt"
    path.write_text(read_corpus(SHIPPED / "corpus.jsonl.xz")[0].text[:24_000], "utf-8")
    return path


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run of four steps, made by the command, and what the command said."""
    out = tmp_path_factory.mktemp("trained") / "run"
    return out, run("train", out, "--corpus", corpus, *TRAIN)


@pytest.fixture(scope="module")
def model(trained: tuple[Path, Result]) -> Path:
    out, result = trained
    assert result.code == 0, result
    return out / "model"


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be broken."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


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


@pytest.mark.parametrize("argv", [["generat"], ["generate", "--sed", "1"], ["train"], ["--seed"]])
def test_a_wrong_command_line_is_no_stack_trace(argv: list[str]) -> None:
    result = run(*argv)
    assert result.code == 2 and result.out == ""
    assert "Error" in result.err and "Traceback" not in result.err


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
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    argv = [*PYTHON, "generate", "Für 爱", "--model", str(model), "--max-new-tokens", "2"]
    done = subprocess.run(argv, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith(b"F?r ?"), done


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--max-new-tokens", 0], "max_new_tokens = 0 must be"),
        (["--temperature", -1], "temperature = -1.0 must be"),
        (["--temperature", "nan"], "temperature = nan must be"),
        (["--top-k", 0], "top_k = 0 must be"),
        (["--top-p", 0], "top_p = 0.0 must be"),
        (["--seed", -1], "seed = -1 must be"),
        (["--seed", 2**64], "seed = 18446744073709551616 must be"),
        (["--dtype", "bfloat61"], "no dtype 'bfloat61'; there are"),
        (["--dtype", "int8"], "no dtype 'int8'; there are"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: list[object], sentence: str, model: Path
) -> None:
    refused(run("generate", "A", "--model", model, *options), sentence)


def test_a_misspelt_dtype_is_recognised(model: Path) -> None:
    result = run("generate", "A", "--model", model, "--dtype", "bfloat61")
    refused(result, "Did you mean 'bfloat16'")


@pytest.mark.parametrize("name", ["nosuch", "cpuu", "cuda:99", "cuda:99,ascend:99", "a.b:C", ","])
def test_a_backend_that_cannot_run_is_refused_with_the_table(name: str, model: Path) -> None:
    result = run("generate", "A", "--model", model, "--backend", name)
    assert result.code == 2 and result.out == "" and "Traceback" not in result.err
    assert result.err.startswith("moge-hal: ")
    if name != "a.b:C":
        assert "cpu      ok" in result.err
    if name == "cpuu":
        assert "Did you mean 'cpu'" in result.err
    if name.startswith("cuda"):
        assert result.err.count("cannot run: ") == name.count(":") and " Fix: " in result.err


@pytest.mark.parametrize(
    ("variable", "value", "parts"),
    [
        ("MOGE_HAL_BACKEND", "nosuch", []),
        ("MOGE_HAL_OPS", "expert=default", ["no operation 'expert'", "Did you mean 'experts'"]),
        ("MOGE_HAL_OPS", "experts=cuda", ["'experts=cuda' must read experts=default"]),
        ("MOGE_HAL_STRICT", "yes", ["MOGE_HAL_STRICT = 'yes' must be 0 or 1"]),
    ],
)
@pytest.mark.parametrize("command", ["generate", "train", "balance"])
def test_a_bad_environment_is_refused_by_every_command(
    command: str,
    variable: str,
    value: str,
    parts: list[str],
    model: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    argv: dict[str, list[object]] = {
        "generate": ["A", "--model", model],
        "train": [tmp_path / "run", "--corpus", corpus, *TRAIN],
        "balance": ["--model", model, "--text", corpus],
    }
    result = run(command, *argv[command])
    if parts:
        refused(result, *parts)
    else:
        assert result.code == 2 and "no backend 'nosuch'" in result.err
    assert not (tmp_path / "run").exists()


def test_strict_refuses_a_fallback(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["generate", "A", "--model", model, "--backend", "cpu", "--dtype", "float16"]
    assert run(*argv, "--max-new-tokens", 1).code == 0
    monkeypatch.setenv("MOGE_HAL_STRICT", "1")
    refused(run(*argv), "MOGE_HAL_STRICT: cpu cannot serve linear", "MOGE_HAL_OPS=linear=default")


# Prompts that cannot be used.


def test_one_source_of_prompts_is_needed(model: Path, tmp_path: Path) -> None:
    refused(run("generate", "--model", model), "give a prompt")
    refused(run("generate", "A", "--prompt-file", "-", "--model", model), "give a prompt")


def test_a_prompt_beyond_the_context_is_refused(model: Path) -> None:
    result = run("generate", "word " * 1500, "--model", model)
    refused(result, "the prompt has ", "context of 1024", "shorten the prompt")


def test_a_prompt_file_that_cannot_be_used_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    argv = ["generate", "--model", model, "--prompt-file"]
    refused(run(*argv, tmp_path / "latin1.txt"), "latin1.txt is not UTF-8 at byte 3; convert it")
    refused(run(*argv, "-", stdin=b"\xff"), "is not UTF-8 at byte 0")
    refused(run(*argv, tmp_path / "none.txt"), "none.txt cannot be read: No such file")
    refused(run(*argv, tmp_path), "cannot be read: Is a directory")


def test_an_argument_that_is_not_utf8_is_refused(model: Path) -> None:
    """Bytes reach a process as they are; Python carries them as lone surrogates."""
    done = subprocess.run(
        [*PYTHON, "generate", b"caf\xe9", "--model", str(model)], capture_output=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"moge-hal: the prompt is not UTF-8") and b"\n" in done.stderr


# Models that cannot be used.


def test_a_model_that_is_not_there_is_refused(model: Path, tmp_path: Path) -> None:
    refused(run("generate", "A", "--model", tmp_path / "none"), "none does not exist")
    refused(run("generate", "A", "--model", tmp_path), "has no config.json")
    refused(run("generate", "A", "--model", model / "config.json"), "is a file")


@pytest.mark.parametrize("left", [0, 5, 1000, -1])
def test_weights_that_are_cut_short_are_refused(left: int, broken: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    refused(run("generate", "A", "--model", broken), "model.safetensors is damaged or cut short")


def test_weights_that_are_no_safetensors_are_refused(broken: Path) -> None:
    (broken / "model.safetensors").write_bytes(b"\x80\x04pickled" * 1000)
    refused(run("generate", "A", "--model", broken), "model.safetensors is damaged or cut short")
    (broken / "model.safetensors").unlink()
    refused(run("generate", "A", "--model", broken), "only safetensors are read")


@pytest.mark.parametrize(
    ("field", "value", "parts"),
    [
        ("num_experts", 25, ["num_experts = 25 must be a multiple of num_groups = 4"]),
        ("num_experts", "many", ["num_experts = 'many' must be a whole number"]),
        ("head_dim", 31, ["head_dim = 31 must be even"]),
        ("hidden_act", "gelu", ["hidden_act = 'gelu' must be 'silu'"]),
        ("hidden_size", 64, ["has shape", "config.json"]),
        ("num_hidden_layers", 5, ["lacks tensor", "mend config.json"]),
        ("vocab_size", 100, ["take the tokenizer of this model"]),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    field: str, value: object, parts: list[str], broken: Path
) -> None:
    config = json.loads((broken / "config.json").read_bytes())
    (broken / "config.json").write_text(json.dumps({**config, field: value}))
    refused(run("generate", "A", "--model", broken), str(broken), *parts)


def test_a_configuration_that_is_no_json_is_refused(broken: Path) -> None:
    (broken / "config.json").write_text('{"vocab_size": ')
    refused(run("generate", "A", "--model", broken), "config.json cannot be read as JSON")


def test_a_model_without_tokenizer_is_refused(broken: Path, corpus: Path) -> None:
    (broken / "tokenizer.json").unlink()
    refused(run("generate", "A", "--model", broken), "the model has no tokenizer")
    refused(run("balance", "--model", broken, "--text", corpus), "broken has no tokenizer")


# train.


def test_train_says_what_came_of_it(trained: tuple[Path, Result]) -> None:
    out, result = trained
    assert (result.code, result.out) == (0, "")
    assert "step 2: " in result.err and "step 4: " in result.err
    bits = json.loads((out / "training.json").read_bytes())["validation"]["bits_per_byte"]
    assert f"{bits:.4f} bits per byte of held-out text" in result.err
    assert f'moge-hal generate --model {out / "model"} "Once"' in result.err


def test_train_goes_on_and_refuses_another_run(
    trained: tuple[Path, Result], corpus: Path, tmp_path: Path
) -> None:
    out, _ = trained
    again = run("train", out, "--corpus", corpus, *TRAIN)
    assert again.code == 0 and "step 4" not in again.err
    other = run("train", out, "--corpus", corpus, *TRAIN, "--seed", 2)
    refused(other, "state.safetensors belongs to a run with recipe.seed = 1, not 2")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--preset", "novel"], ["no preset 'novel'", "Did you mean 'novels'"]),
        (["--steps", 0], ["steps = 0 must be at least 1"]),
        (["--rows", 0], ["rows = 0 must be at least 1"]),
        (["--length", 1025], ["length = 1025 must not exceed the context"]),
        (["--rate", 0], ["peak = 0.0 must be above 0"]),
        (["--warmup", 4], ["warmup = 4 must be below the number of steps"]),
        (["--aux", -1], ["router_aux_loss_coef = -1.0 must not be negative"]),
        (["--seed", -1], ["seed = -1 must be from 0"]),
        (["--threads", 0], ["threads = 0 must be at least 1"]),
        (["--validate-every", 0], ["validate_every = 0 must be at least 1"]),
        (["--backend", "onnx"], ["onnx"]),
    ],
)
def test_train_refuses_what_makes_no_sense(
    options: list[object], parts: list[str], corpus: Path, tmp_path: Path
) -> None:
    result = run("train", tmp_path / "run", "--corpus", corpus, *TRAIN, *options)
    if options == ["--backend", "onnx"]:  # where it cannot run at all there is a table
        assert result.code == 2 and "Traceback" not in result.err and "onnx" in result.err
    else:
        refused(result, *parts)
    assert not (tmp_path / "run").exists()


def test_train_refuses_folders_and_texts_that_it_cannot_use(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9\n")
    out = tmp_path / "out"
    refused(run("train", tmp_path / "full", "--corpus", corpus), "full is not empty")
    refused(run("train", tmp_path / "empty.txt", "--corpus", corpus), "is a file")
    refused(run("train", tmp_path / "empty.txt" / "x", "--corpus", corpus), "cannot be made")
    refused(run("train", out, "--corpus", tmp_path / "empty.txt"), "holds no text")
    refused(run("train", out, "--corpus", tmp_path / "latin1.txt"), "is not UTF-8 at byte 3")
    refused(run("train", out, "--corpus", tmp_path / "none"), "there is no corpus at")


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


# export: what it writes is judged in its own tests.


def test_export_refuses_a_folder_that_it_cannot_use(model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    refused(run("export", tmp_path, "--model", model), f"{tmp_path} is not empty")
    refused(run("export", tmp_path / "thesis.txt", "--model", model), "is a file")
    refused(run("export", tmp_path / "thesis.txt" / "x", "--model", model), "cannot be written")
    refused(run("export", tmp_path / "out", "--model", tmp_path / "none"), "does not exist")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


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


def test_balance_refuses_what_it_cannot_use(model: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    result = run("balance", "--model", model, "--text", tmp_path / "short.txt")
    refused(result, " tokens; balance needs at least 64")
    result = run("balance", "--model", model, "--text", tmp_path / "none.txt")
    refused(result, "there is no corpus at")
    below = tmp_path / "short.txt" / "b.png"
    result = run("balance", "--model", model, "--text", corpus, "--picture", below)
    assert result.code == 2 and result.err.count("\n") == 1
    assert "b.png cannot be written" in result.err


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
