"""A yardstick for a small language model: what counting bytes gets, in bits per byte.

An n-gram model over bytes with interpolated Witten-Bell smoothing (Witten and Bell 1991; Chen and
Goodman 1998, section 2.5):

    p(c | h) = (count(h c) + kinds(h) p(c | h')) / (count(h) + kinds(h))

h is the context, h' the context without its first byte, count(h) how often a byte followed h in
training, kinds(h) how many different ones did. Below the empty context lies the uniform 1/256; an
unseen context passes p(c | h') on. So every byte has probability above zero and they sum to one.
"""

import numpy as np
import numpy.typing as npt

from moge_hal.errors import UserError

Keys = npt.NDArray[np.uint64]


def ngram_bits_per_byte(train: bytes | str, held_out: bytes | str, order: int = 5) -> float:
    """Bits per byte of `held_out` under an n-gram model of `order` bytes (a context of order - 1)
    counted in `train`.

    A string counts as its UTF-8. The first bytes of `held_out` have the shorter contexts that there
    are.
    Raises UserError if a text is empty or order is not 1 to 8.
    """
    seen, judged = (
        np.frombuffer(text.encode() if isinstance(text, str) else text, dtype=np.uint8)
        for text in (train, held_out)
    )
    if not 1 <= order <= 8:  # an n-gram is the key of its bytes in 64 bits
        raise UserError(f"the order of an n-gram model must be 1 to 8, not {order}")
    if not seen.size or not judged.size:
        raise UserError("the n-gram model needs a text to count and a text to judge")
    probability = np.full(judged.size, 1 / 256)
    for n in range(1, min(order, seen.size, judged.size) + 1):
        grams, counts = np.unique(_grams(seen, n), return_counts=True)
        # The grams are sorted, so those of one context stand together.
        contexts, first, kinds = np.unique(_contexts(grams), return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        asked = _grams(judged, n)
        context = _contexts(asked)
        kinds_asked = _look_up(contexts, kinds, context)
        weight = _look_up(contexts, totals, context) + kinds_asked
        lower = probability[n - 1 :]
        mixed = _look_up(grams, counts, asked) + kinds_asked * lower
        probability[n - 1 :] = np.where(weight > 0, mixed / np.maximum(weight, 1), lower)
    return float(-np.log2(probability).mean())


def _grams(text: npt.NDArray[np.uint8], n: int) -> Keys:
    """[T] bytes -> [T - n + 1] keys: the n bytes that end at each place, the last lowest."""
    keys = np.zeros(text.size - n + 1, dtype=np.uint64)
    for at in range(n):
        keys <<= np.uint64(8)
        keys |= text[at : text.size - n + 1 + at]
    return keys


def _contexts(grams: Keys) -> Keys:
    """The keys without their last byte."""
    contexts: Keys = grams >> np.uint64(8)
    return contexts


def _look_up(keys: Keys, values: npt.NDArray[np.int64], asked: Keys) -> npt.NDArray[np.int64]:
    """The values of the keys asked for, 0 where there is none; `keys` sorted."""
    at = np.minimum(np.searchsorted(keys, asked), keys.size - 1)
    found: npt.NDArray[np.int64] = np.where(keys[at] == asked, values[at], 0)
    return found
