"""The models that are judged whole: small ones of random weights, and the one that is shipped."""

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from moge_hal.backend import Backend
from moge_hal.config import Config, preset
from moge_hal.conformance.cases import Case
from moge_hal.conformance.inputs import fan, normal, signs, uniform
from moge_hal.conformance.verdict import Skip
from moge_hal.loading import SHIPPED, load
from moge_hal.model import skeleton


def random_weights(config: Config, seed: int) -> dict[str, Tensor]:
    """Float32 weights by canonical name, none of them at the value that would hide its absence.

    Biases are not 0, norms and router scales not 1 but 0.5 to 2 in size, a scale of either sign: a
    backend that forgets one of them is wrong by a lot.
    """
    weights = {}
    for name, parameter in skeleton(config).named_parameters():
        shape, key = tuple(parameter.shape), f"weights/{seed}/{name}"
        if name.endswith(("norm.weight", "router_scale")):
            drawn = uniform(key, *shape, low=0.5, high=2.0)
            if name.endswith("router_scale"):
                drawn = drawn * signs(f"{key}/sign", *shape)
        elif name.endswith("bias"):
            drawn = normal(key, *shape, scale=0.5)
        elif name == "embed_tokens.weight":
            drawn = normal(key, *shape)
        else:
            drawn = normal(key, *shape, scale=fan(shape[-1]))
        weights[name] = drawn.float()
    return weights


def model_weights(case: Case) -> tuple[Config, Mapping[str, Tensor]]:
    """The configuration and weights of a `model` case, in the case's dtype. Raises `Skip` if no
    model is shipped."""
    seed = None if "shipped" in case.words else case.sizes.get("seed", 0)
    return _weights(seed, case.dtype)


@lru_cache(maxsize=8)
def _weights(seed: int | None, dtype: torch.dtype) -> tuple[Config, Mapping[str, Tensor]]:
    if seed is None:
        config, weights = _shipped()
    else:
        config = preset("tiny")
        weights = random_weights(config, seed)
    return config, {name: weight.to(dtype) for name, weight in weights.items()}


@lru_cache(maxsize=1)
def _shipped() -> tuple[Config, Mapping[str, Tensor]]:
    if not (SHIPPED / "config.json").is_file():
        raise Skip("this copy of the package ships no model")
    model = load(None, Backend(), torch.float32)
    names = [name for name, _ in skeleton(model.config).named_parameters()]
    return model.config, {name: model.weights[name].float() for name in names}
