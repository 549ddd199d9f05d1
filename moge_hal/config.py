"""What a model is, as numbers: one frozen configuration, its presets, its validation and the
released `config.json`.

Field names are those of the released files (`PanguProMoEForCausalLM`). The released format has no
field for the groups, since there a group gives one expert: groups = num_experts_per_tok. Ours adds
`num_groups`, which may be smaller.
"""

import difflib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from moge_hal.errors import UserError, close_matches, is_number, refuse, require_whole
from moge_hal.router import RouteSpec

ARCHITECTURE = "PanguProMoEForCausalLM"
MODEL_TYPE = "PanguProMoE"
LARGE = 2**19  # the most that a size may be: no tensor's bytes overflow 64 bits
LARGEST = {  # except these
    "vocab_size": 2**31 - 1,
    "max_position_embeddings": 2**24,  # rotary tables grow with it, and with the next
    "head_dim": 2**10,
    "num_hidden_layers": 2**12,  # every layer is a module, every expert of it a name in the files
    "num_experts": 2**14,
}
LETTERS = {  # as docstrings write the sizes; Fs is F of the shared expert
    "V": "vocab_size",
    "D": "hidden_size",
    "L": "num_hidden_layers",
    "H": "num_attention_heads",
    "Hkv": "num_key_value_heads",
    "d": "head_dim",
    "E": "num_experts",
    "G": "num_groups",
    "K": "num_experts_per_tok",
    "F": "moe_intermediate_size",
    "Fs": "shared_expert_intermediate_size",
}


@dataclass(frozen=True)
class Config:
    """The sizes of a MoGE decoder, and what its training needs to know. Raises `UserError` for
    values that cannot be, naming the field, the value and the rule.
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
            if field.type is int:
                require_whole(field.name, value)
                most = LARGEST.get(field.name, LARGE)
                if value > most:
                    refuse(field.name, value, f"must be at most {most}")
            elif field.type is float and not is_number(value):
                refuse(field.name, value, "must be a number")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) <= sys.float_info.max:
                refuse(name, getattr(self, name), "must be finite and above 0")
        if not 0 <= self.router_aux_loss_coef <= sys.float_info.max:
            rule = "must be finite and not negative"
            refuse("router_aux_loss_coef", self.router_aux_loss_coef, rule)
        for field in fields(self):
            if field.type is float:  # JSON may spell it as a whole number, too large for torch
                object.__setattr__(self, field.name, float(getattr(self, field.name)))
        for whole, part in (
            ("num_attention_heads", "num_key_value_heads"),
            ("num_experts", "num_groups"),
            ("num_experts_per_tok", "num_groups"),
        ):
            if getattr(self, whole) % getattr(self, part):
                rule = f"must be a multiple of {part} = {getattr(self, part)}"
                refuse(whole, getattr(self, whole), rule)
        if self.num_experts_per_tok > self.num_experts:
            rule = f"must not exceed num_experts = {self.num_experts}"
            refuse("num_experts_per_tok", self.num_experts_per_tok, rule)
        if self.head_dim % 2:
            refuse("head_dim", self.head_dim, "must be even: rotary embedding pairs its halves")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and 0 <= value < self.vocab_size):
                refuse(name, value, f"must be an id below vocab_size = {self.vocab_size}")

    @property
    def route(self) -> RouteSpec:
        """MoGE's router: k/G in every group, softmax over all experts, nothing renormalised."""
        return RouteSpec(groups=self.num_groups, k=self.num_experts_per_tok)

    @property
    def sizes(self) -> dict[str, int]:
        """The static sizes by letter, as a backend is told them in `Facts`."""
        return {letter: getattr(self, name) for letter, name in LETTERS.items()}

    def count_parameters(self) -> tuple[int, int]:
        """(all parameters, those that one token uses), counted on a skeleton without memory."""
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
        """Reads a released or saved `config.json`; a `UserError` names the file too."""
        try:
            data = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{path.parent} has no config.json: give a folder that holds a model"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read as JSON ({error}): restore the file") from None
        if not isinstance(data, dict):
            raise UserError(f"{path} must hold a JSON object, not {type(data).__name__}")
        try:
            return Config.from_dict(data)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Config":
        """From the fields of a `config.json`. Of those that `Config` lacks, the ones that would
        change what is computed are refused, the others ignored; null means that nothing is said.
        """
        _refuse_other_models(data)
        values = {f.name: data[f.name] for f in fields(Config) if data.get(f.name) is not None}
        # Newer Hugging Face releases keep the base of the rotary embedding in a table of its own.
        rope = data.get("rope_parameters") or {}
        if "rope_theta" in rope:
            values.setdefault("rope_theta", rope["rope_theta"])
        for name in ("bos_token_id", "eos_token_id"):
            if isinstance(values.get(name), list) and values[name]:
                values[name] = values[name][0]  # of several, the first ends an answer
        if "num_experts_per_tok" in values:
            values.setdefault("num_groups", values["num_experts_per_tok"])
        hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
        if hidden is not None and heads is not None:
            whole = type(hidden) is int and type(heads) is int and heads > 0
            # Where one of them is at fault, the validation names that one.
            values.setdefault("head_dim", hidden // heads if whole else 1)
        missing = [f.name for f in fields(Config) if f.name not in values and f.type is int]
        if missing:
            raise UserError(f"missing field {', '.join(missing)}: add it to the configuration")
        return Config(**values)


def _refuse_other_models(data: Mapping[str, Any]) -> None:
    """Says no to what would load and compute something else, as the V2 router, of the same
    model_type, would.
    """
    architectures = data.get("architectures") or [ARCHITECTURE]
    if not isinstance(architectures, list) or architectures[0] != ARCHITECTURE:
        refuse("architectures", architectures, f"must be [{ARCHITECTURE!r}]: another model")
    rope = data.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        refuse("rope_parameters", rope, "must be a table")
    stated = {**data, **{f"rope_parameters.{name}": value for name, value in rope.items()}}
    only = {
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "norm_topk_prob": False,
        "attention_bias": True,
        "mlp_only_layers": [],
        "quantization_config": None,
        "rope_scaling": None,
        "rope_parameters.rope_type": "default",
        "rope_parameters.partial_rotary_factor": 1,
    }
    for name, value in only.items():
        if stated.get(name) not in (None, value):
            refuse(name, stated[name], f"must be {value!r}: nothing else is implemented")
    window = data.get("sliding_window")
    if window is not None and data.get("use_sliding_window") is not False:
        refuse("sliding_window", window, "must be null: nothing else is implemented")
    # No other library has this field, so nobody else would notice that it is misspelt.
    unknown = [name for name in data if name not in {f.name for f in fields(Config)}]
    for name in difflib.get_close_matches("num_groups", unknown, cutoff=0.8):
        if data[name] is not None:
            refuse(name, data[name], "is no field of the configuration; did you mean 'num_groups'?")


def _sizes(**letters: int) -> dict[str, int]:
    return {LETTERS[letter]: size for letter, size in letters.items()}


PRESETS = {
    # Pangu Pro MoE 72B-A16B as released (arXiv 2505.21411).
    "pangu-pro-moe-72b": Config(
        **_sizes(V=153376, D=5120, L=48, H=40, Hkv=8, d=128, E=64, G=8, K=8, F=1344, Fs=5376),
        max_position_embeddings=131072,
        rope_theta=16e6,
        bos_token_id=1,
        eos_token_id=45892,
    ),
    # The model that this package ships: small enough to be trained on a laptop's processor.
    "novels": Config(
        **_sizes(V=2048, D=128, L=4, H=4, Hkv=2, d=32, E=24, G=4, K=4, F=64, Fs=256),
        max_position_embeddings=1024,
        initializer_range=0.04,
        router_aux_loss_coef=0.01,
        bos_token_id=1,
        eos_token_id=4,
    ),
    # For tests: every size odd enough to tell groups from members and heads from layers; two
    # experts a group.
    "tiny": Config(
        **_sizes(V=259, D=40, L=2, H=6, Hkv=2, d=8, E=15, G=3, K=6, F=24, Fs=56),
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
    known = [field.name for field in fields(Config)]
    for field in sorted(changes.keys() - known):
        raise UserError(f"no configuration field {field!r}.{close_matches(field, known)}")
    return replace(PRESETS[name], **changes)
