"""The cases, and their ids. An id is all that there is to a case: id -> seed -> inputs, alone and
in any order.

    experts / f32 / T17-D40-F24-E15-G3-K6 / scale1 / value
    operation, dtype, shape, scale of the activations, property

A shape is sizes by letter (see `ops.py`; I and O are the input and output size of `linear`) and
words:

    strided  what has an axis of tokens is every second element of a wider tensor
    sliced   the same is the middle third of wider rows, as of a fused projection; heads come first
    offset   every tensor starts 3 elements into its storage
    nobias   `linear` without a bias
    noscale  `route` without router_scale
    crowded  all tokens choose the experts of the first one
    cancel   the results of a token's experts cancel out but for a small rest
    large    scores that float16 holds only after they are divided by sqrt(d)
    limit2   DeepSeek-V3's router: sigmoid, a bias for the selection, and (here) 2 groups compete
    sigmoid  the same without a limit to groups
    renorm   a softmax router whose weights are divided by their sum, times 1.5
    eps3     a norm's epsilon is 10^-3 instead of 10^-5
    seed5    other inputs of the same shape

Whole models have the operation `model`, the name of a model for a shape and its weights for a
scale. The property does not take part in the seed: two properties of one shape are judged on the
same inputs. `listing.py` has the list of those that a run judges.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from moge_hal.errors import UserError, close_matches
from moge_hal.router import RouteSpec

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

# Sizes that a shape must name, and properties that are judged, by operation.
LETTERS = {
    "embed": "T V D",
    "linear": "T I O",
    "rms_norm": "T D",
    "add_rms_norm": "T D",
    "rotary": "B S H Hkv d",
    "attention": "B S H Hkv d",
    "swiglu_ffn": "T D F",
    "router_logits": "T D E",
    "route": "T E G K",
    "experts": "T D F E G K",
    "model": "",
}
_COMMON = "value nan rows repeat gradients bitwise no-sync"
PROPERTIES = {
    "embed": "value rows repeat gradients bitwise no-sync",
    "linear": _COMMON,
    "rms_norm": _COMMON,
    "add_rms_norm": _COMMON,
    "rotary": _COMMON,
    "attention": f"{_COMMON} decode chunks ragged unwritten masked",
    "swiglu_ffn": _COMMON,
    "router_logits": f"{_COMMON} route.ties",
    "route": "route.valid route.ties route.close nan rows repeat gradients bitwise no-sync",
    "experts": f"{_COMMON} unselected expert-parallel",
    "model": "one-pass decode chunks last-only batch long ragged two-caches stale unwritten "
    "cache-full far dtype generate train-step bitwise no-sync",
}
# The profile of a property, which is what a backend claims; what is not named here is core.
_PROFILE = {
    "gradients": "train",
    "train-step": "train",
    "no-sync": "capture",
    "bitwise": "bitwise",
}
WORDS = {
    "linear": "nobias",
    "route": "noscale sigmoid renorm",
    "experts": "crowded cancel",
    "attention": "large",
    "model": "tiny shipped",
}
_OPTIONAL = {"route": ("limit",), "rms_norm": ("eps",), "add_rms_norm": ("eps",)}
_MOST = 10**6  # a slip of the pen must not fill the memory
MODEL_WEIGHTS = {"tiny": "random", "shipped": "trained"}


@dataclass(frozen=True)
class Case:
    """One judgement. Made by `parse` and `every_case`, which check it."""

    op: str
    dtype_name: str
    shape: str
    scale_name: str
    prop: str  # the property

    @property
    def id(self) -> str:
        return f"{self.key}/{self.prop}"

    @property
    def key(self) -> str:
        """The id without the property: what inputs are drawn from."""
        return f"{self.op}/{self.dtype_name}/{self.shape}/{self.scale_name}"

    @property
    def profile(self) -> str:
        """What a backend must claim to be held to this case."""
        return _PROFILE.get(self.prop, "core")

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def scale(self) -> float:
        return float(self.scale_name.removeprefix("scale"))

    @cached_property
    def sizes(self) -> dict[str, int]:
        """By letter; `limit`, `eps` and `seed` too, if the shape has them."""
        parts = (re.fullmatch(r"([A-Za-z]+)(\d+)", part) for part in self.shape.split("-"))
        return {m[1]: int(m[2]) for m in parts if m}

    @cached_property
    def words(self) -> frozenset[str]:
        return frozenset(part for part in self.shape.split("-") if part.isalpha())

    def shifted(self, offset: int) -> "Case":
        """The same with other inputs: the seed is `offset` higher; none counts as 0."""
        if not offset:
            return self
        seed = self.sizes.get("seed", 0) + offset
        parts = [part for part in self.shape.split("-") if not re.fullmatch(r"seed\d+", part)]
        return replace(self, shape="-".join([*parts, f"seed{seed}"]))

    @property
    def spec(self) -> RouteSpec | None:
        """The router of a case that has one."""
        size = self.sizes
        if "K" not in size:
            return None
        if "limit" in size:
            return RouteSpec(size["G"], size["K"], "sigmoid", size["limit"], True, 2.5)
        if "sigmoid" in self.words:
            return RouteSpec(size["G"], size["K"], "sigmoid", None, True, 2.5)
        if "renorm" in self.words:
            return RouteSpec(size["G"], size["K"], renormalise=True, factor=1.5)
        return RouteSpec(size["G"], size["K"])


def parse(text: str) -> Case:
    """The case of an id, in the list or not. Raises `UserError` that says what is wrong with it."""
    fields = text.split("/")
    if len(fields) != 5:
        raise UserError(f"case {text!r} must read operation/dtype/shape/scale/property")
    case = Case(*fields)
    _known(case.op, LETTERS, "operation", text)
    _known(case.dtype_name, DTYPES, "dtype", text)
    _known(case.prop, PROPERTIES[case.op].split(), f"property of {case.op}", text)
    for word in case.words:
        allowed = ["strided", "sliced", "offset", *WORDS.get(case.op, "").split()]
        _known(word, allowed, f"word for a shape of {case.op}", text)
    _check_shape(case)
    _check_scale(case)
    return case


def _known(word: str, names: Collection[str], kind: str, text: str) -> None:
    if word not in names:
        raise UserError(f"case {text!r}: no {kind} {word!r}.{close_matches(word, names)}")


def _check_shape(case: Case) -> None:
    letters, size = LETTERS[case.op].split(), case.sizes
    optional = {"seed", *_OPTIONAL.get(case.op, ())}
    if not set(letters) <= size.keys() <= {*letters, *optional}:
        needs = "-".join(letters) or "a model's name"
        raise UserError(f"case {case.id!r}: a shape of {case.op} must give {needs}")
    for letter, count in size.items():
        least = 0 if letter in ("T", "S", "seed") else 1
        if letter != "seed" and not least <= count <= _MOST:
            raise UserError(f"case {case.id!r}: {letter} must be from {least} to {_MOST}")
    pairs = [("E", "G"), ("H", "Hkv")] + ([] if "limit" in size else [("K", "G")])
    for whole, part in pairs:
        if size.get(whole, 0) % size.get(part, 1):
            raise UserError(f"case {case.id!r}: {whole} must be a multiple of {part}")
    if size.get("K", 0) > size.get("E", 0) or size.get("d", 2) % 2:
        raise UserError(f"case {case.id!r}: K must not exceed E, and d must be even")


def _check_scale(case: Case) -> None:
    if case.op == "model":
        known = [word for word in case.words if MODEL_WEIGHTS.get(word) == case.scale_name]
        if len(known) != 1:
            raise UserError(f"case {case.id!r}: models are tiny/random and shipped/trained")
    elif not re.fullmatch(r"scale\d+(\.\d+)?", case.scale_name):
        raise UserError(f"case {case.id!r}: {case.scale_name!r} must read scale1 or scale0.01")
