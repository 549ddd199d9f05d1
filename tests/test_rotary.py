"""The rotary tables against float64 angles, at positions up to the last that the largest released
model has.
"""

import pytest
import torch

from moge_hal.config import PRESETS
from moge_hal.rotary import STEP, RotaryTables


def exact(positions: torch.Tensor, size: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    exponents = -torch.arange(0, size, 2, dtype=torch.float64) / size
    angles = positions.double()[..., None] * torch.tensor(theta, dtype=torch.float64) ** exponents
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("name", PRESETS)
def test_float32_is_within_2e_7_at_any_position(name: str) -> None:
    config = PRESETS[name]
    last = config.max_position_embeddings - 1
    tables = RotaryTables(config.head_dim, config.rope_theta, last + 1, torch.float32)
    # A prime stride meets every remainder of STEP; the ends are where a table could be too short.
    stride = 1 if last < 5000 else 97
    positions = torch.cat([torch.arange(0, last, stride), torch.tensor([last - 1, last])])[None]
    for got, expected in zip(
        tables(positions), exact(positions, config.head_dim, config.rope_theta), strict=True
    ):
        assert got.dtype == torch.float32
        assert got.shape == (*positions.shape, config.head_dim // 2)
        assert (got.double() - expected).abs().max() < 2e-7


def test_a_float32_product_would_not_be() -> None:
    """The limit above means something: the usual way to make the tables misses it 5,000-fold."""
    positions = torch.tensor([131_071])
    frequency = 16e6 ** (-torch.arange(0, 128, 2).float() / 128)
    cos, _ = exact(positions, 128, 16e6)
    assert ((positions[:, None] * frequency).cos().double() - cos).abs().max() > 1e-3


def test_float64_tables_are_exact_in_float64() -> None:
    positions = torch.arange(3 * STEP).view(3, STEP).flip(1)
    tables = RotaryTables(10, 1e4, 3 * STEP, torch.float64)
    for got, expected in zip(tables(positions), exact(positions, 10, 1e4), strict=True):
        assert got.dtype == torch.float64
        assert (got - expected).abs().max() < 1e-12


def test_padding_is_position_0_and_two_small_tables_serve() -> None:
    tables = RotaryTables(8, 1e4, 131_072, torch.float32)
    cos, sin = tables(torch.tensor([[-1, 0]]))
    assert torch.equal(cos, torch.ones(1, 2, 4))
    assert torch.equal(sin, torch.zeros(1, 2, 4))
    assert sum(b.numel() for b in tables.buffers()) == (STEP + 131_072 // STEP) * 8
    assert tables.state_dict() == {}  # they are computed, never stored in a checkpoint
