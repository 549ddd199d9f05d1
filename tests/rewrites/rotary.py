"""Other ways to turn."""

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend


class RotaryByComplex(Backend):
    """Halves as the parts of complex numbers, one multiplication."""

    name = "rotary-by-complex"

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turn = torch.complex(cos, sin)[:, :, None]

        def run(x: Tensor) -> Tensor:
            a, b = ops.up(x).chunk(2, -1)
            turned = torch.complex(a.contiguous(), b.contiguous()) * turn
            return torch.cat([turned.real, turned.imag], -1).to(x.dtype)

        return run(q), run(k)


class RotaryByMatrix(Backend):
    """A product of [a, b] by a matrix of 2 x 2 for every pair."""

    name = "rotary-by-matrix"

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        matrix = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)

        def run(x: Tensor) -> Tensor:
            pairs = torch.stack(ops.up(x).chunk(2, -1), -1)  # [B, S, H, d/2, 2]
            turned = torch.einsum("bspij,bshpj->bship", matrix, pairs)
            return turned.flatten(-2).to(x.dtype)

        return run(q), run(k)


class RotaryByHalves(Backend):
    """x cos + rotate_half(x) sin over the whole head, queries and keys in one tensor."""

    name = "rotary-by-halves"

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        both = ops.up(torch.cat([q, k], 2))
        a, b = both.chunk(2, -1)
        wide_cos, wide_sin = (torch.cat([t, t], -1)[:, :, None] for t in (cos, sin))
        turned = (both * wide_cos + torch.cat([-b, a], -1) * wide_sin).to(q.dtype)
        return turned[:, :, : q.shape[2]], turned[:, :, q.shape[2] :]
