"""Whatever a user of the command line gets wrong is a sentence and exit code 2."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import PYTHON, TRAIN, Result, refused, run, train


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


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be broken."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


@pytest.mark.parametrize("argv", [["generat"], ["generate", "--sed", "1"], ["train"], ["--seed"]])
def test_a_wrong_command_line_is_no_stack_trace(argv: list[str]) -> None:
    result = run(*argv)
    assert result.code == 2 and result.out == ""
    assert "Error" in result.err and "Traceback" not in result.err


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


def test_train_refuses_the_folder_of_another_run(trained: tuple[Path, Path, Result]) -> None:
    corpus, out, _ = trained
    other = run("train", out, "--corpus", corpus, *TRAIN, "--seed", 2)
    refused(other, "state.safetensors belongs to a run with recipe.seed = 1, not 2")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--preset", "novel"], ["no preset 'novel'", "Did you mean 'novels'"]),
        (["--steps", 0], ["steps = 0 must be at least 1"]),
        (["--rows", 0], ["rows = 0 must be at least 1"]),
        (["--length", 1025], ["length = 1025 must not exceed the context"]),
        (["--rate", -1], ["--rate = -1.0 must be a number above 0"]),
        (["--warmup", 4], ["warmup = 4 must be from 0 to 3 (steps - 1)"]),
        (["--warmup", -1], ["warmup = -1 must be from 0 to 3 (steps - 1)"]),
        (["--preset", "tiny"], ["--preset = 'tiny' has a vocabulary of 259", "263", "novels"]),
        (["--aux", -1], ["--aux = -1.0 must be a number of at least 0"]),
        (["--seed", -1], ["seed = -1 must be from 0"]),
        (["--threads", 0], ["--threads = 0 must be from 1 to "]),
        (["--threads", 100_000], ["--threads = 100000 must be from 1 to "]),
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


# export and balance.


def test_export_refuses_a_folder_that_it_cannot_use(model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    refused(run("export", tmp_path, "--model", model), f"{tmp_path} is not empty")
    refused(run("export", tmp_path / "thesis.txt", "--model", model), "is a file")
    refused(run("export", tmp_path / "thesis.txt" / "x", "--model", model), "cannot be written")
    refused(run("export", tmp_path / "out", "--model", tmp_path / "none"), "does not exist")
    refused(run("export", "/", "--model", model), "/ is not empty: give a new folder")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_export_needs_weights(broken: Path, tmp_path: Path) -> None:
    (broken / "model.safetensors").unlink()
    result = run("export", tmp_path / "out", "--model", broken)
    refused(result, "holds neither model.safetensors nor model.safetensors.index.json")


def test_balance_refuses_what_it_cannot_use(model: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    result = run("balance", "--model", model, "--text", tmp_path / "short.txt")
    refused(result, " tokens; balance needs at least 64")
    result = run("balance", "--model", model, "--text", tmp_path / "none.txt")
    refused(result, "there is no corpus at")
    other = run("balance", "--model", model, "--text", corpus, "--picture", tmp_path / "a.xyz")
    refused(other, "a.xyz must be named .png")
    below = tmp_path / "short.txt" / "b.png"
    result = run("balance", "--model", model, "--text", corpus, "--picture", below)
    assert result.code == 2 and result.err.count("\n") == 1
    assert "b.png cannot be written" in result.err
