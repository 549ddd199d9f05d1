"""The n-gram yardstick against the same model in fractions, and its sum over all bytes."""

import math
from collections import Counter, defaultdict
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moge_hal.errors import UserError
from moge_hal.training.ngram import ngram_bits_per_byte

TEXT = b"a man, a plan, a canal: Panama! a man and a plan"


def by_hand(train: bytes, held_out: bytes, order: int) -> float:
    """Interpolated Witten-Bell as its recursion reads."""
    counts: defaultdict[bytes, Counter[int]] = defaultdict(Counter)
    for at, byte in enumerate(train):
        for n in range(min(order - 1, at) + 1):
            counts[train[at - n : at]][byte] += 1

    def probability(byte: int, context: bytes) -> Fraction:
        lower = probability(byte, context[1:]) if context else Fraction(1, 256)
        seen = counts.get(context)
        if seen is None:
            return lower
        return (seen[byte] + len(seen) * lower) / (seen.total() + len(seen))

    bits = [
        -math.log2(probability(byte, held_out[max(0, at - order + 1) : at]))
        for at, byte in enumerate(held_out)
    ]
    return sum(bits) / len(bits)


@given(st.binary(min_size=1, max_size=60), st.binary(min_size=1, max_size=20), st.integers(1, 8))
def test_equals_the_model_by_hand(train: bytes, held_out: bytes, order: int) -> None:
    expected = by_hand(train, held_out, order)
    assert ngram_bits_per_byte(train, held_out, order) == pytest.approx(expected, rel=1e-9)


@given(st.text("abc", min_size=1, max_size=200), st.text("abcd", min_size=1, max_size=50))
def test_equals_the_model_by_hand_where_contexts_repeat(train: str, held_out: str) -> None:
    expected = by_hand(train.encode(), held_out.encode(), 5)
    assert ngram_bits_per_byte(train, held_out) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("context", [b"", b"a", b" a ", b"plan", b"zzzz", b"xplan", b"Pan\xff"])
def test_the_probabilities_of_all_bytes_sum_to_one(context: bytes) -> None:
    def bits(text: bytes) -> float:
        return ngram_bits_per_byte(TEXT, text) * len(text) if text else 0.0

    total = sum(2 ** (bits(context) - bits(context + bytes([byte]))) for byte in range(256))
    assert total == pytest.approx(1, abs=1e-9)


def test_refuses_what_it_cannot_count() -> None:
    with pytest.raises(UserError, match="order"):
        ngram_bits_per_byte(TEXT, TEXT, order=9)
    with pytest.raises(UserError, match="a text to count"):
        ngram_bits_per_byte(b"", TEXT)
    with pytest.raises(UserError, match="a text to judge"):
        ngram_bits_per_byte(TEXT, "")
