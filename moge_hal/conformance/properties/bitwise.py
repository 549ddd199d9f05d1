"""Bitwise: a token's bits do not depend on what is computed beside it.

Within the limits every backend gives a token the same in any batch. To the last bit it does so only
if no kernel chooses its order of summation by the number of rows, as plain torch's do, and experts
are added up in an order of the token's own. Then a text can be computed again, alone or in another
batch, and be the same text.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moge_hal.conformance.cases import Case
from moge_hal.conformance.inputs import PER_TOKEN, draw, integers
from moge_hal.conformance.properties.caching import chunk_sizes
from moge_hal.conformance.properties.operations import take
from moge_hal.conformance.properties.scenes import Scene, Text, perform
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure, Verdict
from moge_hal.conformance.weights import model_weights


def bitwise(subject: Subject, case: Case) -> Verdict:
    """A row (a token, or in attention a sequence) is the same bits alone, among the first rows of
    its batch, in reverse order and in the batch.

    Guards against: a matrix product that sums another way for one row, for eight and for many;
    tokens sorted by expert and added up in that order; a softmax that is split by the batch's size.
    """
    if case.op == "model":
        return _model(subject, case)
    args = draw(case)
    count = next(len(v) for n, v in args.items() if n in PER_TOKEN and v is not None)
    whole = subject.run(case, args)
    orders = {f"row {row} alone": torch.tensor([row]) for row in {*range(min(count, 5)), count - 1}}
    orders |= {f"the first {n} rows": torch.arange(n) for n in {2, count // 2, count - 1} if n > 1}
    orders["all rows in reverse"] = torch.arange(count - 1, -1, -1)
    for what, order in orders.items() if count else ():
        for part, beside in zip(subject.run(case, take(args, order)), whole, strict=True):
            _same(part, beside[order.to(beside.device)], what)
    return Verdict()


def _model(subject: Subject, case: Case) -> Verdict:
    """The same of whole texts with a cache; and however one is cut into steps."""
    config, weights = model_weights(case)
    model = subject.model(case.shape, config, weights, case.dtype)
    rows, length = 3, 19
    ids = integers(f"{case.id}/ids", rows, length, low=0, high=config.vocab_size)
    positions = torch.arange(length).repeat(rows, 1)

    def told(some: slice, sizes: Sequence[int]) -> Tensor:
        (script,) = perform(
            model, Scene.of("bitwise", Text(ids[some], positions[some]), sizes, length)
        )
        return script.logits

    whole = told(slice(None), [length])
    for row in range(rows):
        _same(told(slice(row, row + 1), [length]), whole[row : row + 1], f"text {row} alone")
    _same(told(slice(None), chunk_sizes(length)), whole, "texts cut into chunks")
    _same(told(slice(None), [length - 3, 1, 1, 1]), whole, "a prompt and single tokens")
    return Verdict()


def _same(part: Tensor, beside: Tensor, what: str) -> None:
    """Compared as integers: -0 is not 0, and a NaN is itself."""
    if part.shape != beside.shape or part.dtype != beside.dtype:
        raise Failure(f"{what}: the output has another shape or dtype than in the batch")
    if part.is_floating_point():
        width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[part.element_size()]
        part, beside = (x.contiguous().view(width) for x in (part, beside))
    differ = int((part != beside).sum())
    if differ:
        raise Failure(
            f"{what}: {differ} of {part.numel()} numbers have other bits than in the batch"
        )
