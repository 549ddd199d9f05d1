"""How the next token is chosen from logits: on the host, by one function for every backend.

It is no operation, so that two backends with the same logits write the same text. The draw inverts
the cumulative distribution in float64; its uniform number depends on (seed, row, number of the new
token) and on nothing else: not on the order of draws, the size of the batch or the platform.
"""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moge_hal.errors import UserError, is_number, refuse, require_whole


@dataclass(frozen=True)
class Sampling:
    """The rule by which tokens are chosen.

    temperature: logits are divided by it; 0 = greedy, always the largest logit.
    top_k: only the k most probable tokens compete; None = all.
    top_p: of these, only the smallest set whose share of their probability reaches p; None = all.
    seed: another seed, another text; greedy text has none.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (is_number(self.temperature) and 0 <= self.temperature <= sys.float_info.max):
            refuse("temperature", self.temperature, "must be a number of at least 0 (0 = greedy)")
        if self.top_k is not None:
            require_whole("top_k", self.top_k)
        if self.top_p is not None and not (is_number(self.top_p) and 0 < self.top_p <= 1):
            refuse("top_p", self.top_p, "must be a number above 0 and at most 1")
        if not (type(self.seed) is int and 0 <= self.seed < 2**64):
            refuse("seed", self.seed, "must be a whole number from 0 to 2**64 - 1")

    def choose(self, logits: NDArray[Any], row: int, number: int) -> int:
        """The id of a row's new token; logits [V] float32 or float64, number = 0 for its first one.

        -inf excludes a token; of equal logits the lowest id comes first, in all three rules.
        Raises UserError if the largest logit is NaN or infinite: there is no honest choice then.
        """
        best = int(logits.argmax())  # numpy's argmax: the first largest, and NaN is above all
        if not np.isfinite(logits[best]):
            raise UserError(
                f"the largest logit of row {row} for its new token {number} is {logits[best]}, so "
                f"no token can be chosen: the weights or the backend's arithmetic are broken; "
                f"compare with another backend"
            )
        if self.temperature == 0:
            return best
        ids, mass = self._candidates(logits)
        drawn = uniform(self.seed, row, number) * mass[-1]  # below mass[-1], also when rounded
        return int(ids[np.searchsorted(mass, drawn, side="right")])

    def _candidates(self, logits: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """The ids that compete, most probable first, and the running sum of their mass (exp)."""
        # Sorted by logit, not by exp: the same order with no rounding in it.
        ids = np.arange(len(logits))
        if self.top_k is not None and self.top_k < len(ids):  # so that a large V is not sorted
            ids = np.flatnonzero(logits >= np.partition(logits, -self.top_k)[-self.top_k])
        ids = ids[np.argsort(-logits[ids], kind="stable")][: self.top_k]
        with np.errstate(over="ignore"):  # a temperature near 0 may well give -inf, which is mass 0
            scaled = (logits[ids].astype(np.float64) - float(logits[ids[0]])) / self.temperature
        mass = np.exp(scaled).cumsum()
        if self.top_p is not None:
            kept = int(np.searchsorted(mass, self.top_p * mass[-1], side="left")) + 1
            ids, mass = ids[:kept], mass[:kept]
        return ids, mass


def uniform(seed: int, row: int, number: int) -> float:
    """In [0, 1): the upper 53 bits of Philox4x64-10 (Salmon et al. 2011), the same everywhere.

    Its key is (seed, row), its counter is number + 1: numpy steps before it generates.
    """
    key, counter = np.array([seed, row], np.uint64), np.array([number, 0, 0, 0], np.uint64)
    bits = np.random.Philox(key=key, counter=counter).random_raw()
    return (int(bits) >> 11) * 2.0**-53
