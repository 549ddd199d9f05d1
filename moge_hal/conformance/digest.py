"""A short name for the inputs of a case: equal on every machine, or the machines judge different
things."""

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b

import torch
from torch import Tensor

from moge_hal.conformance.cases import Case
from moge_hal.conformance.inputs import draw
from moge_hal.conformance.verdict import Skip
from moge_hal.conformance.weights import model_weights


def digest(case: Case) -> str:
    """16 hexadecimal digits over the bits of the operation's arguments, or of a model's weights."""
    return _digest(replace(case, prop=""))


@lru_cache(maxsize=4096)
def _digest(case: Case) -> str:
    if case.op != "model":
        return of((name, v) for name, v in draw(case).items() if isinstance(v, Tensor))
    try:
        _, weights = model_weights(case)
    except Skip:
        return ""  # there is no such model here, and no case of it is judged
    return of((name, weights[name]) for name in weights)


def of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Over names, types, shapes and bits."""
    found = blake2b(digest_size=8)
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        bits = tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)
        found.update(bits.numpy().tobytes())
    return found.hexdigest()
