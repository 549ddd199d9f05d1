"""Attention over a cache: however a sequence is cut into calls, its output is that of one pass.

The cache is the backend's own (`new_cache`), of one layer.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from moge_hal.conformance.cases import Case
from moge_hal.conformance.inputs import Args, draw
from moge_hal.conformance.judge import allowances, check, worst
from moge_hal.conformance.subject import Subject
from moge_hal.conformance.verdict import Failure, Skip, Verdict

ODD = (1, 3, 7, 5, 9)  # sizes of chunks, over and over


def decode(subject: Subject, case: Case) -> Verdict:
    """A prompt in one call, then one token at a time, equals one pass.

    Guards against: a decode kernel with another mask, scale or head order than prefill's; a mask
    off by one that only shows when the newest key is the last one; a key written after it is read.
    """
    length = case.sizes["S"]
    prompt = length - 5
    return _in_chunks(subject, case, [prompt, *[1] * (length - prompt)])


def chunks(subject: Subject, case: Case) -> Verdict:
    """Prefill in chunks of odd sizes equals one pass.

    Guards against: `is_causal` aligned to the top left corner when there are more keys than
    queries; blocks of a fixed size that drop their tail.
    """
    return _in_chunks(subject, case, chunk_sizes(case.sizes["S"]))


def chunk_sizes(length: int) -> list[int]:
    """Odd sizes that add up to the length."""
    sizes: list[int] = []
    while sum(sizes) < length:
        sizes.append(min(ODD[len(sizes) % len(ODD)], length - sum(sizes)))
    return sizes


def ragged(subject: Subject, case: Case) -> Verdict:
    """Rows of different lengths, padded with position -1, with a cache and without.

    A real token's output is that of its row alone, a padding token's is finite.

    Guards against: padding written over slot 0 or over the newest key; a softmax over nothing
    (NaN), which the next layer spreads; positions counted from the column instead of being read.
    """
    args = dict(draw(case))
    positions = ragged_positions(*args["positions"].shape)
    args["positions"] = positions
    real = positions >= 0
    verdicts = []
    for cached in (False, True):
        if cached:
            got = _attend(subject, case, args, [positions.shape[1] - 3, 1, 1, 1])
        else:
            got = subject.run(case, args)[0].cpu()
        if not bool(got.isfinite().all()):
            raise Failure("the output of a padding token is not finite")
        for row in range(len(positions)):
            alone = {
                n: v[row : row + 1, real[row]] if isinstance(v, Tensor) else v
                for n, v in args.items()
            }
            what = f"row {row} {'with' if cached else 'without'} a cache"
            part = (got[row : row + 1, real[row]],)
            verdicts.append(check(case, part, alone, allowances(case), what))
    return worst(verdicts)


def ragged_positions(batch: int, length: int) -> Tensor:
    """[B, S] with -1 for padding.

    The first row is whole (a backend may look no further); the next ones are padded on the left, on
    the right, and in the middle, where a row waits for the others; and so on.
    """
    column = torch.arange(length)
    rows = []
    for row in range(batch):
        real = [
            column >= 0,
            column >= 6,
            column < length - 5,
            (column < 4) | (column >= 9),
        ][row % 4]
        rows.append(torch.where(real, real.cumsum(0) - 1, -1))
    return torch.stack(rows)


def unwritten(subject: Subject, case: Case) -> Verdict:
    """Slots that nobody has written may hold anything, NaN included.

    Guards against: attention over the whole capacity with a mask on the scores only: 0 * NaN of an
    unwritten value is NaN. Plain scaled_dot_product_attention with a mask does that, and memory
    that is not zeroed holds such values sooner or later.
    """
    length = case.sizes["S"]
    return _in_chunks(subject, case, [length - 4, 3, 1], spoil)


def spoil(cache: Any) -> None:
    """Fills a fresh cache's tensors with NaN; raises `Skip` if it has no slot yet."""
    leaves = [leaf for leaf in _pytree.tree_leaves(cache) if isinstance(leaf, Tensor)]
    slots = [leaf for leaf in leaves if leaf.is_floating_point() and leaf.numel()]
    if not slots:
        raise Skip("its cache has no slots before they are written")
    for slot in slots:
        slot.fill_(float("nan"))


def _in_chunks(
    subject: Subject,
    case: Case,
    sizes: Iterable[int],
    prepare: Callable[[Any], None] = lambda cache: None,
) -> Verdict:
    return check(case, (_attend(subject, case, draw(case), sizes, prepare),))


def _attend(
    subject: Subject,
    case: Case,
    args: Args,
    sizes: Iterable[int],
    prepare: Callable[[Any], None] = lambda cache: None,
) -> Tensor:
    """The outputs of calls of these sizes, side by side: [B, S, H, d]."""
    cache = subject.new_cache(case, case.sizes["B"])
    prepare(cache)
    layer, done, start = cache.layers[0], [], 0
    for size in sizes:
        part = {n: v[:, start : start + size] for n, v in args.items() if isinstance(v, Tensor)}
        mixed, layer = subject.call(case, {**args, **part, "cache": layer})
        done.append(mixed.cpu())
        start += size
    return torch.cat(done, 1)


def masked(subject: Subject, case: Case) -> Verdict:
    """A key that a token must not see may have any score, be it 100,000 times the others' (1,000
    in float16). With a cache and without.

    Guards against: a mask that is a finite number added to the scores, which a large enough score
    outweighs: the token then sees the future, or padding.
    """
    args = dict(draw(case))
    length = case.sizes["S"]
    positions = args["positions"].clone()
    positions[-1] = (torch.arange(length) - 2).clamp_min(-1)
    keys = args["k"].clone()
    huge = 1e3 if case.dtype == torch.float16 else 1e5  # an infinite key is another matter
    keys[:, -1] *= huge  # the future of all but the last token
    keys[-1, :2] *= huge  # padding
    args["k"], args["positions"] = keys, positions
    plain, cached = subject.run(case, args)[0].cpu(), _attend(subject, case, args, [length])
    real = positions >= 0
    real[:, -1] = False
    verdicts = []
    for row in range(len(positions)):
        alone = {
            n: v[row : row + 1, real[row]] if isinstance(v, Tensor) else v for n, v in args.items()
        }
        for how, got in (("without", plain), ("with", cached)):
            part = (got[row : row + 1, real[row]],)
            what = f"row {row} {how} a cache, beside a huge key that it must not see"
            verdicts.append(check(case, part, alone, allowances(case), what))
    return worst(verdicts)


PROPERTIES = {
    "decode": decode,
    "chunks": chunks,
    "ragged": ragged,
    "unwritten": unwritten,
    "masked": masked,
}
