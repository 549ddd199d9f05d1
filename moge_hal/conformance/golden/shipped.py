"""The shipped golden cases: small, every operation, every dtype, every rule that a port gets wrong.

A case's id gives its inputs, as in the suite, but for properties that change them (`_calls`).
"""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from moge_hal.conformance.cases import Case, parse
from moge_hal.conformance.golden.store import write
from moge_hal.conformance.inputs import Args, draw, integers
from moge_hal.conformance.properties.caching import ragged_positions
from moge_hal.errors import UserError

FOLDER = Path(__file__).with_name("cases")

# By id: what the case is there for.
CASES = {
    "embed/f32/T7-V13-D6/scale1/value": "Rows of a table.",
    "embed/bf16/T7-V13-D6/scale30/value": "Rows of a table in bfloat16.",
    "linear/f32/T7-I12-O10/scale1/value": "A product with a bias.",
    "linear/f32/T1-I600-O3-nobias/scale1/value": "One token (decode), a long sum, no bias.",
    "linear/bf16/T7-I12-O10/scale1/value": "A product in bfloat16.",
    "linear/f16/T7-I12-O10-nobias/scale30/value": "A product in float16 without a bias.",
    "rms_norm/f32/T7-D12/scale0.01/value": "Small inputs, where the place of epsilon decides.",
    "rms_norm/bf16/T7-D12/scale1/value": "Computed in float32 inside, rounded once.",
    "add_rms_norm/f32/T7-D12/scale0.01/value": "The norm of a sum, and the sum.",
    "add_rms_norm/f16/T7-D12/scale30/value": "The same in float16.",
    "rotary/f32/B2-S5-H4-Hkv2-d6/scale1/value": "Halves of a head are paired, not neighbours.",
    "rotary/bf16/B2-S5-H4-Hkv2-d6/scale1/value": "The same in bfloat16.",
    "attention/f32/B2-S7-H6-Hkv2-d4/scale1/value": "Grouped queries, causal; H, Hkv and d differ.",
    "attention/bf16/B2-S7-H6-Hkv2-d4/scale30/value": "Sharp and in bfloat16.",
    "attention/f32/B2-S9-H4-Hkv2-d4/scale1/decode": "A prompt, then single tokens, over a cache.",
    "attention/f16/B2-S9-H4-Hkv2-d4/scale1/decode": "The same in float16.",
    "attention/f32/B4-S12-H4-Hkv2-d4/scale1/ragged": "Padding (-1) left, right and in the middle.",
    "attention/f32/B4-S12-H4-Hkv2-d4/scale1/chunks": "Ragged rows over a cache, in chunks.",
    "swiglu_ffn/f32/T7-D12-F10/scale1/value": "Gate rows come first.",
    "swiglu_ffn/f16/T7-D12-F10/scale0.01/value": "The same in float16.",
    "swiglu_ffn/bf16/T7-D12-F10/scale30/value": "Saturated gates in bfloat16.",
    "router_logits/f32/T7-D12-E15/scale1/value": "The router's logits.",
    "router_logits/bf16/T7-D12-E15/scale1/value": "Float32 logits of a bfloat16 model.",
    "route/f32/T17-E15-G3-K6/scale1/route.valid": "MoGE: 2 of each 5, signed router_scale.",
    "route/f32/T17-E15-G3-K6/scale30/route.valid": "Scores from 1 down to 1e-50.",
    "route/f32/T17-E24-G4-K4-noscale/scale1/route.valid": "One expert of each group, as in Pangu.",
    "route/f32/T7-E4-G4-K4/scale1/route.valid": "E = G = K: every expert, in order.",
    "route/f32/T17-E24-G1-K4-noscale/scale1/route.valid": "A plain top-k.",
    "route/f32/T17-E20-G4-K6-limit2/scale1/route.valid": "DeepSeek-V3: bias, limit, factor.",
    "route/f32/T17-E15-G3-K6/scale1/route.ties": "Equal logits: the lowest index wins.",
    "route/f32/T17-E20-G4-K6-limit2/scale1/route.ties": "Equal groups: the lowest index wins.",
    "experts/f32/T7-D8-F6-E6-G3-K3/scale1/value": "Signed weights.",
    "experts/f32/T0-D8-F6-E6-G3-K3/scale1/value": "No token at all.",
    "experts/f32/T7-D8-F6-E6-G3-K3-crowded/scale1/value": "All tokens choose the same experts.",
    "experts/bf16/T7-D8-F6-E6-G3-K3/scale1/value": "Experts in bfloat16, weights in float32.",
    "experts/f16/T7-D8-F6-E6-G3-K3/scale30/value": "The same in float16.",
    "experts/f32/T7-D8-F6-E6-G3-K3/scale1/expert-parallel": "The rank that owns the second group.",
    "experts/f32/T1-D8-F6-E6-G3-K3/scale1/unselected": "An expert that nobody chose is NaN.",
}


def files() -> list[Path]:
    """The shipped files, in the order of their names. Raises `UserError` if there are none."""
    found = sorted(FOLDER.glob("*.npz"))
    if not found:
        raise UserError(f"{FOLDER} holds no golden cases: install the package anew")
    return found


def regenerate(folder: str | Path) -> list[Path]:
    """Writes the shipped files into a folder, the same bytes on the same machine."""
    return [
        write(Path(folder, file_name(name)), case.op, _calls(case), case=case, note=note)
        for name, note in CASES.items()
        for case in [parse(name)]
    ]


def file_name(name: str) -> str:
    """The file of a case's id."""
    return name.replace("/", "_") + ".npz"


def _calls(case: Case) -> Args | list[Args]:
    """The case's own arguments, changed as its property says; a list is for calls over a cache."""
    args = dict(draw(case))
    match case.prop:
        case "route.ties":
            # Sums of two sigmoids of these numbers are equal only if the numbers are.
            few = integers(f"{case.key}/few", *args["logits"].shape, low=0, high=3).float()
            few[0] = 0.0  # a row of padding
            bias = None if args["bias"] is None else torch.zeros_like(args["bias"])
            return {**args, "logits": few, "bias": bias}
        case "ragged":
            return {**args, "positions": ragged_positions(*args["positions"].shape)}
        case "chunks":
            args["positions"] = ragged_positions(*args["positions"].shape)
            return _cut(args, 3, 10)
        case "decode":
            length = case.sizes["S"]
            return _cut(args, length - 2, length - 1)
        case "expert-parallel":
            first = case.sizes["E"] // case.sizes["G"]
            own = {name: args[name][first : 2 * first] for name in ("gate_up", "down")}
            return {**args, **own, "first": first}
        case "unselected":
            idle = torch.ones(case.sizes["E"], dtype=torch.bool)
            idle[args["ids"].long()] = False
            nan = {name: args[name].clone() for name in ("gate_up", "down")}
            for weight in nan.values():
                weight[idle] = float("nan")
            return {**args, **nan}
        case _:
            return args


def _cut(args: Args, *ends: int) -> list[Args]:
    """Three calls: tokens 0 .. ends[0] - 1, then up to ends[1], then the rest."""
    bounds = pairwise((0, *ends, args["q"].shape[1]))
    return [
        {n: v[:, start:end] if isinstance(v, Tensor) else v for n, v in args.items()}
        for start, end in bounds
    ]
