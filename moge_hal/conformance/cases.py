"""The cases, and their ids. An id is all that there is to a case: id -> seed -> inputs, alone and
in any order.

    experts / f32 / T17-D40-F24-E15-G3-K6 / scale1 / value
    operation, dtype, shape, scale of the activations, property

A shape is sizes by letter (see `ops.py`; I and O are the input and output size of `linear`) and
words:

    strided  activations are every second element of a wider tensor
    offset   every tensor starts 3 elements into its storage
    nobias   `linear` without a bias
    noscale  `route` without router_scale
    crowded  all tokens choose the experts of the first one
    limit2   DeepSeek-V3's router: sigmoid, a bias for the selection, and (here) 2 groups compete
    seed5    other inputs of the same shape

Whole models have the operation `model`, the name of a model for a shape and its weights for a
scale. The property does not take part in the seed: two properties of one shape are judged on the
same inputs.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
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
_COMMON = "value nan rows repeat gradients"
PROPERTIES = {
    "embed": "value rows repeat gradients",
    "linear": _COMMON,
    "rms_norm": _COMMON,
    "add_rms_norm": _COMMON,
    "rotary": _COMMON,
    "attention": f"{_COMMON} decode chunks ragged unwritten masked",
    "swiglu_ffn": _COMMON,
    "router_logits": f"{_COMMON} route.ties",
    "route": "route.valid route.ties nan rows repeat gradients",
    "experts": f"{_COMMON} unselected expert-parallel",
    "model": "one-pass decode chunks last-only batch long ragged two-caches stale unwritten "
    "cache-full dtype",
}
WORDS = {
    "linear": "nobias",
    "route": "noscale",
    "experts": "crowded",
    "model": "tiny shipped",
}
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
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def scale(self) -> float:
        return float(self.scale_name.removeprefix("scale"))

    @cached_property
    def sizes(self) -> dict[str, int]:
        """By letter; `limit` and `seed` too, if the shape has them."""
        parts = (re.fullmatch(r"([A-Za-z]+)(\d+)", part) for part in self.shape.split("-"))
        return {m[1]: int(m[2]) for m in parts if m}

    @cached_property
    def words(self) -> frozenset[str]:
        return frozenset(part for part in self.shape.split("-") if part.isalpha())

    @property
    def spec(self) -> RouteSpec | None:
        """The router of a case that has one."""
        size = self.sizes
        if "K" not in size:
            return None
        if "limit" in size:
            return RouteSpec(size["G"], size["K"], "sigmoid", size["limit"], True, 2.5)
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
        allowed = ["strided", "offset", *WORDS.get(case.op, "").split()]
        _known(word, allowed, f"word for a shape of {case.op}", text)
    _check_shape(case)
    _check_scale(case)
    return case


def _known(word: str, names: Collection[str], kind: str, text: str) -> None:
    if word not in names:
        raise UserError(f"case {text!r}: no {kind} {word!r}.{close_matches(word, names)}")


def _check_shape(case: Case) -> None:
    letters, size = LETTERS[case.op].split(), case.sizes
    optional = {"seed", "limit"} if case.op == "route" else {"seed"}
    if not set(letters) <= size.keys() <= {*letters, *optional}:
        needs = "-".join(letters) or "a model's name"
        raise UserError(f"case {case.id!r}: a shape of {case.op} must give {needs}")
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


SCALES = ("scale0.01", "scale1", "scale30")


def _tokens(rest: str) -> list[str]:
    return [f"T{count}-{rest}" for count in (0, 1, 7, 17, 64)]


# The shapes whose values are judged, at every scale. The first is the usual one, on which the other
# properties are judged. A group never has as many members as there are groups, since a swap of the
# two would be invisible; but for 64/8/8, which is Pangu's own.
SHAPES = {
    "embed": ["T17-V259-D40", *_tokens("V61-D24"), "T17-V259-D40-offset"],
    "linear": [
        "T17-I40-O56",
        *_tokens("I48-O40"),
        "T17-I40-O56-nobias",
        "T17-I40-O56-strided",
        "T17-I40-O56-offset",
        "T7-I5120-O24",
    ],
    "rms_norm": ["T17-D40", *_tokens("D24"), "T17-D40-strided", "T17-D40-offset", "T7-D5120"],
    "add_rms_norm": ["T17-D40", *_tokens("D24"), "T17-D40-strided", "T17-D40-offset", "T7-D5120"],
    "rotary": [
        "B3-S7-H6-Hkv2-d8",
        *[f"B2-S{length}-H4-Hkv4-d32" for length in (0, 1, 17, 64)],
        "B3-S7-H6-Hkv2-d8-strided",
        "B3-S7-H6-Hkv2-d8-offset",
    ],
    "attention": [
        "B3-S7-H6-Hkv2-d8",
        *[f"B2-S{length}-H6-Hkv2-d8" for length in (0, 1, 17, 64)],
        "B1-S17-H4-Hkv4-d32",
        "B3-S7-H6-Hkv2-d8-strided",
        "B3-S7-H6-Hkv2-d8-offset",
        "B1-S300-H2-Hkv1-d128",
    ],
    "swiglu_ffn": [
        "T17-D40-F24",
        *_tokens("D24-F56"),
        "T17-D40-F24-strided",
        "T17-D40-F24-offset",
        "T7-D5120-F24",
    ],
    "router_logits": [
        "T17-D40-E15",
        *_tokens("D24-E24"),
        "T17-D40-E15-strided",
        "T17-D40-E15-offset",
        "T7-D5120-E64",
    ],
    "route": [
        "T17-E15-G3-K6",
        *_tokens("E24-G4-K4"),
        "T17-E4-G4-K4",
        "T17-E24-G1-K4-noscale",
        "T17-E64-G8-K8",
        "T17-E20-G4-K6-limit2",
        "T17-E15-G3-K6-strided",
        "T17-E15-G3-K6-offset",
    ],
    "experts": [
        "T17-D40-F24-E15-G3-K6",
        *_tokens("D24-F40-E12-G2-K4"),
        "T17-D40-F24-E4-G4-K4",
        "T17-D40-F24-E24-G1-K4",
        "T64-D40-F24-E15-G3-K6-crowded",
        "T17-D40-F24-E15-G3-K6-strided",
        "T17-D40-F24-E15-G3-K6-offset",
        "T7-D5120-F8-E6-G3-K3",
    ],
}
# Where a property needs another shape than the operation's usual one.
OTHER_SHAPES = {
    ("experts", "unselected"): [
        "T0-D40-F24-E15-G3-K6",
        "T1-D40-F24-E15-G3-K6",
        "T7-D40-F24-E64-G8-K8",
    ],
    ("route", "route.ties"): [
        "T17-E15-G3-K6",
        "T17-E24-G4-K4",
        "T17-E4-G4-K4",
        "T17-E64-G8-K8",
    ],
    ("router_logits", "route.ties"): ["T17-D40-E15", "T17-D40-E24"],
    ("attention", "decode"): ["B2-S17-H6-Hkv2-d8", "B1-S17-H4-Hkv4-d32"],
    ("attention", "chunks"): ["B2-S64-H6-Hkv2-d8"],
    ("attention", "ragged"): ["B4-S17-H6-Hkv2-d8"],
    ("attention", "unwritten"): ["B2-S17-H6-Hkv2-d8"],
}
MODELS = ("model/f32/tiny-seed0/random", "model/f32/tiny-seed1/random", "model/f32/shipped/trained")


def every_case() -> Iterator[Case]:
    """The list, in order: float32 in full; in low precision the values of two shapes."""
    for op, shapes in SHAPES.items():
        value = PROPERTIES[op].split()[0]
        for shape in shapes:
            for scale in SCALES:
                yield Case(op, "f32", shape, scale, value)
        for prop in PROPERTIES[op].split()[1:]:
            for shape in OTHER_SHAPES.get((op, prop), shapes[:1]):
                yield Case(op, "f32", shape, "scale1", prop)
        if op != "route":  # a router works in float32 whatever the model's dtype
            for dtype in ("bf16", "f16"):
                for shape in {shapes[0]: None, shapes[-1]: None}:
                    for scale in SCALES:
                        yield Case(op, dtype, shape, scale, value)
    for model in MODELS:
        for prop in PROPERTIES["model"].split():
            if prop == "dtype" and model != MODELS[0]:
                continue  # the weights make no difference
            yield parse(f"{model}/{prop}")
