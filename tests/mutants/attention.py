"""Attention that sees the wrong keys or mixes them wrongly. Its cache: caches.py."""

import math
from typing import Any

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend


class Spelled(Backend):
    """A right attention, a method for every decision. Each mutant takes one of them wrongly."""

    name = "spelled"

    def slots(self, positions: Tensor, spare: int) -> Tensor:
        """Where tokens are written: padding into the spare slot."""
        return torch.where(positions < 0, spare, positions)

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        """held [B, 1, N], positions [B, S, 1] -> [B, S, N]."""
        return (held >= 0) & (held <= positions)

    def clean(self, v: Tensor, visible: Tensor) -> Tensor:
        """v without what nobody sees."""
        return v.masked_fill(~visible.any(1)[:, :, None, None], 0)

    def spread(self, x: Tensor, times: int) -> Tensor:
        """[B, N, Hkv, d] -> [B, N, H, d]."""
        return x.repeat_interleave(times, 2)

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, S, N]."""
        return torch.einsum("bshd,bnhd->bhsn", q / math.sqrt(q.shape[-1]), k)

    def hide(self, scores: Tensor, visible: Tensor) -> Tensor:
        """[B, H, S, N]."""
        return scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)

    def softmax(self, scores: Tensor) -> Tensor:
        return ops.up(scores).softmax(-1)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        held = positions
        if cache is not None:
            rows = torch.arange(len(q))[:, None]
            slots = self.slots(positions, cache.k.shape[1] - 1)
            cache.k[rows, slots], cache.v[rows, slots] = k, v
            k, v = cache.k[:, :-1], cache.v[:, :-1]
            held = torch.arange(k.shape[1]).expand(len(q), -1)
        visible = self.visible(held[:, None], positions[:, :, None], cache is not None)
        v = self.clean(v, visible)
        times = q.shape[2] // k.shape[2]
        k, v = self.spread(k, times), self.spread(v, times)
        weights = self.softmax(self.hide(self.score(q, k), visible)).to(v.dtype)
        return torch.einsum("bhsn,bnhd->bshd", weights, v), cache


class HeadsTiled(Spelled):
    """Query head h reads key-value head h mod Hkv instead of h // (H/Hkv)."""

    name = "heads-tiled"

    def spread(self, x: Tensor, times: int) -> Tensor:
        return x.repeat(1, 1, times, 1)


class OneHeadForAll(Spelled):
    """All query heads read the first key-value head."""

    name = "one-head-for-all"

    def spread(self, x: Tensor, times: int) -> Tensor:
        return x[:, :, :1].expand(-1, -1, times * x.shape[2], -1)


class NotCausal(Spelled):
    """Every token sees all of its row."""

    name = "not-causal"

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        return super().visible(held, positions.amax(1, keepdim=True).expand_as(positions), cached)


class MaskOffByOne(Spelled):
    """A token does not see itself."""

    name = "mask-off-by-one"

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        return (held >= 0) & ((held < positions) | (positions == 0) & (held == 0))


class SeesTheNext(Spelled):
    """A token sees the one behind it."""

    name = "sees-the-next"

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        return (held >= 0) & (held <= positions + 1) & (positions >= 0)


class FirstTokenLost(Spelled):
    """Nobody but the first token sees the first token."""

    name = "first-token-lost"

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        seen = super().visible(held, positions, cached)
        return seen & ((held > 0) | (positions == 0))


class DecodeOffByOne(Spelled):
    """A token alone, with a cache, does not see the one before it: prefill is right."""

    name = "decode-off-by-one"

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        seen = super().visible(held, positions, cached)
        return seen & (held != positions - 1) if cached and positions.shape[1] == 1 else seen


class CausalTopLeft(Spelled):
    """In a later chunk the causal mask starts at slot 0, as `is_causal` means it."""

    name = "causal-top-left"

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        if cached and positions.shape[1] > 1:
            positions = torch.where(positions < 0, -1, torch.arange(positions.shape[1])[:, None])
        return super().visible(held, positions, cached)


class Window(Spelled):
    """Nothing older than 512 tokens is seen."""

    name = "window"

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        return super().visible(held, positions, cached) & (held > positions - 512)


class PositionsOfRowZero(Spelled):
    """All rows of a batch are masked like the first."""

    name = "positions-of-row-zero"

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        first = super().visible(held[:1], positions[:1], cached)
        return first.expand(len(positions), -1, -1)


class PositionsCounted(Spelled):
    """Without a cache, positions are counted from the column, so that padding is seen."""

    name = "positions-counted"

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        if cached:
            return super().visible(held, positions, cached)
        column = torch.arange(held.shape[2])
        return (column <= column[:, None]).expand(len(held), -1, -1)


class PaddingSeen(Spelled):
    """Without a cache, padding has position -1, which is before every token."""

    name = "padding-seen"

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        return held <= positions


class UnwrittenSeen(Spelled):
    """Only the scores are masked: 0 * NaN of a slot that nobody wrote."""

    name = "unwritten-seen"

    def clean(self, v: Tensor, visible: Tensor) -> Tensor:
        return v


class PaddingIsNaN(Spelled):
    """A softmax over nothing but minus infinity."""

    name = "padding-is-nan"

    def hide(self, scores: Tensor, visible: Tensor) -> Tensor:
        return scores.masked_fill(~visible[:, None], -math.inf)


class FiniteMask(Spelled):
    """What must not be seen is pushed down by a number that a large score outweighs."""

    name = "finite-mask"

    def hide(self, scores: Tensor, visible: Tensor) -> Tensor:
        return scores - 1e4 * ~visible[:, None]


class MaskIsZero(Spelled):
    """What must not be seen has a score of 0 instead of none."""

    name = "mask-is-zero"

    def hide(self, scores: Tensor, visible: Tensor) -> Tensor:
        return scores * visible[:, None]


class ScaleForgotten(Spelled):
    """Scores that nobody divides by sqrt(d)."""

    name = "attention-scale-forgotten"

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return super().score(q, k) * math.sqrt(q.shape[-1])


class ScaleByAll(Spelled):
    """Scores divided by d instead of sqrt(d)."""

    name = "scale-by-all"

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return super().score(q, k) / math.sqrt(q.shape[-1])


class ScoresOverflow(Spelled):
    """Divides after the product, which float16 cannot always hold."""

    name = "scores-overflow"

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("bshd,bnhd->bhsn", q, k) / math.sqrt(q.shape[-1])


class SoftCap(Spelled):
    """Scores that end at 30, as another model has them."""

    name = "soft-cap"

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return 30 * torch.tanh(super().score(q, k) / 30)


class ScoresInTf32(Spelled):
    """Scores from products with 10 bits."""

    name = "scores-in-tf32"

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return super().score(q.half().to(q.dtype), k.half().to(k.dtype))


class SoftmaxInBfloat16(Spelled):
    """The softmax in bfloat16, its result in the dtype of the model."""

    name = "attention-softmax-in-bfloat16"

    def softmax(self, scores: Tensor) -> Tensor:
        return scores.bfloat16().softmax(-1)


class DenominatorInBfloat16(Spelled):
    """The softmax's sum is kept in bfloat16, one key after the other, and stops at 256."""

    name = "denominator-in-bfloat16"

    def softmax(self, scores: Tensor) -> Tensor:
        powers = (ops.up(scores) - ops.up(scores).amax(-1, keepdim=True)).exp()
        total = torch.zeros_like(powers[..., 0], dtype=torch.bfloat16)
        for power in powers.unbind(-1):
            total = total + power.bfloat16()
        return powers / total[..., None].float()


class MaximumOfTheFirstBlock(Spelled):
    """A softmax in blocks of 4 keys that does not rescale when a later block has a higher score."""

    name = "maximum-of-the-first-block"

    def softmax(self, scores: Tensor) -> Tensor:
        wide = ops.up(scores).clamp(min=-1e30)
        blocks = range(0, wide.shape[-1], 4)
        highest = wide.cummax(-1).values
        parts = [
            (wide[..., i : i + 4] - highest[..., min(i + 3, wide.shape[-1] - 1)][..., None]).exp()
            for i in blocks
        ]
        powers = torch.cat(parts, -1) if parts else wide
        return powers / powers.sum(-1, keepdim=True)


class ExtraKey(Spelled):
    """One more in the denominator: a key of zeros that everybody sees."""

    name = "extra-key"

    def softmax(self, scores: Tensor) -> Tensor:
        sink = torch.zeros_like(scores[..., :1])
        return ops.up(torch.cat([scores, sink], -1)).softmax(-1)[..., :-1]


class BlockOfEight(Backend):
    """Of a batch, only the first eight rows are computed; the next block repeats the first row."""

    name = "block-of-eight"

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        mixed, cache = super().attention(q, k, v, cache, positions)
        if len(q) > 8:
            mixed = torch.cat([mixed[:8], mixed[:1].expand(len(q) - 8, -1, -1, -1)])
        return mixed, cache


class QueryDividedInPlace(Backend):
    """Divides the queries where they lie."""

    name = "query-divided-in-place"

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        q /= math.sqrt(q.shape[-1])
        return super().attention(q * math.sqrt(q.shape[-1]), k, v, cache, positions)


class NoGradientOfTheDenominator(Spelled):
    """The softmax is a constant for the backward: queries and keys learn nothing of its sum."""

    name = "no-gradient-of-the-denominator"

    def softmax(self, scores: Tensor) -> Tensor:
        powers = (ops.up(scores) - ops.up(scores).amax(-1, keepdim=True).detach()).exp()
        return powers / powers.sum(-1, keepdim=True).detach()


class GradientOfOneHead(Spelled):
    """Of the query heads that share a key-value head, one gives its gradient to it."""

    name = "gradient-of-one-head"

    def spread(self, x: Tensor, times: int) -> Tensor:
        copies = [x, *[x.detach()] * (times - 1)]
        return torch.stack(copies, 3).flatten(2, 3)


class HeadSizeRounded(Spelled):
    """Heads are read in a power of two of numbers; a wider one loses its end."""

    name = "head-size-rounded"

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        read = torch.arange(q.shape[-1]) < 1 << (q.shape[-1].bit_length() - 1)
        return super().score(q * read, k)


class FourToAKey(Spelled):
    """At most four query heads share a key-value head; a fifth reads the next one's."""

    name = "four-to-a-key"

    def spread(self, x: Tensor, times: int) -> Tensor:
        heads = torch.arange(times * x.shape[2]) // min(times, 4)
        return x[:, :, heads.clamp(max=x.shape[2] - 1)]
