"""From a folder to a model: a released folder loads as it is, every fault has its sentence."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moge_hal import Backend, Config, Model, UserError, load, preset, save
from moge_hal.bind import bind
from moge_hal.checkpoint import Checkpoint
from moge_hal.generate import tokens
from moge_hal.tokenizer import Tokenizer
from moge_hal.training.bpe import train_bpe
from moge_hal.training.init import initial_weights

TINY = preset("tiny")
PLAIN = "moge_hal.backend:Backend"
ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"
IDS = torch.arange(24).view(2, 12) * 7 % TINY.vocab_size


def model_of(config: Config, seed: int = 0) -> Model:
    return bind(config, initial_weights(config, seed), Backend())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(model_of(TINY), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save(model_of(TINY), tmp_path / "model", max_shard_bytes=100_000)
    return tmp_path / "model"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / ONE)
    change(tensors)
    save_file(tensors, folder / ONE)


# What loads


def test_mixed_dtypes_lose_nothing(saved: Path) -> None:
    name = "model.layers.0.mlp.experts.{}.down_proj.weight"

    def narrow(tensors: dict[str, Tensor]) -> None:
        tensors[name.format(0)] = tensors[name.format(0)].bfloat16()
        tensors[name.format(4)] = tensors[name.format(4)].half()

    rewrite(saved, narrow)
    down = initial_weights(TINY, 0)["layers.0.mlp.experts.down"]
    read = Checkpoint(saved, TINY)["layers.0.mlp.experts.down"]
    assert torch.equal(read[5], down[5])
    assert torch.equal(read[0], down[0].bfloat16().float())
    assert torch.equal(read[4], down[4].half().float())


def test_flat_router_scale(saved: Path) -> None:
    name = "model.layers.1.mlp.router_scale"
    rewrite(saved, lambda tensors: tensors.update({name: tensors[name].flatten()}))
    assert torch.equal(load(saved, PLAIN)(IDS), model_of(TINY)(IDS))


def test_config_of_a_release(tmp_path: Path) -> None:
    """No num_groups, no head_dim, fields of another library: loads as it is."""
    config = preset("tiny", num_experts_per_tok=3, num_attention_heads=4, head_dim=10)
    save(model_of(config), tmp_path / "model")
    fields = json.loads((tmp_path / "model/config.json").read_text())
    del fields["num_groups"], fields["head_dim"]
    fields |= {
        "transformers_version": "4.48.2",
        "auto_map": {"AutoModel": "x.Y"},
        "use_cache": True,
    }
    fields |= {"attention_bias": True, "sliding_window": None, "num_expert_groups": 8}
    (tmp_path / "model/config.json").write_text(json.dumps(fields))
    loaded = load(tmp_path / "model", PLAIN)
    assert loaded.config == config
    assert torch.equal(loaded(IDS), model_of(config)(IDS))


# What load refuses, in one sentence


def sentence(folder: Path | str, *parts: str) -> None:
    """`load` fails with a `UserError` of one line that holds every part."""
    with pytest.raises(UserError) as caught:
        load(folder, PLAIN)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


DOWN = "model.layers.1.mlp.experts.14.down_proj.weight"
FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], list[str]]] = {
    "missing": (lambda t: t.pop(DOWN), [ONE, "lacks", DOWN, "[40, 24]"]),
    "several missing": (
        lambda t: [t.pop(DOWN), t.pop("lm_head.weight")],
        [DOWN, "and 1 more"],
    ),
    "unexpected": (
        lambda t: t.update({"model.layers.0.self_attn.k_proj.kv_cache_scale": torch.ones(16)}),
        [ONE, "unexpected", "model.layers.0.self_attn.k_proj.kv_cache_scale", "[16]"],
    ),
    "misshapen": (
        lambda t: t.update({DOWN: torch.ones(24, 40)}),
        [ONE, DOWN, "[24, 40]", "[40, 24]"],
    ),
    "flat where it must not be": (
        lambda t: t.update({DOWN: torch.ones(40 * 24)}),
        [DOWN, "[960]", "[40, 24]"],
    ),
    "integers": (
        lambda t: t.update({DOWN: torch.ones(40, 24, dtype=torch.int8)}),
        [ONE, DOWN, "I8", "BF16"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_tensor_is_named(saved: Path, fault: str) -> None:
    change, parts = FAULTS[fault]
    rewrite(saved, change)
    sentence(saved, str(saved), *parts)


def test_cut_short_at_any_byte(saved: Path) -> None:
    whole = (saved / ONE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for cut in (0, 5, 8, 9, header // 2, header - 1, header, header + 1, len(whole) - 1):
        (saved / ONE).write_bytes(whole[:cut])
        sentence(saved, str(saved / ONE), "damaged or cut short", "restore it")


@pytest.mark.parametrize("content", [b"\xff" * 99, b"version https://git-lfs...\n" * 5, b"{}" * 9])
def test_not_safetensors(saved: Path, content: bytes) -> None:
    (saved / ONE).write_bytes(content)
    sentence(saved, str(saved / ONE), "damaged")


def test_cut_short_after_it_was_opened(saved: Path) -> None:
    weights = load(saved, PLAIN).weights
    (saved / ONE).write_bytes((saved / ONE).read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged or cut short"):
        list(weights.values())


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.unlink()
    sentence(sharded, str(shard), "is missing")


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_wrong_index(sharded: Path) -> None:
    first, second = sorted(file.name for file in sharded.glob("*.safetensors"))[:2]
    name = next(iter(load_file(sharded / first)))
    edit_index(sharded, lambda index: index["weight_map"].update({name: second}))
    sentence(sharded, INDEX, repr(name), second, "lacks")
    edit_index(sharded, lambda index: index["weight_map"].pop(name))
    sentence(sharded, INDEX, "lacks", repr(name))
    outside = f"../{first}"
    edit_index(sharded, lambda index: index["weight_map"].update({name: outside}))
    sentence(sharded, INDEX, repr(outside), "same folder")
    edit_index(sharded, lambda index: index["weight_map"].update({name: ""}))
    sentence(sharded, INDEX, "same folder, not ''")
    edit_index(sharded, lambda index: index.pop("weight_map"))
    sentence(sharded, INDEX, "weight_map")
    (sharded / INDEX).write_text("{")
    sentence(sharded, INDEX, "damaged")
    (sharded / INDEX).unlink()
    sentence(sharded, ONE, INDEX, "only safetensors")


def test_no_model(saved: Path, tmp_path: Path) -> None:
    sentence(tmp_path / "nowhere", str(tmp_path / "nowhere"), "does not exist")
    sentence(saved / ONE, str(saved / ONE), "is a file")
    (saved / "config.json").unlink()
    sentence(saved, "no config.json")


def test_shipped_model_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("moge_hal.loading")
    monkeypatch.setattr(module, "SHIPPED", tmp_path / "gone")
    with pytest.raises(UserError, match=r"shipped model is not in .*gone"):
        load()


# Tokenizers and backends


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["it was the best of times, it was the worst of times"], 270)


def test_tokenizer_travels_along(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = model_of(preset("tiny", vocab_size=270, bos_token_id=None))
    model.tokenizer = tokenizer
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", PLAIN)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("the times") == tokenizer.encode("the times")
    # The preset says that 2 ends a text; this tokenizer says otherwise, and it was the one in use.
    assert tokenizer.eos_id != 2
    assert (loaded.tokenizer.bos_id, loaded.tokenizer.eos_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
    )
    assert loaded.config.eos_token_id == tokenizer.eos_id


def test_tokenizer_of_another_model(saved: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(saved)
    sentence(saved, f"up to {tokenizer.vocab_size - 1},", "vocab_size of 259")


def test_no_token_beyond_the_tokenizer_is_drawn(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The rows of padded embeddings are never trained; here they would win every draw."""
    config = preset("tiny", vocab_size=tokenizer.vocab_size + 9)
    weights = initial_weights(config, 0)
    head = weights["lm_head.weight"]
    head[-9:] = 9 * head[:9]  # one of each pair or the other is larger, most often the padding's
    model = bind(config, weights, Backend())
    model.tokenizer = tokenizer
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", PLAIN)
    logits = loaded([tokenizer.encode("the times")])[0, -1]
    assert int(logits.argmax()) >= tokenizer.vocab_size
    for temperature in (0.0, 5.0):
        done = loaded.generate("the times", max_new_tokens=20, temperature=temperature)
        assert max(done.ids) < tokenizer.vocab_size


def test_arguments_of_no_use_from_python(saved: Path, tokenizer: Tokenizer) -> None:
    model = load(saved, PLAIN)
    model.tokenizer = tokenizer
    calls: list[tuple[Callable[[Any], object], object, str]] = [
        (load, 3, "path = 3 must be"),
        (lambda value: load(saved, value), 3, "backend = 3 must be a name"),
        (lambda value: load(saved, value), 0, "backend = 0 must be a name"),
        (model, None, "input_ids must be rows of ids"),
        (model, [[]], r"must have shape \[B, S\], not \[1, 0\], and no size 0"),
        (model, torch.ones(1, 2, dtype=torch.complex64), "must be whole numbers"),
        (model.new_cache, "2", "batch = '2' must be a whole number"),
        (lambda value: model.new_cache(1, value), 2.5, "capacity = 2.5 must be a whole number"),
        (lambda value: tokens(model, value), 3, "prompts must be a list of lists of ids"),
        (lambda value: tokens(model, value), [3], "prompts must be a list of lists of ids"),
        (lambda value: tokens(model, value), ["ab"], "prompts must be a list of lists of ids"),
        (model.generate, 3, "prompt = 3 must be text"),
        (lambda value: model.generate("the", stop=value), 3, "stop = 3 must be text"),
    ]
    for call, value, words in calls:
        with pytest.raises(UserError, match=words):
            call(value)


class Opening(Backend):
    """Runs a folder as it lies; here, a model with other weights, so that the test can tell."""

    name = "opening"

    def open(self, folder: Any, config: Config) -> Any:
        return model_of(config, seed=1).run_step


def test_a_backend_that_opens_the_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = load(saved, Opening())
    assert torch.equal(opened(IDS), model_of(TINY, seed=1)(IDS))
    assert {choice.implementation for choice in opened.choices} == {"opening"}
    assert torch.equal(opened.weights["norm.weight"], initial_weights(TINY, 0)["norm.weight"])
    monkeypatch.setenv("MOGE_HAL_OPS", "experts=default")
    with pytest.raises(UserError, match="MOGE_HAL_OPS"):
        load(saved, Opening())
    monkeypatch.delenv("MOGE_HAL_OPS")
    (saved / ONE).unlink()
    opened = load(saved, Opening())
    with pytest.raises(UserError, match="'opening' opened this model without weights"):
        save(opened, saved / "copy")


class Graph(Opening):
    graph = True

    def open(self, folder: Any, config: Config) -> Any:
        raise AssertionError("opened, which may export for long, before it was refused")


def test_a_graph_backend_is_not_opened_to_refuse_overrides(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOGE_HAL_OPS", "experts=default")
    with pytest.raises(UserError, match="MOGE_HAL_OPS: backend 'opening' runs a graph"):
        load(saved, Graph())


def test_environment_applies(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOGE_HAL_BACKEND", "moge_hal.backends.null:NullBackend")
    monkeypatch.setenv("MOGE_HAL_OPS", "experts=default")
    model = load(saved)
    assert model.backend.name == "null"
    assert {c.op: c.reason for c in model.choices}["experts"] == "asked for by MOGE_HAL_OPS"


class Helpless(Backend):
    """Overrides an operation and cannot serve it."""

    def experts(self, *args: Any) -> Tensor:
        raise AssertionError("bound although it said no")

    def why_not(self, facts: Any) -> str | None:
        return "no hands"


def test_strict(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.equal(load(saved, Helpless())(IDS), model_of(TINY)(IDS))
    monkeypatch.setenv("MOGE_HAL_STRICT", "1")
    with pytest.raises(UserError, match=r"experts \(no hands\)"):
        load(saved, Helpless())
