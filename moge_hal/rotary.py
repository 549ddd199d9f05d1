"""Rotary tables that are exact at any position.

position * frequency in float32 is wrong by up to 2^-24 * position radians: at position 1,000 that
is already 6e-5, more than all of a float32 model's other rounding. So angles are added instead of
multiplied: position = 256 * high + low, and with tables of both parts, made in float64, cos(a + b)
= cos a cos b - sin a sin b. Two small tables serve every context length, and only gathers,
multiplications and additions run on the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEP = 256


class RotaryTables(nn.Module):
    """positions [B, S] -> cos, sin [B, S, d/2] of position * theta^(-2i/d), in the dtype that the
    tables were made in.
    """

    low: Tensor  # [STEP, d]: cos, then sin, of 0 .. STEP - 1
    high: Tensor  # [ceil(max positions / STEP), d]: the same of 0, STEP, 2 STEP, ...

    def __init__(self, size: int, theta: float, positions: int, dtype: torch.dtype) -> None:
        super().__init__()
        frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        steps = -(-positions // STEP)
        for name, count, step in (("low", STEP, 1), ("high", steps, STEP)):
            angle = torch.arange(0, count * step, step, dtype=torch.float64)[:, None] * frequency
            table = torch.cat([angle.cos(), angle.sin()], 1).to(dtype)
            self.register_buffer(name, table, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        positions = positions.clamp(min=0)  # padding has to be some position
        cos_a, sin_a = F.embedding(positions // STEP, self.high).chunk(2, -1)
        cos_b, sin_b = F.embedding(positions % STEP, self.low).chunk(2, -1)
        return cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b
