"""A backend against a golden case: no oracle runs, what is right and how exactly is in the file."""

from pathlib import Path

import torch
from torch import Tensor

from moge_hal.conformance.golden.store import Golden, Output, read
from moge_hal.conformance.inputs import Args
from moge_hal.conformance.judge import worst
from moge_hal.conformance.limits import worst_row
from moge_hal.conformance.oracle import Outputs
from moge_hal.conformance.routing import check_best, check_structure
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure, Skip, Verdict


def judge_file(subject: Subject, path: str | Path) -> Verdict:
    """Runs the operation on the stored inputs and compares it with the stored outputs.

    Raises `Failure` if the backend is wrong, `Skip` if the case does not apply to it and
    `UserError` if the file is no golden case. Whatever else a backend raises comes through.
    """
    golden = read(path)
    case = golden.case
    if case.dtype not in subject.backend.dtypes:
        able = ", ".join(str(dtype).removeprefix("torch.") for dtype in subject.backend.dtypes)
        raise Skip(f"computes in {able} only")
    layer = None
    if golden.cached:
        layer = subject.new_cache(case, len(golden.calls[0]["positions"])).layers[0]
    verdicts = []
    for i, (args, want) in enumerate(zip(golden.calls, golden.want, strict=True)):
        where = f"call {i}: " if len(golden.calls) > 1 else ""
        if golden.cached:
            mixed, layer = subject.call(case, {**args, "cache": layer})
            got: Outputs = (mixed,)
        else:
            got = subject.run(case, args)
        verdicts.append(_compare(golden, args, want, got, where))
    return worst(verdicts)


def _compare(
    golden: Golden, args: Args, want: dict[str, Tensor], got: Outputs, where: str
) -> Verdict:
    if len(got) != len(golden.outputs):
        raise Failure(f"{where}{len(got)} outputs instead of {len(golden.outputs)}")
    named = {}
    for output, part in zip(golden.outputs, got, strict=True):
        found = str(part.dtype).removeprefix("torch."), list(part.shape)
        must = output.dtype, list(want[output.name].shape)
        if found != must:
            raise Failure(f"{where}{output.name} is {found}, must be {must}")
        named[output.name] = part.cpu()
    if golden.case.op == "route":
        return _routes(golden, args, want, named, where)
    return worst(
        [
            _values(output, args, named[output.name], want[output.name], where)
            for output in golden.outputs
        ]
    )


def _values(output: Output, args: Args, got: Tensor, want: Tensor, where: str) -> Verdict:
    if output.compare == "tokens":
        real = args["positions"] >= 0
        if not bool(got.isfinite().all()):
            raise Failure(f"{where}{output.name} is not finite")
        got, want = got[real].flatten(1), want[real].flatten(1)
    error = worst_row(got, want)
    if error > output.limit:
        raise Failure(f"{where}{output.name} is wrong in its worst row", error, output.limit)
    return Verdict(error, output.limit)


def _routes(
    golden: Golden, args: Args, want: dict[str, Tensor], got: dict[str, Tensor], where: str
) -> Verdict:
    """The weights are compared with those of the ids that the backend chose."""
    ids, scores, spec = got["ids"], want["scores"], args["spec"]
    by_name = {output.name: output for output in golden.outputs}
    if by_name["ids"].compare == "equal" and not torch.equal(ids, want["ids"]):
        row = int((ids != want["ids"]).any(-1).nonzero()[0])
        right = want["ids"][row].tolist()
        raise Failure(f"{where}row {row} has ids {ids[row].tolist()}, must be {right}")
    limit = by_name["weights"].limit
    check_structure(ids, spec, scores.shape[1], where)
    if ids.numel() == 0:
        return Verdict(0.0, limit)
    bias = None if args["bias"] is None else args["bias"].double()
    check_best(ids, scores, bias, spec, limit, where)
    chosen = scores.gather(1, ids.long())
    if spec.renormalise:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    chosen = chosen * spec.factor
    if args["scale"] is not None:
        chosen = chosen * args["scale"].double()[ids.long()]
    error = worst_row(got["weights"], chosen)
    if error > limit:
        raise Failure(f"{where}weights are not those of the chosen experts", error, limit)
    return Verdict(error, limit)
