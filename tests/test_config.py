"""The configuration: presets, the released totals, every rule's sentence, and released files."""

import json
import resource
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from moge_hal.config import ARCHITECTURE, LARGE, LARGEST, MODEL_TYPE, PRESETS, Config, preset
from moge_hal.errors import UserError
from moge_hal.model import skeleton
from moge_hal.router import RouteSpec

TINY = preset("tiny")
# A released config.json: the groups are implied, and there is much that changes nothing.
RELEASED: dict[str, Any] = {
    "architectures": [ARCHITECTURE],
    "auto_map": {"AutoConfig": "configuration.Config"},
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 45892,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "model_type": MODEL_TYPE,
    "moe_intermediate_size": 1344,
    "num_attention_heads": 40,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 16000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5376,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.2",
    "use_cache": True,
    "vocab_size": 153376,
}


def test_the_released_totals_are_counted_in_little_time_and_memory() -> None:
    """72 billion parameters would be 288 GB: they are counted on a skeleton."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert preset("pangu-pro-moe-72b").count_parameters() == (71_988_781_056, 16_498_139_136)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 50 * 1024


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_own_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(PRESETS[name].to_json("bfloat16"), "utf-8")
    assert Config.from_json(path) == PRESETS[name]
    data = json.loads(path.read_text("utf-8"))
    assert data["architectures"] == [ARCHITECTURE]
    assert data["torch_dtype"] == "bfloat16"


def test_every_field_survives(tmp_path: Path) -> None:
    """None of them at its default, so that one that is not written, or not read, shows."""
    changes = {
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.5,
        "router_aux_loss_coef": 0.0,
        "bos_token_id": 7,
        "eos_token_id": 0,
    }
    config = preset("tiny", **changes)
    assert {f.name for f in fields(Config) if f.default is not MISSING} == set(changes)
    path = tmp_path / "config.json"
    path.write_text(config.to_json(), "utf-8")
    assert Config.from_json(path) == config
    assert config != TINY


def test_tiny_tells_sizes_apart() -> None:
    """Tests must notice swapped axes, which 64 experts in 8 groups of 8 would hide."""
    size = TINY.sizes
    apart = [size[letter] for letter in ("D", "d", "E", "G", "K", "F", "Fs", "V")]
    apart += [size["E"] // size["G"], size["K"] // size["G"], size["H"] * size["d"]]
    assert len(set(apart)) == len(apart)
    assert 1 < size["Hkv"] < size["H"]
    assert TINY.route == RouteSpec(groups=3, k=6)
    assert PRESETS["pangu-pro-moe-72b"].route == RouteSpec(groups=8, k=8)


WHOLE = [f.name for f in fields(Config) if f.type is int]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [0, -3, 2.0, True, "8", None])
def test_a_size_is_a_whole_number_of_at_least_1(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"^{name} = {value!r} must be a whole number of at least"):
        preset("tiny", **{name: value})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rope_theta": 0}, "rope_theta = 0 must be finite and above 0"),
        ({"vocab_size": 2**31}, "vocab_size = 2147483648 must be at most 2147483647"),
        (
            {"max_position_embeddings": 2**24 + 1},
            "max_position_embeddings = 16777217 must be at most 16777216",
        ),
        ({"hidden_size": 2**19 + 1}, "hidden_size = 524289 must be at most 524288"),
        ({"num_hidden_layers": 4097}, "num_hidden_layers = 4097 must be at most 4096"),
        ({"head_dim": 1026}, "head_dim = 1026 must be at most 1024"),
        ({"num_experts": 16386}, "num_experts = 16386 must be at most 16384"),
        ({"rope_theta": 10**309}, f"rope_theta = {10**309} must be finite and above 0"),
        ({"rope_theta": "1e4"}, "rope_theta = '1e4' must be a number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps = -1e-05 must be finite and above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan must be finite and above 0"),
        ({"initializer_range": 0.0}, "initializer_range = 0.0 must be finite and above 0"),
        ({"initializer_range": True}, "initializer_range = True must be a number"),
        (
            {"router_aux_loss_coef": -1},
            "router_aux_loss_coef = -1 must be finite and not negative",
        ),
        (
            {"router_aux_loss_coef": float("inf")},
            "router_aux_loss_coef = inf must be finite and not negative",
        ),
        (
            {"num_attention_heads": 7},
            "num_attention_heads = 7 must be a multiple of num_key_value_heads = 2",
        ),
        ({"num_experts": 16}, "num_experts = 16 must be a multiple of num_groups = 3"),
        (
            {"num_experts_per_tok": 8},
            "num_experts_per_tok = 8 must be a multiple of num_groups = 3",
        ),
        ({"num_experts_per_tok": 18}, "num_experts_per_tok = 18 must not exceed num_experts = 15"),
        ({"head_dim": 7}, "head_dim = 7 must be even: rotary embedding pairs its halves"),
        ({"bos_token_id": 259}, "bos_token_id = 259 must be an id below vocab_size = 259"),
        ({"eos_token_id": -1}, "eos_token_id = -1 must be an id below vocab_size = 259"),
        ({"eos_token_id": [1, 2]}, "eos_token_id = [1, 2] must be an id below vocab_size = 259"),
    ],
)
def test_a_rule_names_field_value_and_rule(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        preset("tiny", **changes)
    assert str(error.value) == sentence


def test_a_number_that_json_spells_as_a_whole_one_is_a_float() -> None:
    """Also where it is none that torch could take as a whole one."""
    config = preset("tiny", rope_theta=10**300, router_aux_loss_coef=0)
    assert (config.rope_theta, config.router_aux_loss_coef) == (1e300, 0.0)
    assert type(config.rope_theta) is type(config.router_aux_loss_coef) is float
    skeleton(config)


def test_the_largest_sizes_can_be_counted() -> None:
    """64 bits hold the size of every tensor, so that a file that lacks them can be refused."""
    largest = {f.name: LARGEST.get(f.name, LARGE) for f in fields(Config) if f.type is int}
    largest |= {"num_groups": 2**14, "num_experts_per_tok": 2**14, "num_hidden_layers": 1}
    largest |= {"max_position_embeddings": 640}  # the only one that takes memory here
    total, _ = preset("tiny", **largest).count_parameters()
    assert total > 3 * 2**52  # the experts alone


def test_a_misspelt_preset_or_field_gets_close_matches() -> None:
    with pytest.raises(UserError, match=r"no preset 'tinny'; there are .*novels.*mean 'tiny'\?"):
        preset("tinny")
    with pytest.raises(UserError, match=r"no configuration field 'num_expert'.*'num_experts'"):
        preset("tiny", num_expert=5)


def test_a_released_file_is_the_preset() -> None:
    """No head_dim and no num_groups in it: 5120 / 40 and num_experts_per_tok."""
    assert Config.from_dict(RELEASED) == preset("pangu-pro-moe-72b")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_groups": 8, "head_dim": 128},
        {"num_groups": None, "head_dim": None, "rope_scaling": None},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 16e6, "rope_type": "default"}},
        {"rope_parameters": None, "sliding_window": None, "anything_else": [1, 2]},
        {"architectures": None},
        {"sliding_window": 4096, "use_sliding_window": False, "mlp_only_layers": []},
        {"attention_bias": True, "quantization_config": None, "num_group": None},
        {"num_expert_groups": 4, "topk_group": 4},
        {"eos_token_id": [45892, 45893]},
    ],
)
def test_released_variants_are_the_same_model(changes: dict[str, Any]) -> None:
    assert Config.from_dict({**RELEASED, **changes}) == preset("pangu-pro-moe-72b")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["PanguProMoEV2ForCausalLM"]}, "architectures = .*another model"),
        ({"architectures": "PanguProMoEV2ForCausalLM"}, "architectures = 'PanguProMoEV2"),
        ({"architectures": {"0": ARCHITECTURE}}, "architectures = "),
        ({"architectures": 5}, "architectures = 5"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling = {'type': 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.rope_type = 'linear'"),
        ({"rope_parameters": "default"}, "rope_parameters = 'default'"),
        ({"rope_parameters": ["rope_theta"]}, "rope_parameters = "),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True must be False"),
        ({"norm_topk_prob": True}, "norm_topk_prob = True must be False"),
        ({"sliding_window": 4096}, "sliding_window = 4096 must be null"),
        ({"sliding_window": 8, "use_sliding_window": True}, "sliding_window = 8 must be null"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] must be \[\]"),
        ({"attention_bias": False}, "attention_bias = False must be True"),
        ({"quantization_config": {"bits": 8}}, "quantization_config = .* must be None"),
        ({"num_group": 4}, "num_group = 4 is no field .*did you mean 'num_groups'"),
        ({"n_groups": 4}, "n_groups = 4 is no field .*did you mean 'num_groups'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' must be 'silu'"),
        ({"hidden_size": "5120"}, "hidden_size = '5120' must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0 must be a whole number"),
        ({"num_experts_per_tok": 5}, "num_experts = 64 must be a multiple of num_groups = 5"),
        ({"vocab_size": None, "num_experts": None}, "missing field vocab_size, num_experts: add"),
    ],
)
def test_what_would_compute_something_else_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**RELEASED, **changes}), "utf-8")
    with pytest.raises(UserError, match=words) as error:
        Config.from_json(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no config.json: give a folder that holds a model"),
        (b"{", "config.json cannot be read as JSON"),
        (b"[" * 100_000, "config.json cannot be read as JSON"),
        (b"\xff\xfe", "config.json cannot be read as JSON"),
        (b"[1]", "config.json must hold a JSON object, not list"),
    ],
)
def test_a_file_that_is_none_is_named(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        Config.from_json(path)
    assert str(tmp_path) in str(error.value)
