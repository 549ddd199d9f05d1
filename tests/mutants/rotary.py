"""The rotary embedding, with a fault."""

from typing import Any

import torch
from torch import Tensor, nn

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.model import Transformer


class RotaryInterleaved(Backend):
    """Element 2i is paired with 2i + 1, as in other models, instead of i with i + d/2."""

    name = "rotary-interleaved"

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos[:, :, None], sin[:, :, None]

        def turn(x: Tensor) -> Tensor:
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

        return turn(q), turn(k)


class RotaryBackwards(Backend):
    """The sign of the sine is that of the inverse rotation."""

    name = "rotary-backwards"

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rotary(q, k, cos, -sin)


class RotaryCosineAndSineSwapped(Backend):
    """The two halves of the table are taken the other way round."""

    name = "rotary-cosine-and-sine-swapped"

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rotary(q, k, sin, cos)


class RotaryInBfloat16(Backend):
    """Turned in bfloat16."""

    name = "rotary-in-bfloat16"

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turned = ops.rotary(q.bfloat16(), k.bfloat16(), cos.bfloat16(), sin.bfloat16())
        return turned[0].to(q.dtype), turned[1].to(k.dtype)


class RotaryOfRowZero(Backend):
    """All rows of a batch are turned like the first."""

    name = "rotary-of-row-zero"

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rotary(q, k, cos[:1].expand_as(cos), sin[:1].expand_as(sin))


class RotaryOfQueriesAlone(Backend):
    """At one token, the key is not turned."""

    name = "rotary-of-queries-alone"

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turned = ops.rotary(q, k, cos, sin)
        return turned[0], k.clone() if k.shape[1] == 1 else turned[1]


class RotaryOfSomeHeads(Backend):
    """Query heads beyond the number of key-value heads stay as they are."""

    name = "rotary-of-some-heads"

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turned = ops.rotary(q, k, cos, sin)
        count = k.shape[2]
        return torch.cat([turned[0][:, :, :count], q[:, :, count:]], 2), turned[1]


class RotaryPartial(Backend):
    """The first half of the frequencies, as models with a partial rotation have it."""

    name = "rotary-partial"

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        still = torch.arange(cos.shape[-1]) >= cos.shape[-1] // 2
        return ops.rotary(q, k, cos.masked_fill(still, 1.0), sin.masked_fill(still, 0.0))


class RotaryGradientForwards(Backend):
    """The backward turns the gradient on instead of back."""

    name = "rotary-gradient-forwards"

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        right = ops.rotary(q, k, cos, sin)
        wrong = ops.rotary(q, k, cos, -sin)
        found = [(a - b).detach() + b for a, b in zip(right, wrong, strict=True)]
        return found[0], found[1]


class _Tables(nn.Module):
    """Rotary tables with a fault, in the place of the model's."""

    def __init__(self, right: nn.Module, size: int, theta: float) -> None:
        super().__init__()
        self.right = right
        self.frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)


class _Late(_Tables):
    def forward(self, positions: Tensor) -> Any:
        return self.right(positions + (positions.shape[1] == 1))


class _Angles(_Tables):
    dtype = torch.float32

    def forward(self, positions: Tensor) -> Any:
        frequency = self.frequency.to(self.dtype)
        angle = (positions.clamp(min=0)[..., None].to(self.dtype) * frequency).float()
        return angle.cos(), angle.sin()


class _NarrowAngles(_Angles):
    dtype = torch.bfloat16


class OtherTables(Backend):
    """Replaces a model's rotary tables when it is compiled."""

    tables: type[_Tables] = _Tables

    def compile(self, step: Any, example: tuple[Any, ...], dynamic: Any) -> Any:
        if isinstance(step, Transformer):
            config = step.config
            step.rotary = self.tables(step.rotary, config.head_dim, config.rope_theta)  # type: ignore[assignment]
        return step


class PositionLate(OtherTables):
    """In a step of one token, the position that turns is one too high."""

    name = "position-late"
    tables = _Late


class AnglesInFloat32(OtherTables):
    """position * frequency in float32: 6e-5 off at position 1,000."""

    name = "angles-in-float32"
    tables = _Angles


class AnglesInBfloat16(OtherTables):
    """position * frequency in bfloat16: position 257 is 256."""

    name = "angles-in-bfloat16"
    tables = _NarrowAngles


class RotaryInFours(Backend):
    """Pairs are turned four at a time; what is left over stays as it is."""

    name = "rotary-in-fours"

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rest = torch.arange(cos.shape[-1]) >= cos.shape[-1] // 4 * 4
        return ops.rotary(q, k, cos.masked_fill(rest, 1.0), sin.masked_fill(rest, 0.0))
