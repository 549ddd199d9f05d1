"""The cache of an exported graph: keys and values that grow by appending, as the ecosystem's models
do it.

Slot j holds the row's j-th token so far, padding included, so a mask says which slots are holes. A
row's tokens come in order (`moge_hal.cache`), so order of slots is order of positions, and causal
by slot is causal by position.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from moge_hal.config import Config


class AppendLayer(NamedTuple):
    """One layer's past: key and value [B, Hkv, P, d], seen [B, P] bool: False where a slot is
    padding and may hold anything.
    """

    key: Tensor
    value: Tensor
    seen: Tensor


@dataclass
class AppendCache:
    """All layers' pasts. capacity counts positions; slots are as many as the calls had columns."""

    layers: list[AppendLayer]
    capacity: int

    @property
    def batch(self) -> int:
        """How many rows it holds."""
        return len(self.layers[0].key)

    @staticmethod
    def empty(config: Config, batch: int, capacity: int) -> "AppendCache":
        """A past of no slots."""
        past = torch.zeros(batch, config.num_key_value_heads, 0, config.head_dim)
        seen = torch.zeros(batch, 0, dtype=torch.bool)
        layers = [AppendLayer(past, past, seen) for _ in range(config.num_hidden_layers)]
        return AppendCache(layers, capacity)

    def with_layers(self, layers: list[AppendLayer]) -> "AppendCache":
        """The cache after a step."""
        return AppendCache(layers, self.capacity)


_pytree.register_pytree_node(
    AppendCache,
    lambda cache: ([cache.layers], cache.capacity),
    lambda values, capacity: AppendCache(next(iter(values)), capacity),
    serialized_type_name="moge_hal.export.AppendCache",
)
