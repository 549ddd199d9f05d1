"""A run that is killed anywhere ends as if it had not been, in every bit, and no run takes up the
state of another.

The kills are real: a forked child ends itself by SIGKILL at a chosen step, or at a chosen fsync,
which is between a file's last byte and its final name.
"""

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import CONFIG, FILES, RECIPE, contents, go, transformer, write_novel

from moge_hal.backend import Backend
from moge_hal.errors import UserError
from moge_hal.training.state import load_state
from moge_hal.training.train import Validation, _optimizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_novel(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    go(out, corpus)
    return out


def run_and_die(out: Path, corpus: Path, step: int, fsync: int) -> None:
    """In a child: trains on, and dies after `step` or at the fsync of that number."""
    os_fsync, left = os.fsync, [fsync]

    def dying_fsync(descriptor: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        os_fsync(descriptor)

    def observe(done: int, loss: float, validation: Validation | None) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = dying_fsync  # type: ignore[assignment]
    go(out, corpus, observe=observe)


def in_child(out: Path, corpus: Path, step: int = 0, fsync: int = 0) -> bool:
    """Whether the run came to its end."""
    child = multiprocessing.get_context("fork").Process(
        target=run_and_die, args=(out, corpus, step, fsync)
    )
    child.start()
    child.join(60)
    assert child.exitcode in (0, -signal.SIGKILL), f"a run ended by itself: {child.exitcode}"
    return child.exitcode == 0


def assert_same_run(out: Path, finished: Path) -> None:
    found, wanted = contents(out), contents(finished)
    assert found.keys() == wanted.keys()  # so nothing is left over either
    # The state's header may list its entries in another order, and a summary tells its speed.
    differ = {name for name in wanted if found[name] != wanted[name]}
    assert differ <= {"state.safetensors", "training.json"}
    states = [load_file(folder / "state.safetensors") for folder in (out, finished)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        assert torch.equal(states[0][name].view(torch.int32), tensor.view(torch.int32)), name
    said, other = (json.loads(files["training.json"]) for files in (found, wanted))
    for summary in (said, other):
        del summary["tokens_per_second"]
    assert said == other


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@needs_fork
def test_killed_at_steps_all_over_the_run(finished: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for step in (1, 7, 10, 11, 14, 19, 20):
        assert not in_child(out, corpus, step=step)
    assert in_child(out, corpus)
    assert_same_run(out, finished)


@needs_fork
def test_killed_in_every_write(finished: Path, corpus: Path, tmp_path: Path) -> None:
    """A write is two fsyncs, of the file and of the folder. Each number is the fsync at which one
    more child dies, counted from where the one before left the run.
    """
    out = tmp_path / "run"
    half_written: set[str] = set()
    # First log, first state; a later state; the end: curve, model, summary.
    for fsync in (1, 2, 3, 4, 7, 9, 2, 3, 6, 8, 3, 4):
        assert not in_child(out, corpus, fsync=fsync)
        half_written |= {path.stem.removeprefix(".") for path in out.glob(".*")}
    assert half_written == FILES
    assert in_child(out, corpus)
    assert_same_run(out, finished)


def test_a_finished_run_started_again_changes_nothing(
    finished: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = contents(out)
    seen: list[int] = []
    again = go(out, corpus, observe=lambda step, loss, validation: seen.append(step))
    assert seen == [] and contents(out) == before
    assert asdict(again) == json.loads(before["training.json"])["validation"]
    for name in ("model", "curve.png", "training.json"):  # what is missing, comes back
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    go(out, corpus)
    assert_same_run(out, finished)
    (out / "log.jsonl").unlink()
    go(out, corpus)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": replace(RECIPE, seed=2)}, "recipe.seed = 1, not 2"),
        ({"recipe": replace(RECIPE, steps=21)}, "recipe.steps = 20, not 21"),
        (
            {"config": replace(CONFIG, router_aux_loss_coef=0.5)},
            "config.router_aux_loss_coef = 0.001, not 0.5",
        ),
        ({"backend": Backend()}, "backend = 'cpu', not 'default'"),
    ],
)
def test_the_state_of_another_run_is_refused(
    change: dict[str, Any], named: str, finished: Path, corpus: Path
) -> None:
    before = contents(finished)
    with pytest.raises(UserError, match=named) as error:
        go(finished, corpus, **change)
    assert str(error.value).count(", not ") == 1  # it names what differs and nothing else
    assert contents(finished) == before


def test_the_state_of_another_corpus_is_refused(
    finished: Path, corpus: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(corpus.read_text("utf-8").replace(" the ", " that "), "utf-8")
    with pytest.raises(UserError, match=r"belongs to a run with .*corpus = '[0-9a-f]{64}', not"):
        go(finished, other)


def test_the_state_of_other_threads_or_operations_is_refused(
    finished: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOGE_HAL_OPS", "experts=default")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    named = "backend = 'cpu', not 'cpu experts=default', threads = 1, not 2;"
    with pytest.raises(UserError, match=named):
        go(finished, corpus)


@pytest.mark.parametrize("damage", [0, 7, 1000, -1, "zeros", "text"])
def test_a_damaged_state_is_refused(
    damage: int | str, finished: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    state = (out / "state.safetensors").read_bytes()
    damaged = {"zeros": bytes(len(state)), "text": b"step 20\n" * 100}
    (out / "state.safetensors").write_bytes(
        state[:damage] if isinstance(damage, int) else damaged[damage]
    )
    with pytest.raises(UserError, match=r"state\.safetensors is no whole training state .* remove"):
        go(out, corpus)


def test_no_damage_to_the_header_is_a_stack_trace(finished: Path, tmp_path: Path) -> None:
    """Every 23rd byte of the header is replaced by a digit: a sentence, or no harm."""
    path = tmp_path / "state.safetensors"
    data = (finished / "state.safetensors").read_bytes()
    identity = json.loads((finished / "training.json").read_bytes())["identity"]
    config = replace(CONFIG, vocab_size=identity["config"]["vocab_size"])
    parameters = dict(transformer(config).named_parameters())
    length = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for place in range(8, length, 23):
        path.write_bytes(data[:place] + b"1" + data[place + 1 :])
        optimizer = _optimizer(parameters.values(), RECIPE)
        try:
            load_state(path, parameters, optimizer, identity)
        except UserError:
            refused += 1
    assert refused > length / 23 / 2
    path.write_bytes(data)
    assert load_state(path, parameters, _optimizer(parameters.values(), RECIPE), identity) == 20


def test_a_damaged_log_is_refused(finished: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    with (out / "log.jsonl").open("ab") as file:
        file.write(b'{"train_loss": 4.')
    with pytest.raises(UserError, match=r"log\.jsonl is damaged .* remove it"):
        go(out, corpus)
