"""What the tests share. One thread: sums are made in one order, and tests can run side by side."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moge_hal.config import preset
from moge_hal.training.init import initial_weights

torch.set_num_threads(1)

# A plain install has no hypothesis: what needs it is left out then, and the header says so.
_files = Path(__file__).parent.glob("test_*.py")
_property_based = [f.name for f in _files if "\nfrom hypothesis" in f.read_text("utf-8")]
collect_ignore = [] if find_spec("hypothesis") else sorted(_property_based)


def pytest_report_header() -> list[str]:
    if not collect_ignore:
        return []
    return [
        f"left out, for want of hypothesis (pip install '.[test]'): {', '.join(collect_ignore)}"
    ]


@pytest.fixture(scope="session")
def weights() -> dict[str, Tensor]:
    """Float32 weights of preset "tiny", no bias 0 and no norm or scale 1. Read them only."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: w + 0.3 * torch.randn(w.shape, generator=generator)
        for name, w in initial_weights(preset("tiny"), 0).items()
    }
