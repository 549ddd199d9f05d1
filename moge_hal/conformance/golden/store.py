"""Golden cases: the inputs and right outputs of an operation in a file, for whoever has no oracle.

A file is an .npz that numpy opens without pickle: the arguments of one or more calls, the outputs
of the specification in float64, and a JSON text with the rest, the limit of each output included.
`README.md` beside this is the format, complete. Whoever finds a wrong answer in the field saves it
as another one with `write`.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from math import isfinite
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, ZipInfo

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.conformance.cases import DTYPES, Case, parse
from moge_hal.conformance.inputs import Args
from moge_hal.conformance.judge import Allowance, measure
from moge_hal.conformance.oracle import exact
from moge_hal.errors import UserError, close_matches
from moge_hal.files import write_file
from moge_hal.router import RouteSpec

FORMAT, VERSION = "moge-hal golden case", 1
# The names of an operation's outputs; of any other it is `y`.
OUTPUTS = {"add_rms_norm": ("normed", "total"), "rotary": ("q", "k"), "route": ("ids", "weights")}
_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can name: the same bytes every time


@dataclass(frozen=True)
class Output:
    """What an output must be like."""

    name: str
    dtype: str  # float32, bfloat16, float16 or int32
    limit: float
    compare: str  # rows, tokens, margin or equal: see golden/README.md


@dataclass(frozen=True)
class Golden:
    """What a file holds."""

    case: Case
    note: str
    calls: list[Args]
    cached: bool  # the calls share one cache, which was new before the first
    want: list[dict[str, Tensor]]  # of each call, by name: float64, but ids int32
    outputs: list[Output]


@dataclass(frozen=True)
class Unlisted(Case):
    """A case of inputs that were not drawn: its id describes them and cannot give them back."""

    router: RouteSpec | None = None

    @property
    def spec(self) -> RouteSpec | None:
        return self.router or super().spec


def write(
    path: str | Path,
    op: str,
    calls: Args | Sequence[Args],
    *,
    case: Case | None = None,
    note: str = "",
) -> Path:
    """Saves calls of an operation with the specification's outputs and their limits.

    calls: arguments by the names of `ops.py`; tensors on any device and of any layout, weights as
    they are before packing. One call, or for `attention` a list of them: one after the other over
    one new cache, whose argument `cache` is None or missing. case: the listed one that the inputs
    belong to; None = any inputs at all. note: for the reader of the file.

    Raises `UserError` for arguments that the operation does not take, a dtype that has no limits,
    outputs that are not finite, and a path that cannot be written.
    """
    golden = _record(op, calls, case, note)
    write_file(path, _pack(golden))
    return Path(path)


def _record(op: str, calls: Args | Sequence[Args], case: Case | None, note: str) -> Golden:
    if op not in ops.NAMES:
        raise UserError(f"no operation {op!r}.{close_matches(op, ops.NAMES)}")
    cached = not isinstance(calls, Mapping)
    listed = [_complete(op, args) for args in ([calls] if isinstance(calls, Mapping) else calls)]
    if cached and (op != "attention" or not listed):
        raise UserError(f"{op} takes one call; only attention takes a list of them, of at least 1")
    joined = listed[0] if len(listed) == 1 else _joined(listed)
    case = case or case_of(op, joined)
    if op == "attention":
        y, allowed = _attention(case, joined, cached)
        sizes = [args["q"].shape[1] for args in listed]
        want = [{"y": part} for part in y.split(sizes, 1)]
    else:
        allowed = measure(case, joined)
        names = OUTPUTS.get(op, ("y",))
        want = [dict(zip(names, exact(op, joined), strict=True))]
    if op == "route":
        wide = joined["logits"].double()
        softmax = joined["spec"].score == "softmax"
        want[0]["scores"] = wide.softmax(-1) if softmax else wide.sigmoid()
    finite = all(isfinite(a.limit) for a in allowed)
    if not finite or not all(bool(y.isfinite().all()) for part in want for y in part.values()):
        raise UserError(f"the outputs of {op} for these inputs are not finite and have no limit")
    return Golden(case, note, listed, cached, want, _outputs(case, allowed))


def _complete(op: str, args: Args) -> Args:
    """All arguments in the order of the contract, tensors on the host."""
    given = {"cache": None, **args} if op == "attention" else args
    if given.get("cache") is not None:
        raise UserError("a filled cache cannot be saved; give a list of the calls that filled it")
    try:
        bound = inspect.signature(getattr(Backend, op)).bind(None, **given)
    except TypeError as error:
        raise UserError(f"these are not the arguments of {op}: {error}") from None
    bound.apply_defaults()
    return {
        name: value.detach().cpu().contiguous() if isinstance(value, Tensor) else value
        for name, value in list(bound.arguments.items())[1:]
    }


def _joined(calls: list[Args]) -> Args:
    """Calls over a cache as the one call without, along S."""
    return {
        name: None if value is None else torch.cat([args[name] for args in calls], 1)
        for name, value in calls[0].items()
    }


def _attention(case: Case, args: Args, cached: bool) -> tuple[Tensor, list[Allowance]]:
    """Row by row, without padding, whose output is nobody's: zeros here. [B, S, H, d]."""
    y = torch.zeros(args["q"].shape, dtype=torch.float64)
    allowed = []
    for row, positions in enumerate(args["positions"]):
        real = positions >= 0
        if cached and positions[real].tolist() != list(range(int(real.sum()))):
            raise UserError(
                f"row {row} has positions {positions[real].tolist()}, which do not count up from "
                f"0: the calls before are missing"
            )
        alone = {n: v[row : row + 1, real] if isinstance(v, Tensor) else v for n, v in args.items()}
        y[row, real] = exact("attention", alone)[0][0]
        allowed += measure(case, alone)
    allowed = allowed or measure(case, args)
    return y, [max(allowed, key=lambda allowance: allowance.limit)]


def _outputs(case: Case, allowed: list[Allowance]) -> list[Output]:
    names = OUTPUTS.get(case.op, ("y",))
    outputs = []
    for name, allowance in zip(names, allowed, strict=True):
        compare = "tokens" if case.op == "attention" else "rows"
        if name == "ids":
            compare = "equal" if case.prop == "route.ties" else "margin"
        dtype = str(allowance.dtype).removeprefix("torch.")
        outputs.append(Output(name, dtype, allowance.limit, compare))
    return outputs


def case_of(op: str, args: Args) -> Case:
    """The sizes and the dtype of any arguments, as a case. Raises `UserError` if it has no
    limits."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    lead = args[{"embed": "w", "route": "logits", "rotary": "q", "attention": "q"}.get(op, "x")]
    if lead.dtype not in names:
        raise UserError(f"{op} in {lead.dtype} has no limits; it must be in {', '.join(DTYPES)}")
    shape = "-".join(f"{letter}{size}" for letter, size in _sizes(op, args).items())
    shape += "-nobias" if op == "linear" and args["b"] is None else ""
    spec: RouteSpec | None = args.get("spec")
    if spec is not None:
        shape += f"-limit{spec.limit_groups}" if spec.limit_groups else ""
        shape += "-noscale" if args["scale"] is None and not spec.limit_groups else ""
    prop = "route.valid" if op == "route" else "value"
    return Unlisted(op, names[lead.dtype], shape, "scale1", prop, spec)


def _sizes(op: str, args: Args) -> dict[str, int]:
    """By letter. All that can be told of `experts` of a rank are those that it was given."""
    if op in ("rotary", "attention"):
        batch, length, heads, size = args["q"].shape
        if op == "attention":  # positions that a cache must have room for
            length = max([length, *(args["positions"] + 1).flatten().tolist()])
        return {"B": batch, "S": length, "H": heads, "Hkv": args["k"].shape[2], "d": size}
    if op == "embed":
        return {"T": len(args["ids"]), "V": len(args["w"]), "D": args["w"].shape[1]}
    if op == "route":
        tokens, experts = args["logits"].shape
        return {"T": tokens, "E": experts, "G": args["spec"].groups, "K": args["spec"].k}
    tokens, width = args["x"].shape
    if op == "linear":
        return {"T": tokens, "I": width, "O": len(args["w"])}
    sizes = {"T": tokens, "D": width}
    if op in ("swiglu_ffn", "experts"):
        sizes["F"] = args["down"].shape[-1]
    if op == "router_logits":
        sizes["E"] = len(args["w"])
    if op == "experts":
        held = max([len(args["down"]) + args["first"], *(args["ids"] + 1).flatten().tolist()])
        sizes |= {"E": held, "G": 1, "K": args["ids"].shape[1]}
    return sizes


# The file.


def _pack(golden: Golden) -> bytes:
    """The same bytes every time: members in order, not compressed, with a fixed date."""
    constants: dict[str, Any] = {}
    arrays: dict[str, npt.NDArray[Any]] = {}
    for i, (args, want) in enumerate(zip(golden.calls, golden.want, strict=True)):
        for name, value in args.items():
            if not isinstance(value, Tensor):
                constants[name] = asdict(value) if isinstance(value, RouteSpec) else value
            elif value.dtype == torch.bfloat16:
                arrays[f"{i}.in.{name}.bf16"] = value.view(torch.int16).numpy().view(np.uint16)
            else:
                arrays[f"{i}.in.{name}"] = value.numpy()
        for name, value in want.items():
            arrays[f"{i}.out.{name}"] = value.contiguous().numpy()
    about = {
        "format": FORMAT,
        "version": VERSION,
        "case": None if isinstance(golden.case, Unlisted) else golden.case.id,
        "operation": golden.case.op,
        "note": golden.note,
        "calls": len(golden.calls),
        "cached": golden.cached,
        "arguments": list(golden.calls[0]),
        "constants": constants,
        "outputs": [asdict(output) for output in golden.outputs],
    }
    text = json.dumps(about, indent=1, allow_nan=False, ensure_ascii=False)
    arrays = {"about": np.frombuffer(text.encode(), np.uint8), **arrays}
    packed = BytesIO()
    with ZipFile(packed, "w") as archive:
        for name, array in arrays.items():
            member = BytesIO()
            np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
            archive.writestr(ZipInfo(f"{name}.npy", _DATE), member.getvalue())
    return packed.getvalue()


def read(path: str | Path) -> Golden:
    """What a file holds. Raises `UserError` if it is none, or of another version."""
    try:
        with ZipFile(path) as archive:
            arrays = {
                name.removesuffix(".npy"): np.lib.format.read_array(
                    BytesIO(archive.read(name)), allow_pickle=False
                )
                for name in archive.namelist()
            }
        about = json.loads(arrays.pop("about").tobytes())
        kind = about["format"], about["version"]
        golden = _unpack(about, arrays) if kind == (FORMAT, VERSION) else None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (BadZipFile, LookupError, TypeError, ValueError, AttributeError) as error:
        sentence = f"{path} is no golden case ({type(error).__name__}: {error}); save it anew"
        raise UserError(sentence) from None
    if golden is None:
        known = f"{FORMAT!r} of version {VERSION}"
        raise UserError(f"{path} is {kind[0]!r} of version {kind[1]}; this package reads {known}")
    return golden


def _unpack(about: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> Golden:
    op, count = about["operation"], about["calls"]
    constants = dict(about["constants"])
    if constants.get("spec") is not None:
        constants["spec"] = RouteSpec(**constants["spec"])
    calls: list[Args] = [dict(constants) for _ in range(count)]
    want: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for key, array in arrays.items():
        call, side, name = key.removesuffix(".bf16").split(".")
        bits = array.view(np.int16) if key.endswith(".bf16") else array
        tensor = torch.from_numpy(bits.copy())
        tensor = tensor.view(torch.bfloat16) if key.endswith(".bf16") else tensor
        (calls if side == "in" else want)[int(call)][name] = tensor
    calls = [{name: args[name] for name in about["arguments"]} for args in calls]
    calls = [_complete(op, args) for args in calls]
    joined = _joined(calls) if count > 1 else calls[0]
    case = parse(about["case"]) if about["case"] else case_of(op, joined)
    outputs = [Output(**output) for output in about["outputs"]]
    for one in want:
        needs = [output.name for output in outputs] + (["scores"] if op == "route" else [])
        if sorted(one) != sorted(needs):
            raise ValueError(f"outputs {sorted(one)} instead of {sorted(needs)}")
    return Golden(case, about["note"], calls, about["cached"], want, outputs)
