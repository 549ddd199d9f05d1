"""Training: it learns, says what it did, and each part of a step is what it claims to be."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from training import CONFIG, FILES, RECIPE, contents, go, transformer, write_novel

import moge_hal
from moge_hal.backends.cpu import CpuBackend
from moge_hal.bind import bind
from moge_hal.config import Config
from moge_hal.errors import UserError
from moge_hal.training.data import Packed
from moge_hal.training.init import initial_weights
from moge_hal.training.log import read_log
from moge_hal.training.train import Recipe, Validation, _optimizer, _step, train, validate


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_novel(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    go(out, corpus)
    return out


def test_training_lowers_bits_per_byte_of_held_out_text(finished: Path) -> None:
    log = read_log(finished / "log.jsonl", RECIPE.steps)
    assert [record["step"] for record in log] == [5, 10, 15, 20]
    assert log[-1]["bits_per_byte"] < log[0]["bits_per_byte"] - 0.2
    # 300 equally likely tokens, at the text's own number of tokens a byte.
    uniform = log[0]["bits_per_byte"] / log[0]["loss"] * math.log(300)
    assert log[-1]["bits_per_byte"] < 0.8 * uniform
    assert log[-1]["train_loss"] < log[0]["train_loss"]
    assert [record["rate"] for record in log] == [RECIPE.rate(s - 1) for s in (5, 10, 15, 20)]


def test_the_folder_holds_what_the_manual_says(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == FILES
    said = json.loads((finished / "training.json").read_bytes())
    held_out = said["validation"]
    last = read_log(finished / "log.jsonl", RECIPE.steps)[-1]
    # The log is made under autocast, the summary in float32.
    assert held_out["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-2)
    assert said["trained_tokens"] == 20 * 2 * 32 and said["tokens_per_second"] > 0
    weights = moge_hal.load(finished / "model", "cpu").weights
    assert said["parameters"][0] == sum(weights[name].numel() for name in weights)
    png = (finished / "curve.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


def test_the_observer_sees_every_step_and_the_validations(corpus: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, float, Validation | None]] = []
    recipe = replace(RECIPE, steps=7)
    last = go(tmp_path, corpus, recipe, observe=lambda *call: seen.append(call))
    assert [step for step, _, _ in seen] == list(range(1, 8))
    assert [step for step, _, validation in seen if validation is not None] == [5, 7]
    # What the log calls the loss on training text is the mean since the last validation.
    log = read_log(tmp_path / "log.jsonl", 7)
    losses = [loss for _, loss, _ in seen]
    assert log[0]["train_loss"] == pytest.approx(sum(losses[:5]) / 5)
    assert log[1]["train_loss"] == pytest.approx(sum(losses[5:]) / 2)
    assert last.step == 7


def test_the_saved_model_is_the_trained_one(finished: Path) -> None:
    state = load_file(finished / "state.safetensors")
    rounded = {
        name.removeprefix("weight."): tensor.bfloat16()
        for name, tensor in state.items()
        if name.startswith("weight.")
    }
    loaded = moge_hal.load(finished / "model", "cpu")
    trained = bind(loaded.config, rounded, CpuBackend())
    assert loaded.tokenizer is not None
    ids = [loaded.tokenizer.encode("It was a dark and stormy night.")]
    assert torch.equal(loaded(ids), trained(ids))
    untrained = bind(loaded.config, initial_weights(loaded.config, 1), CpuBackend())
    assert (loaded(ids) - untrained(ids)).abs().max() > 0.1


# Input that cannot be used.


def test_a_foreign_folder_is_refused_and_left_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / ".log.jsonl.0123abcd").write_text("a leftover, were this the folder of a run")
    (tmp_path / "thesis.txt").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"is not empty and holds no state\.safetensors"):
        go(tmp_path, corpus)
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="is a file; name a new folder"):
        go(tmp_path / "file", corpus)
    with pytest.raises(UserError, match=r"cannot be made \(Not a directory\)"):
        go(tmp_path / "file" / "below", corpus)


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("c.txt", b"", "holds no text"),
        ("c.txt", b" \n \n", "holds no text"),
        ("c.txt", b"caf\xe9\nau lait\n", "is not UTF-8 at byte 3"),
        ("c.txt", b"One paragraph.\n", "too short to hold any text out"),
        (
            "c.txt",
            b"Two.\nParagraphs.\n",
            "the text is too short: [0-9]+ tokens, and a row takes 33",
        ),
        ("c.jsonl", b'{"text": 5}\n', 'needs an object with a non-empty "text"'),
        ("c.doc", b"words", "rename or convert it"),
        ("none.txt", None, "there is no corpus at"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_refused(
    name: str, data: bytes | None, sentence: str, tmp_path: Path
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        go(tmp_path / "run", tmp_path / name)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("rows", 0),
        ("length", 1),
        ("peak", 0.0),
        ("peak", math.nan),
        ("warmup", 20),
        ("warmup", -1),
        ("final", 1.1),
        ("decay", -0.1),
        ("clip", 0.0),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_a_recipe_says_what_is_wrong(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{field} = .* must be "):
        replace(RECIPE, **{field: value})


def test_rows_longer_than_the_context_are_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"length = 641 must not exceed the context of .* 640"):
        go(tmp_path / "run", corpus, replace(RECIPE, length=641))


@pytest.mark.parametrize("every", [0, -5])
def test_validate_every_must_be_positive(every: int, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"validate_every = {every} must be at least 1"):
        go(tmp_path / "run", corpus, validate_every=every)


def test_a_loss_that_is_no_number_ends_the_run(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss is (nan|inf); start again with a lower"):
        go(tmp_path / "run", corpus, replace(RECIPE, peak=1e30))


def test_strict_applies_to_training(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOGE_HAL_STRICT", "1")
    with pytest.raises(UserError, match="MOGE_HAL_STRICT: cpu cannot serve"):
        go(tmp_path / "run", corpus)


# What a step does.


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_the_learning_rate_rises_and_falls(warmup: int) -> None:
    recipe = Recipe(steps=40, warmup=warmup, peak=0.5, final=0.1)
    rates = [recipe.rate(step) for step in range(40)]
    assert rates[:warmup] == pytest.approx([0.5 * (n + 1) / warmup for n in range(warmup)])
    assert max(rates) == rates[warmup] == pytest.approx(0.5)
    falling = rates[warmup:]
    assert all(a > b for a, b in pairwise(falling))
    assert falling[-1] == pytest.approx(0.05)
    # Half way down the cosine is the mean of both ends.
    assert Recipe(steps=41, warmup=0, peak=0.5, final=0.1).rate(20) == pytest.approx(0.275)
    assert Recipe(steps=1, warmup=0).rate(0) == Recipe().peak


def tokens_of(config: Config, rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (rows, length), generator=generator)


def test_the_gradient_is_that_of_the_loss_and_the_balance() -> None:
    """Against the definition, in plain torch and with counts made one by one."""
    config = replace(CONFIG, router_aux_loss_coef=3.0, num_hidden_layers=2)
    recipe = replace(RECIPE, autocast=False, clip=1e9)
    ids = tokens_of(config, 2, 9)
    x, y = ids[:, :-1], ids[:, 1:]

    trained = transformer(config)
    loss = _step(trained, _optimizer(trained.parameters(), recipe), x, y, recipe)

    other = transformer(config)
    out = other(x, torch.arange(8).expand(2, 8), None)
    picked = out.logits.log_softmax(-1).gather(-1, y[..., None])
    aux = torch.zeros(())
    for layer in range(2):
        counts = torch.zeros(config.num_experts)
        for expert in out.routes[layer].flatten().tolist():
            counts[expert] += 1
        fractions = counts * config.num_experts / counts.sum()
        assert out.router_logits is not None
        aux = aux + (fractions * out.router_logits[layer].softmax(-1).mean(0)).sum() / 2
    (-picked.mean() + 3.0 * aux).backward()
    assert loss == pytest.approx(-picked.mean().item(), rel=1e-5)

    without = transformer(replace(config, router_aux_loss_coef=0.0))
    _step(without, _optimizer(without.parameters(), recipe), x, y, recipe)
    for (name, p), q, r in zip(
        trained.named_parameters(), other.parameters(), without.parameters(), strict=True
    ):
        assert p.grad is not None and q.grad is not None and r.grad is not None
        scale = q.grad.abs().max()
        assert (p.grad - q.grad).abs().max() <= 1e-4 * scale, name
        if name.endswith("gate.weight"):
            assert (r.grad - q.grad).abs().max() > 0.5 * scale, "the balance is not felt"


def test_the_auxiliary_loss_evens_out_the_experts(corpus: Path, tmp_path: Path) -> None:
    without, with_it = (
        go(tmp_path / f"{aux}", corpus, config=replace(CONFIG, router_aux_loss_coef=aux))
        for aux in (0.0, 10.0)
    )
    # The busiest of 15 experts, of which a token takes 6, can have 2.5 times the mean at most.
    assert with_it.busiest < without.busiest - 0.4
    assert with_it.idlest > without.idlest + 0.2


def test_vectors_do_not_decay() -> None:
    model = transformer()
    recipe = replace(RECIPE, decay=0.5)
    optimizer = _optimizer(model.parameters(), recipe)
    before = {}
    for name, p in model.named_parameters():
        with torch.no_grad():
            p.fill_(1.0)
        before[name] = p.detach().clone()
        p.grad = torch.zeros_like(p)
    optimizer.step()
    shrunk = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert shrunk == {name for name, p in model.named_parameters() if p.dim() > 1}
    assert model.lm_head.weight[0, 0].item() == pytest.approx(1 - 0.5 * RECIPE.peak)


def test_the_gradient_is_clipped() -> None:
    model, ids = transformer(), tokens_of(CONFIG, 2, 9)
    recipe = replace(RECIPE, clip=1e-3)
    _step(model, _optimizer(model.parameters(), recipe), ids[:, :-1], ids[:, 1:], recipe)
    norm = math.sqrt(
        sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None)
    )
    assert norm == pytest.approx(1e-3, rel=1e-2)


# What a validation covers.


@pytest.mark.parametrize("count", [2, 8, 9, 32, 33, 34, 40, 41, 65, 100])
def test_validation_covers_all_tokens_but_part_of_a_window(count: int) -> None:
    recipe = Recipe(rows=4, length=8, autocast=False)
    tokens = np.arange(count, dtype=np.uint16) % 300  # each token tells its place
    model = transformer()
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, args: seen.extend(args[0].flatten().tolist()))
    validation = validate(model, Packed(tokens, 2 * count), recipe, 5)
    # The last token is a target only.
    assert seen == list(range(len(seen)))
    assert 0 <= count - 1 - len(seen) < 8
    assert validation.step == 5
    layers = torch.tensor(validation.load)
    assert layers.shape == (CONFIG.num_hidden_layers, CONFIG.num_experts)
    assert layers.mean(1).tolist() == pytest.approx([1.0], abs=1e-3)
    assert validation.busiest == pytest.approx(layers.amax(1).mean().item(), abs=1e-3)
    assert validation.idlest == pytest.approx(layers.min().item(), abs=1e-3)


def test_a_model_that_knows_nothing_has_the_loss_of_dice() -> None:
    weights = initial_weights(CONFIG, 1)
    weights["lm_head.weight"].zero_()
    text = Packed(np.arange(100, dtype=np.uint16), 250)
    validation = validate(transformer(weights=weights), text, RECIPE, 1)
    assert validation.loss == pytest.approx(math.log(300), rel=1e-5)
    assert validation.bits_per_byte == pytest.approx(math.log2(300) * 100 / 250, rel=1e-5)


def test_the_loss_is_that_of_the_next_token() -> None:
    model, ids = transformer(), tokens_of(CONFIG, 1, 25)[0]
    recipe = Recipe(rows=2, length=8, autocast=False)
    text = Packed(ids.numpy().astype(np.uint16), 30)
    windows = ids[:-1].view(3, 8)
    with torch.no_grad():
        logits = model(windows, torch.arange(8).expand(3, 8), None).logits
    wanted = F.cross_entropy(logits.double().flatten(0, 1), ids[1:]).item()
    assert validate(model, text, recipe, 1).loss == pytest.approx(wanted, rel=1e-5)


def test_a_model_that_memory_cannot_hold_is_refused_before_it_is_made(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, num_hidden_layers=1)
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    with pytest.raises(UserError, match=r"parameters takes .* GiB, but this machine has 0\.0 GiB"):
        train(tmp_path / "run", config, RECIPE, CpuBackend(), corpus)
    assert not (tmp_path / "run").exists()
