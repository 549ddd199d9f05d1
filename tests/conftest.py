"""What the tests share. One thread: sums are made in one order, and tests can run side by side."""

import pytest
import torch
from torch import Tensor

from moge_hal.config import preset
from moge_hal.training.init import initial_weights

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def weights() -> dict[str, Tensor]:
    """Float32 weights of preset "tiny", no bias 0 and no norm or scale 1. Read them only."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: w + 0.3 * torch.randn(w.shape, generator=generator)
        for name, w in initial_weights(preset("tiny"), 0).items()
    }
