"""An exported graph against the specification, run by torch on the same weights: prefill, decode, a
batch with padding.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.bind import bind
from moge_hal.config import Config
from moge_hal.errors import UserError
from moge_hal.export.cache import AppendCache
from moge_hal.export.session import OnnxStep
from moge_hal.router import RouteSpec

EXACT = 10**8  # parameters up to which the judge computes in float64
# Worst error of a row of logits relative to its largest; the rounding of a few float32 layers stays
# ten times below.
LIMITS = {torch.float64: 2e-5, torch.float32: 2e-4}
NEAR_TIE = 1e-4  # how far below the best expert left out a chosen one's score may lie, relative

REPORT = "nothing was written; please report it"


class CheckError(UserError):
    """The exported graph does not compute what the model does."""


def check_step(step: OnnxStep, config: Config, weights: Mapping[str, Tensor]) -> float:
    """The worst relative error of the logits. Raises `CheckError` that says which call differs and
    by how much.

    Chosen experts are judged by margin and then forced onto the judge: a near tie may fall either
    way in float32, and then everything after it differs.
    """
    dtype = torch.float64 if config.count_parameters()[0] <= EXACT else torch.float32
    forced = _Forced()
    judge = bind(config, weights, forced, dtype=dtype)
    worst = 0.0
    for name, calls in _sequences(config):
        rows = calls[0][0].shape[0]
        cache, judged = AppendCache.empty(config, rows, 0), judge.new_cache(rows)
        for number, (ids, positions) in enumerate(calls, 1):
            out = step(ids, positions, cache)
            real = positions >= 0
            forced.pending[:] = [(ids_i.long(), real.flatten()) for ids_i in out.routes]
            expected = judge.step(ids, positions, judged)
            cache, judged = out.cache, expected.cache
            error = _relative(out.logits[real].double(), expected.logits[real].double())
            if not error <= LIMITS[dtype]:  # a NaN is an error too
                raise CheckError(
                    f"the exported graph differs from the model: call {number} of {name!r} is off "
                    f"by {error:.1e} of its largest logit (limit {LIMITS[dtype]:.0e}); {REPORT}"
                )
            worst = max(worst, error)
    return worst


def _relative(got: Tensor, expected: Tensor) -> float:
    error = (got - expected).abs().amax(-1) / expected.abs().amax(-1)
    return float(error.max())


def _sequences(config: Config) -> list[tuple[str, list[tuple[Tensor, Tensor]]]]:
    """Name and calls (ids, positions) [B, S]. -1 stands before, behind and between the tokens of
    rows of different lengths.
    """
    context = config.max_position_embeddings
    generator = torch.Generator().manual_seed(0)
    alone = [list(range(n)) for n in (min(7, context),)]
    steps = [[[p]] for p in range(7, min(10, context))]
    padded = [[0, 1, 2, 3, 4], [0, 1, -1, -1, -1], [-1, -1, 0, 1, 2]]
    later = [[[5], [2], [3]], [[6], [-1], [4]], [[7], [3], [-1]]]
    plans = [("one row", [alone, *steps]), ("rows of different lengths", [padded, *later])]
    sequences = []
    for name, plan in plans:
        calls = []
        for rows in plan:
            positions = torch.tensor(rows)
            ids = torch.randint(config.vocab_size, positions.shape, generator=generator)
            calls.append((ids, positions))
        if int(max(p.max() for _, p in calls)) < context:
            sequences.append((name, calls))
    return sequences


class _Forced(Backend):
    """The specification, except that it goes to the experts that it is told.

    pending: for every layer in order, the experts [T, K] and which tokens are real [T]; what
    padding chooses does not matter.
    """

    name = "judge"

    def __init__(self, index: int | None = None) -> None:
        super().__init__(index)
        self.pending: list[tuple[Tensor, Tensor]] = []

    def route(
        self,
        logits: Tensor,
        spec: RouteSpec,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        ids, real = self.pending.pop(0)
        scores = ops.up(logits).softmax(-1)
        taken = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, True)
        groups = (spec.groups, -1)
        lowest = scores.masked_fill(~taken, 2).unflatten(1, groups).amin(-1)
        missed = scores.masked_fill(taken, 0).unflatten(1, groups).amax(-1)
        counts = taken.unflatten(1, groups).sum(-1)
        wrong = (counts != spec.k // spec.groups) | (lowest < missed * (1 - NEAR_TIE))
        if bool(wrong[real].any()):
            raise CheckError(f"the exported graph chooses other experts than the model; {REPORT}")
        weights = scores.gather(1, ids)
        return ids.int(), weights if scale is None else weights * ops.up(scale)[ids]
