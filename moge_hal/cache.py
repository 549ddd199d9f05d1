"""The key-value cache and its rules.

A cache is made by the backend, zero-filled, with a capacity in positions. It is DONATED to every
step: the one that was passed in must not be used again, so a backend may write in place or return
new tensors. A row's tokens come in order: its next call goes on at the position after its last one.
Rows may have different lengths; position -1 is padding and is never written. A full cache is an
error before anything is written. This default keeps position p in slot p; another backend may lay
it out otherwise.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from moge_hal.errors import CacheFullError


class LayerCache(NamedTuple):
    """One layer's keys and values, [B, capacity + 1, Hkv, d]; the last slot is where padding goes
    and is never read.
    """

    k: Tensor
    v: Tensor


@dataclass
class Cache:
    """All layers of the default cache. A pytree, so that a compiled step can take and return it."""

    layers: list[LayerCache]
    capacity: int

    @property
    def batch(self) -> int:
        """How many rows it holds."""
        return len(self.layers[0].k)

    @staticmethod
    def zeros(
        layers: int,
        batch: int,
        capacity: int,
        kv_heads: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Cache":
        def slots() -> Tensor:
            return torch.zeros(batch, capacity + 1, kv_heads, size, dtype=dtype, device=device)

        return Cache([LayerCache(slots(), slots()) for _ in range(layers)], capacity)

    def with_layers(self, layers: list[LayerCache]) -> "Cache":
        """The cache after a step."""
        return Cache(layers, self.capacity)


_pytree.register_pytree_node(
    Cache,
    lambda cache: ([cache.layers], cache.capacity),
    lambda values, capacity: Cache(next(iter(values)), capacity),
    serialized_type_name="moge_hal.Cache",
)


def require_room(capacity: int, positions: Tensor) -> None:
    """Raises `CacheFullError` if a position of [B, S] does not fit. Positions on a device cost one
    read of it.
    """
    last = int(positions.max()) if positions.numel() else -1
    if last >= capacity:
        raise CacheFullError(
            f"position {last} does not fit into a cache of {capacity} positions; "
            f"make the cache larger, or give a shorter prompt or fewer new tokens"
        )
