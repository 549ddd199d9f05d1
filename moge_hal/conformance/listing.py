"""The list of cases: every operation, dtype, shape, scale and property that a run judges.

A property other than the values is judged on an operation's usual shape (its first) in every dtype,
and on others where those would hide a fault.
"""

from collections.abc import Iterator
from functools import cache

from moge_hal.conformance.cases import DTYPES, PROPERTIES, Case, parse

SCALES = ("scale0.01", "scale1", "scale30")
# Kernels work in blocks of up to 512 tokens: the last block is exactly full, or not.
COUNTS = (0, 1, 7, 17, 64)
MANY = (512, 531)


def _tokens(rest: str) -> list[str]:
    return [f"T{count}-{rest}" for count in COUNTS + MANY]


# The shapes whose values are judged, at every scale. A group never has as many members as there are
# groups, since a swap of the two would be invisible; but for 64/8/8, which is Pangu's own.
SHAPES = {
    "embed": [
        "T17-V259-D40",
        *_tokens("V61-D24"),
        "T17-V259-D40-strided",
        "T17-V259-D40-sliced",
        "T17-V259-D40-offset",
        "T7-V61-D37",
        "T7-V70001-D8",
    ],
    "linear": [
        "T17-I40-O56",
        *_tokens("I48-O40"),
        "T17-I40-O56-nobias",
        "T17-I40-O56-strided",
        "T17-I40-O56-sliced",
        "T17-I40-O56-offset",
        "T7-I40-O40",
        "T7-I37-O29",
        "T7-I5120-O24",
    ],
    "rms_norm": [
        "T17-D40",
        *_tokens("D24"),
        "T17-D40-strided",
        "T17-D40-sliced",
        "T17-D40-offset",
        "T7-D37",
        "T7-D40-eps3",
        "T7-D5120",
        "T65537-D8",  # a grid of blocks may end at 65,535
    ],
    "add_rms_norm": [
        "T17-D40",
        *_tokens("D24"),
        "T17-D40-strided",
        "T17-D40-sliced",
        "T17-D40-offset",
        "T7-D37",
        "T7-D40-eps3",
        "T7-D5120",
    ],
    "rotary": [
        "B3-S7-H6-Hkv2-d8",
        *[f"B2-S{length}-H4-Hkv4-d32" for length in COUNTS],
        *[f"B1-S{length}-H2-Hkv1-d8" for length in MANY],
        "B3-S7-H6-Hkv2-d8-strided",
        "B3-S7-H6-Hkv2-d8-sliced",
        "B3-S7-H6-Hkv2-d8-offset",
        "B2-S7-H10-Hkv2-d10",
        "B1-S7-H15-Hkv5-d160",
        "B19-S1-H6-Hkv2-d8",
    ],
    "attention": [
        "B3-S7-H6-Hkv2-d8",
        *[f"B2-S{length}-H6-Hkv2-d8" for length in COUNTS],
        "B1-S17-H4-Hkv4-d32",
        "B3-S7-H6-Hkv2-d8-strided",
        "B3-S7-H6-Hkv2-d8-sliced",
        "B3-S7-H6-Hkv2-d8-offset",
        "B2-S7-H10-Hkv2-d10",
        "B1-S7-H15-Hkv5-d160",
        "B19-S1-H6-Hkv2-d8",
        "B1-S300-H2-Hkv1-d128",
        *[f"B1-S{length}-H2-Hkv1-d8" for length in MANY],
    ],
    "swiglu_ffn": [
        "T17-D40-F24",
        *_tokens("D24-F56"),
        "T17-D40-F24-strided",
        "T17-D40-F24-sliced",
        "T17-D40-F24-offset",
        "T7-D40-F20",  # gate_up is square
        "T7-D37-F19",
        "T7-D5120-F24",
    ],
    "router_logits": [
        "T17-D40-E15",
        *_tokens("D24-E24"),
        "T17-D40-E15-strided",
        "T17-D40-E15-sliced",
        "T17-D40-E15-offset",
        "T7-D37-E15",
        "T7-D5120-E64",
    ],
    "route": [
        "T17-E15-G3-K6",
        *_tokens("E24-G4-K4"),
        "T17-E4-G4-K4",
        "T17-E24-G1-K4-noscale",
        "T17-E64-G8-K8",
        "T64-E20-G4-K8-limit2",
        "T17-E6-G6-K2-limit3",
        "T17-E24-G1-K4-sigmoid",
        "T17-E24-G1-K4-renorm",
        "T7-E256-G8-K16",
        "T7-E96-G2-K10",
        "T7-E24-G1-K1-noscale",
        "T17-E15-G3-K6-strided",
        "T17-E15-G3-K6-sliced",
        "T17-E15-G3-K6-offset",
    ],
    "experts": [
        "T17-D40-F24-E15-G3-K6",
        *_tokens("D24-F40-E12-G2-K4"),
        "T17-D40-F24-E4-G4-K4",
        "T17-D40-F24-E24-G1-K4",
        "T64-D40-F24-E15-G3-K6-crowded",
        "T17-D40-F24-E15-G3-K6-strided",
        "T17-D40-F24-E15-G3-K6-sliced",
        "T17-D40-F24-E15-G3-K6-offset",
        "T7-D40-F20-E6-G3-K3",
        "T7-D37-F19-E6-G3-K3",
        "T7-D8-F8-E160-G8-K16",
        "T7-D8-F160-E6-G3-K3",
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
        "T1-E24-G4-K4",
        "T64-E24-G4-K4",
        "T17-E24-G1-K4-noscale",
        "T64-E20-G4-K8-limit2",
        "T17-E4-G4-K4",
        "T17-E64-G8-K8",
    ],
    ("route", "route.close"): [
        "T17-E15-G3-K6",
        "T17-E24-G1-K4-noscale",
        "T17-E64-G8-K8",
    ],
    ("router_logits", "route.ties"): ["T17-D40-E15", "T17-D40-E24"],
    ("attention", "decode"): ["B2-S17-H6-Hkv2-d8", "B1-S17-H4-Hkv4-d32"],
    ("attention", "chunks"): ["B2-S64-H6-Hkv2-d8"],
    ("attention", "ragged"): ["B4-S17-H6-Hkv2-d8"],
    ("attention", "unwritten"): ["B2-S17-H6-Hkv2-d8"],
}
# One case each: inputs that are exact in every dtype, and activations of a residual stream's size,
# whose squares float16 cannot hold.
SPECIAL = {
    "rms_norm": "T17-D40/scale300",
    "add_rms_norm": "T17-D40/scale300",
    "attention": "B2-S17-H6-Hkv2-d64-large/scale1",
    "experts": "T17-D40-F24-E15-G3-K6-cancel/scale1",
}
for _op, _shapes in SHAPES.items():
    # A decode step has one token a row; what is recorded of it is another kernel than of many.
    OTHER_SHAPES[_op, "no-sync"] = [_shapes[0], _shapes[2], _shapes[5]]
    OTHER_SHAPES[_op, "gradients"] = [
        _shapes[0],
        *(s for s in _shapes if "strided" in s or "sliced" in s),
    ]
    # 64 tokens: kernels change at 8, 16 and 32 rows.
    OTHER_SHAPES[_op, "bitwise"] = [_shapes[0], _shapes[5]]
    OTHER_SHAPES[_op, "bitwise"] += [s for s in _shapes if s.startswith("T531")]

OTHER_SHAPES["route", "gradients"] += ["T64-E20-G4-K8-limit2"]


def _gradient_shapes(op: str) -> list[str]:
    """What shows faults of logic alone, in float32: a sum over tokens that ends with a block of
    512, which in low precision depends on how torch adds up the gradient of an index; and idle
    experts, for one token has too few numbers for a limit in low precision."""
    idle = ["T1-D24-F40-E12-G2-K4"] if op == "experts" else []
    return [shape for shape in SHAPES[op] if "531" in shape] + idle


MODELS = (
    "model/f32/tiny-seed0/random",
    "model/f32/tiny-seed1/random",
    "model/f32/shipped/trained",
    "model/bf16/tiny-seed0/random",
    "model/bf16/shipped/trained",
    "model/f16/tiny-seed0/random",
)


@cache
def every_case() -> tuple[Case, ...]:
    """The list, in order."""
    return tuple([*_operations(), *_models()])


def _operations() -> Iterator[Case]:
    for op, shapes in SHAPES.items():
        value, *others = PROPERTIES[op].split()
        for dtype in DTYPES:
            for shape in shapes:
                for scale in SCALES:
                    yield Case(op, dtype, shape, scale, value)
            if op in SPECIAL:
                special, scale = SPECIAL[op].split("/")
                yield Case(op, dtype, special, scale, value)
            for prop in others:
                for shape in OTHER_SHAPES.get((op, prop), shapes[:1]):
                    yield Case(op, dtype, shape, "scale1", prop)
                for shape in _gradient_shapes(op) if (prop, dtype) == ("gradients", "f32") else ():
                    yield Case(op, dtype, shape, "scale1", prop)


def _models() -> Iterator[Case]:
    for model in MODELS:
        for prop in PROPERTIES["model"].split():
            if prop in ("dtype", "no-sync", "far") and "tiny-seed0" not in model:
                continue  # the weights make no difference
            yield parse(f"{model}/{prop}")


def is_quick(case: Case) -> bool:
    """Whether a case is one of the few of every kind: float32 at scale 1 on the usual shape, and
    for none and for one token."""
    if case.dtype_name != "f32":
        return False
    if case.op == "model":
        return "tiny" in case.words and case.sizes["seed"] == 0
    usual = case.shape in SHAPES[case.op][:3] or case.prop not in ("value", "route.valid")
    return usual and case.scale_name == "scale1"
