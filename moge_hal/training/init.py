"""Weights to start training from."""

import math

import torch
from torch import Tensor

from moge_hal.config import Config
from moge_hal.model import skeleton


def initial_weights(config: Config, seed: int) -> dict[str, Tensor]:
    """Float32 weights by canonical name, the same for a seed on one kind of processor.

    Normal with std `initializer_range`; projections back into the residual stream divided by
    sqrt(2 L) (GPT-2's rule); norms and router scales 1, biases 0.
    """
    generator = torch.Generator().manual_seed(seed)
    residual = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    weights = {}
    for name, parameter in skeleton(config).named_parameters():
        shape = tuple(parameter.shape)
        if name.endswith("bias"):
            weights[name] = torch.zeros(shape)
        elif len(shape) == 1:
            weights[name] = torch.ones(shape)
        else:
            back = name.endswith(("o_proj.weight", ".down"))
            std = residual if back else config.initializer_range
            weights[name] = torch.randn(shape, generator=generator) * std
    return weights
