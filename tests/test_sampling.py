"""The sampler against slow programs that share no line with it, and against known probabilities."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moge_hal.errors import UserError
from moge_hal.sampling import Sampling, uniform

SEEDS = st.integers(0, 2**64 - 1)
NUMBERS = st.integers(0, 2**40)
# Few distinct values, so that ties are common; any value, so that the rest is not all round.
LOGITS = st.lists(
    st.one_of(st.sampled_from([-math.inf, -1.0, 0.0, 1.0]), st.floats(-30, 30, width=32)),
    min_size=1,
    max_size=40,
).filter(lambda values: max(values) > -math.inf)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as in Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"."""
    mask = 2**64 - 1
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(b >> 64) ^ c[1] ^ k[0], b & mask, (a >> 64) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


def test_the_reference_generator_gives_the_published_numbers() -> None:
    """Known answers of Random123, where Philox comes from."""
    assert philox([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@given(SEEDS, NUMBERS, NUMBERS)
def test_uniform_is_philox(seed: int, row: int, number: int) -> None:
    bits = philox([number + 1, 0, 0, 0], [seed, row])[0]
    assert uniform(seed, row, number) == (bits >> 11) / 2**53


def test_uniform_numbers_differ_along_every_axis() -> None:
    drawn = {uniform(s, r, n) for s in range(10) for r in range(10) for n in range(10)}
    assert len(drawn) == 1000


def reference(
    logits: list[float],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    u: float,
) -> int:
    """The rule read aloud: sort, keep k, keep p, walk until the mass exceeds u."""
    ids = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    mass = [math.exp((logits[i] - logits[ids[0]]) / temperature) for i in ids]
    if top_p is not None:
        kept, sum_ = 0, 0.0
        while sum_ < top_p * sum(mass):
            sum_ += mass[kept]
            kept += 1
        ids, mass = ids[:kept], mass[:kept]
    walked = 0.0
    for i, m in zip(ids, mass, strict=True):
        walked += m
        if walked > u * sum(mass):
            return i
    raise AssertionError("the walk has to end inside")


@given(
    LOGITS,
    st.floats(0.05, 10),
    st.none() | st.integers(1, 50),
    st.none() | st.floats(0.01, 1),
    SEEDS,
    st.integers(0, 99),
    st.integers(0, 99),
)
def test_chooses_what_the_reference_chooses(
    logits: list[float],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    row: int,
    number: int,
) -> None:
    sampling = Sampling(temperature, top_k, top_p, seed)
    expected = reference(logits, temperature, top_k, top_p, uniform(seed, row, number))
    assert sampling.choose(np.array(logits), row, number) == expected
    # The backends' dtype: the same numbers in float32 give the same token.
    assert sampling.choose(np.array(logits, np.float32), row, number) == expected


@given(LOGITS, SEEDS)
def test_greedy_is_the_largest_and_of_equals_the_lowest(logits: list[float], seed: int) -> None:
    best = logits.index(max(logits))
    for sampling in (
        Sampling(seed=seed),
        Sampling(1.0, top_k=1, seed=seed),
        Sampling(1.0, top_p=1e-9, seed=seed),
    ):
        assert sampling.choose(np.array(logits), 0, 0) == best


@given(LOGITS, SEEDS)
def test_a_temperature_near_zero_draws_among_the_largest_only(
    logits: list[float], seed: int
) -> None:
    chosen = Sampling(5e-324, seed=seed).choose(np.array(logits), 0, 0)
    assert logits[chosen] == max(logits)


def test_logits_are_not_changed() -> None:
    logits = np.array([0.5, -math.inf, 2.0])
    before = logits.copy()
    Sampling(0.7, 2, 0.9).choose(logits, 0, 0)
    assert np.array_equal(logits, before)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.4, 0.1, 0.3, 0.2]),
        (Sampling(2.0), [p**0.5 for p in (0.4, 0.1, 0.3, 0.2)]),
        (Sampling(1.0, top_k=3), [4 / 9, 0, 3 / 9, 2 / 9]),
        (Sampling(1.0, top_p=0.69), [4 / 7, 0, 3 / 7, 0]),
        (Sampling(1.0, top_p=0.71), [4 / 9, 0, 3 / 9, 2 / 9]),
        # p is a share of what the k have: 4/9 is below 0.6, 7/9 is not.
        (Sampling(1.0, top_k=3, top_p=0.6), [4 / 7, 0, 3 / 7, 0]),
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(sampling: Sampling, expected: list[float]) -> None:
    """Chi-square over 4,000 draws, along rows and numbers; the seed is fixed, so is the verdict."""
    logits = np.log([0.4, 0.1, 0.3, 0.2])
    counts = Counter(sampling.choose(logits, row, n) for row in range(40) for n in range(100))
    shares = [e / sum(expected) for e in expected]
    assert all(counts[i] == 0 for i, share in enumerate(shares) if share == 0)
    chi_square = sum(
        (counts[i] - 4000 * share) ** 2 / (4000 * share)
        for i, share in enumerate(shares)
        if share > 0
    )
    assert chi_square < 16.3  # of 3 degrees of freedom: exceeded by one seed in a thousand


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("logits", "seen"),
    [
        ([0.0, math.nan, 1.0], "nan"),
        ([math.inf, math.nan, 1.0], "nan"),
        ([0.0, math.inf], "inf"),
        ([-math.inf, -math.inf], "-inf"),
    ],
)
def test_broken_logits_are_an_error(logits: list[float], seen: str, temperature: float) -> None:
    with pytest.raises(UserError, match=f"row 3 for its new token 7 is {seen},"):
        Sampling(temperature).choose(np.array(logits), 3, 7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", v) for v in (-0.1, math.nan, math.inf, 10**400, "1", True, None)],
        *[("top_k", v) for v in (0, -1, 1.5, True)],
        *[("top_p", v) for v in (0, -0.5, 1.01, math.nan, "0.9")],
        *[("seed", v) for v in (-1, 2**64, 0.5, None)],
    ],
)
def test_a_bad_field_is_named_with_its_value(field: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        Sampling(**{field: value})
    assert str(caught.value).startswith(f"{field} = {value!r} must be a ")
