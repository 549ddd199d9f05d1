"""How wrong a right answer may be. Measured on plain torch, not typed; a backend has no say in it.

The error of a result is that of its worst row, relative to the largest element of the row, against
the specification run in float64. It may be

    2 p + u + (4 + sqrt(n)/2) 2^-23        and for gradients 3 p instead of 2 p

- p = the worst row of plain torch in this dtype, as written, and once more with its contraction
  axes permuted by the case's seed: what reordering the very same sums does to these very inputs; in
  low precision also with its roundings at other places (`oracle.Elsewhere`). It holds all that
  depends on the data: cancellation, the range of a softmax, and what the dtype does to a
  composite's intermediate results.
- u = the unit roundoff of the output's dtype: the one rounding of the result that nobody can avoid.
- n = the longest reduction. (4 + sqrt(n)/2) float32 steps are what a float32 accumulator may lose
  that runs through n terms one after the other, as a plain loop on any chip does and torch's
  blocked sums do not, and what a few elementary functions may.

What comes of a softmax may be off by max |exponent| 2^-23 besides: the weights of a router, and
attention. exp turns an absolute error of its argument into a relative one of its result, and not
every right softmax subtracts the maximum first: exp(l - logsumexp(l)) rounds a number as large as
the logits (half a step, |l| 2^-24), and in powers of two, exp2(l log2(e) - ...), the products are
rounded as well (|l| 2^-24 more). At scale 30 |l| is up to 120: the first was 1.6-3.8e-6 off, where
the rule above allows 0.8-1.3e-6; torch's fused attention was 1.06 times over it with heads of 128.
A sigmoid needs no such term, since nothing is subtracted from its argument.

In a whole model of L layers every block adds its own error, and they add up like steps in random
directions: sqrt(2 L + 1) times the float32 steps, for an attention and a feed-forward a layer and
what is around them. And p is a matter of luck there: in float32 3 p instead of 2 p, since cpu's
kernels for AVX2 were 4.1 p off at the end of 1,024 tokens, where those for AVX-512, on the same
weights, were 1.8 p; in low precision 4 p, since models that round at other places than the peers (a
norm before its weight, a bias after its product) came to 2.4 p.

Why this rule. A limit for each row of 2 p and 4 units in the last place, tried first, failed a
sequential float32 sum of 5,120 terms at 3.4 times the limit, since a blocked sum is far better than
anyone may ask for; and it passed a bfloat16 output that was wrong by 2-3 %, since a unit in the
last place is 2^-7 there. Under this rule right rewrites reach 0.75 of the limit (`ci/score.py` says
which) and wrong ones 1.5 and more. What follows: faults of logic are caught in float32, and low
precision judges precision.

A mean says what no worst row can: whether errors lean to one side. Truncation instead of rounding
shrinks every element by half a unit in its last place, and a thousand layers by a thousand halves,
yet its worst row is within the limit. So in low precision the signed error over all elements,

    |sum (got - want) sign(want)| / sum |want|,

may be twice that of plain torch and half a unit roundoff. Right kernels reach 0.36 unit roundoffs
where plain torch does too, and less elsewhere; truncation 0.76 in one product and 2.5 in a
feed-forward. A few hundred elements are too few to judge by: a right kernel was seen 1.1 times over
a third of a unit with 280.

A row is what a token gets; attention's heads are one row, as the projection behind them takes them.
Gradients are measured against the largest row of their tensor: a row that cancels to nothing (the
query of the first token, which has one key to attend to) has no digits of its own, and what is left
of it depends on the kernel.
"""

import math

import torch
from torch import Tensor

UNIT_ROUNDOFF = {
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
_LEAST = 640  # elements other than zero that a mean needs to say anything
_TINY = 1e-30  # a row of zeros must be answered with zeros, and divides by this


def limit(
    p: float, dtype: torch.dtype, n: int, factor: float = 2.0, layers: int | None = None
) -> float:
    """The limit for a result of `dtype`: p as above, n the longest reduction, factor 3 for
    gradients. layers: of a whole model; None = one operation."""
    blocks = 1 if layers is None else 2 * layers + 1
    steps = (4 + math.sqrt(n) / 2) * math.sqrt(blocks)
    return factor * p + UNIT_ROUNDOFF[dtype] + steps * 2.0**-23


def lean_limit(of_peers: float, dtype: torch.dtype) -> float:
    """How far the mean of an output may lean to one side; of_peers: `lean_of` plain torch."""
    return 2 * of_peers + UNIT_ROUNDOFF[dtype] / 2


def lean_of(got: Tensor, want: Tensor) -> float:
    """|sum (got - want) sign(want)| / sum |want|, over all elements; 0 if they are too few. want:
    float64.
    """
    if int(want.count_nonzero()) < _LEAST:
        return 0.0
    wide = got.detach().to("cpu", torch.float64)
    lean = ((wide - want) * want.sign()).sum().abs() / want.abs().sum().clamp_min(_TINY)
    return float(lean.nan_to_num(nan=math.inf))


def worst_row(got: Tensor, want: Tensor, pooled: bool = False) -> float:
    """max |got - want| / max |want| of the worst row along the last axis; NaN counts as infinite.
    want: float64.

    pooled: every row is measured against the largest one.
    """
    if want.numel() == 0:
        return 0.0
    size = want.abs().amax(-1)
    size = (size.max() if pooled else size).clamp_min(_TINY)
    error = (got.detach().to("cpu", torch.float64) - want).abs().amax(-1) / size
    return float(error.nan_to_num(nan=math.inf, posinf=math.inf).max())
