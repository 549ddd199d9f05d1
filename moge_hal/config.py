"""What a model is, as numbers: one frozen configuration, its presets, its validation and the
released `config.json`.

Field names are those of the released files (`PanguProMoEForCausalLM`). The released format has no
field for the groups, since there a group gives one expert: groups = num_experts_per_tok. Ours adds
`num_groups`, which may be smaller.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from moge_hal.errors import UserError, close_matches
from moge_hal.router import RouteSpec

ARCHITECTURE = "PanguProMoEForCausalLM"
MODEL_TYPE = "PanguProMoE"


@dataclass(frozen=True)
class Config:
    """The sizes of a MoGE decoder. Letters as in the docstrings: V, D, L, H, Hkv, d, E, G, K, F,
    and Fs of the shared expert.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_groups: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    router_aux_loss_coef: float = 0.001
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                _refuse(field.name, value, "must be a whole number of at least 1")
            if field.type is float and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                _refuse(field.name, value, "must be a number")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                _refuse(name, getattr(self, name), "must be finite and above 0")
        if not self.router_aux_loss_coef >= 0:
            _refuse("router_aux_loss_coef", self.router_aux_loss_coef, "must not be negative")
        self._divides("num_attention_heads", "num_key_value_heads")
        self._divides("num_experts", "num_groups")
        self._divides("num_experts_per_tok", "num_groups")
        if self.num_experts_per_tok > self.num_experts:
            rule = f"must not exceed num_experts = {self.num_experts}"
            _refuse("num_experts_per_tok", self.num_experts_per_tok, rule)
        if self.head_dim % 2:
            _refuse("head_dim", self.head_dim, "must be even: rotary embedding pairs its halves")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and 0 <= value < self.vocab_size):
                _refuse(name, value, f"must be an id below vocab_size = {self.vocab_size}")

    def _divides(self, whole: str, part: str) -> None:
        if getattr(self, whole) % getattr(self, part):
            rule = f"must be a multiple of {part} = {getattr(self, part)}"
            _refuse(whole, getattr(self, whole), rule)

    @property
    def route(self) -> RouteSpec:
        """MoGE's router: k/G in every group, softmax over all experts, nothing renormalised."""
        return RouteSpec(groups=self.num_groups, k=self.num_experts_per_tok)

    @property
    def sizes(self) -> dict[str, int]:
        """The static sizes by letter, as a backend is told them in `Facts`."""
        return {
            "V": self.vocab_size,
            "D": self.hidden_size,
            "L": self.num_hidden_layers,
            "H": self.num_attention_heads,
            "Hkv": self.num_key_value_heads,
            "d": self.head_dim,
            "E": self.num_experts,
            "G": self.num_groups,
            "K": self.num_experts_per_tok,
            "F": self.moe_intermediate_size,
            "Fs": self.shared_expert_intermediate_size,
        }

    def count_parameters(self) -> tuple[int, int]:
        """(all parameters, those that one token uses), counted on the model itself, built without
        memory.
        """
        from moge_hal.model import skeleton  # the model is written against this file

        total = sum(p.numel() for p in skeleton(self).parameters())
        idle = self.num_experts - self.num_experts_per_tok
        per_expert = 3 * self.hidden_size * self.moe_intermediate_size
        return total, total - self.num_hidden_layers * idle * per_expert

    def to_json(self, dtype: str = "float32") -> str:
        """The released layout of `config.json`, with `num_groups` added."""
        released = {
            "architectures": [ARCHITECTURE],
            "model_type": MODEL_TYPE,
            **asdict(self),
            "hidden_act": "silu",
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
            "torch_dtype": dtype,
        }
        return json.dumps(released, indent=2) + "\n"

    @staticmethod
    def from_json(path: Path) -> "Config":
        """Reads a released or saved `config.json`; raises `UserError` naming file, field, value and
        rule.
        """
        try:
            data = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{path.parent} has no config.json: give a folder that holds a model"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as JSON ({error}): restore the file") from None
        if not isinstance(data, dict):
            raise UserError(f"{path} must hold a JSON object, not {type(data).__name__}")
        try:
            return Config.from_dict(data)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Config":
        """From the fields of a `config.json`. Fields that cannot change the result are ignored;
        those that would are refused.
        """
        _refuse_other_models(data)
        known = {field.name for field in fields(Config)}
        values = {
            name: value for name, value in data.items() if name in known and value is not None
        }
        # Newer Hugging Face releases keep the base of the rotary embedding in a table of its own.
        rope = data.get("rope_parameters") or {}
        if "rope_theta" not in values and "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        for name in ("bos_token_id", "eos_token_id"):
            if isinstance(values.get(name), list) and values[name]:
                values[name] = values[name][
                    0
                ]  # some releases list several; the first ends an answer
        if "num_groups" not in values and "num_experts_per_tok" in values:
            values["num_groups"] = values["num_experts_per_tok"]
        if "head_dim" not in values and {"hidden_size", "num_attention_heads"} <= values.keys():
            try:
                values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
            except (TypeError, ZeroDivisionError):
                values["head_dim"] = 1  # the faulty field is named by the validation below
        missing = [f.name for f in fields(Config) if f.name not in values and f.type is int]
        if missing:
            raise UserError(f"missing field {', '.join(missing)}: add it to the configuration")
        return Config(**values)


def _refuse(name: str, value: object, rule: str) -> None:
    raise UserError(f"{name} = {value!r} {rule}")


def _refuse_other_models(data: Mapping[str, Any]) -> None:
    """Says no to what would load and compute something else (the V2 router has the same model_type,
    for one).
    """
    architectures = data.get("architectures") or [ARCHITECTURE]
    if not isinstance(architectures, list) or architectures[0] != ARCHITECTURE:
        _refuse("architectures", architectures, f"must be [{ARCHITECTURE!r}]: another model")
    rope = data.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        _refuse("rope_parameters", rope, "must be a table")
    expected = {
        "hidden_act": (data.get("hidden_act", "silu"), "silu"),
        "tie_word_embeddings": (data.get("tie_word_embeddings", False), False),
        "norm_topk_prob": (data.get("norm_topk_prob") or False, False),
        "rope_scaling": (data.get("rope_scaling"), None),
        "rope_parameters.rope_type": (rope.get("rope_type", "default"), "default"),
        "rope_parameters.partial_rotary_factor": (rope.get("partial_rotary_factor", 1), 1),
    }
    for name, (value, only) in expected.items():
        if value != only:
            _refuse(name, value, f"must be {only!r}: nothing else is implemented")


PRESETS = {
    # Pangu Pro MoE 72B-A16B as released (arXiv 2505.21411).
    "pangu-pro-moe-72b": Config(
        vocab_size=153376,
        hidden_size=5120,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
        num_experts=64,
        num_groups=8,
        num_experts_per_tok=8,
        moe_intermediate_size=1344,
        shared_expert_intermediate_size=5376,
        max_position_embeddings=131072,
        rope_theta=16e6,
        bos_token_id=1,
        eos_token_id=45892,
    ),
    # The model that this package ships: small enough to be trained on a laptop's processor.
    "novels": Config(
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=24,
        num_groups=4,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=256,
        max_position_embeddings=1024,
        initializer_range=0.04,
        router_aux_loss_coef=0.01,
        bos_token_id=1,
        eos_token_id=4,
    ),
    # For tests: every size odd enough to tell groups from members and heads from layers; two
    # experts a group.
    "tiny": Config(
        vocab_size=259,
        hidden_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=15,
        num_groups=3,
        num_experts_per_tok=6,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=56,
        max_position_embeddings=640,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def preset(name: str, **changes: Any) -> Config:
    """A named configuration, with fields replaced: `preset("novels", num_hidden_layers=6)`."""
    if name not in PRESETS:
        names = ", ".join(PRESETS)
        raise UserError(f"no preset {name!r}; there are {names}.{close_matches(name, PRESETS)}")
    unknown = changes.keys() - {field.name for field in fields(Config)}
    if unknown:
        field = min(unknown)
        known = [f.name for f in fields(Config)]
        raise UserError(f"no configuration field {field!r}.{close_matches(field, known)}")
    return replace(PRESETS[name], **changes)
