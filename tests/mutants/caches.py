"""Caches that keep, find or forget the wrong things."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moge_hal import ops
from moge_hal.backend import Backend
from moge_hal.cache import Cache, LayerCache
from moge_hal.config import Config
from mutants.attention import Spelled


class ContextEndsEarly(Spelled):
    """Of a cache, the first 1,000 slots are seen: right for 97 % of the shipped model's context."""

    name = "context-ends-early"

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        seen = super().visible(held, positions, cached)
        return seen & (held < 1000) if cached else seen


class SecondChunkOf512(Spelled):
    """From slot 512 on, keys are read from the block before."""

    name = "second-chunk-of-512"

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        mixed, cache = super().attention(q, k, v, cache, positions)
        if cache is None or int(positions.amax()) < 512:
            return mixed, cache
        keys = cache.k.clone()
        keys[:, 512:] = cache.k[:, : keys.shape[1] - 512]
        return super().attention(q, k, v, LayerCache(keys, cache.v.clone()), positions)[0], cache


class PaddingInSlotZero(Spelled):
    """Padding is written, over the first token."""

    name = "padding-in-slot-zero"

    def slots(self, positions: Tensor, spare: int) -> Tensor:
        return positions.clamp(min=0)


class PaddingOverTheNewest(Spelled):
    """Padding goes where the row's newest token is."""

    name = "padding-over-the-newest"

    def slots(self, positions: Tensor, spare: int) -> Tensor:
        newest = positions.amax(1, keepdim=True).expand_as(positions)
        return super().slots(torch.where(positions < 0, newest, positions), spare)


class PaddingInTheLastSlot(Spelled):
    """Padding goes to slot -1, which is the last real one."""

    name = "padding-in-the-last-slot"

    def slots(self, positions: Tensor, spare: int) -> Tensor:
        return torch.where(positions < 0, spare - 1, positions)


class RingOf64(Spelled):
    """A ring of 64 slots, however many were asked for."""

    name = "ring-of-64"

    def slots(self, positions: Tensor, spare: int) -> Tensor:
        return torch.where(positions < 0, spare, positions % 64)


class OneSlotLate(Spelled):
    """In a step of one token, keys and values go one slot too far."""

    name = "one-slot-late"

    def slots(self, positions: Tensor, spare: int) -> Tensor:
        late = 1 if positions.shape[1] == 1 else 0
        return (
            super().slots(torch.where(positions < 0, -1, positions + late), spare).clamp(max=spare)
        )


class SlotsOfRowZero(Spelled):
    """All rows write where the first one does."""

    name = "slots-of-row-zero"

    def slots(self, positions: Tensor, spare: int) -> Tensor:
        return super().slots(positions[:1].expand_as(positions), spare)


class ReadBeforeWritten(Spelled):
    """In a step of one token, the newest key is written after the cache was read."""

    name = "read-before-written"

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        if cache is None or positions.shape[1] > 1:
            return super().attention(q, k, v, cache, positions)
        before = positions - 1
        old = LayerCache(cache.k.clone(), cache.v.clone())
        where = before.clamp(min=0)[..., None, None].expand(-1, -1, *k.shape[2:])
        last = (old.k.gather(1, where), old.v.gather(1, where))
        mixed, _ = super().attention(q, *last, old, before)
        return mixed, super().attention(q, k, v, cache, positions)[1]


class KeysOnly(Spelled):
    """A step of one token appends its key, but keeps the value that was in the slot before it."""

    name = "keys-only"

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        if cache is not None and positions.shape[1] == 1:
            where = (positions - 1).clamp(min=0)[..., None, None].expand(-1, -1, *v.shape[2:])
            v = cache.v.gather(1, where)
        return super().attention(q, k, v, cache, positions)


class CacheInBfloat16(Spelled):
    """Keys and values are kept in bfloat16."""

    name = "cache-in-bfloat16"

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        if cache is not None:
            k, v = k.bfloat16().to(k.dtype), v.bfloat16().to(v.dtype)
        return super().attention(q, k, v, cache, positions)


class CacheReturnedAsItWas(Backend):
    """The step works on a copy of the cache and returns what it was given."""

    name = "cache-returned-as-it-was"

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        if cache is None:
            return ops.attention(q, k, v, None, positions)
        copy = LayerCache(cache.k.clone(), cache.v.clone())
        return ops.attention(q, k, v, copy, positions)[0], cache


class StaleCache(Spelled):
    """Buffers are used again for the next prompt, and so is the mark of how far they are full."""

    name = "stale-cache"

    def __init__(self, index: int | None = None) -> None:
        super().__init__(index)
        self.buffers: dict[Any, Cache] = {}
        self.full = [0]

    def new_cache(self, config: Config, batch: int, capacity: int, dtype: torch.dtype) -> Cache:
        key = (batch, capacity, dtype)
        if key not in self.buffers:
            self.buffers[key] = super().new_cache(config, batch, capacity, dtype)
        return self.buffers[key]

    def visible(self, held: Tensor, positions: Tensor, cached: bool) -> Tensor:
        if not cached:
            return super().visible(held, positions, cached)
        old = held < self.full[0]
        if positions.shape[1] == 1:
            self.full[0] = max(self.full[0], int(positions.max()) + 1)
        return super().visible(held, positions, cached) | old


class OneBuffer(Backend):
    """One buffer for all caches of a size."""

    name = "one-buffer"

    def __init__(self, index: int | None = None) -> None:
        super().__init__(index)
        self.buffers: dict[Any, Cache] = {}

    def new_cache(self, config: Config, batch: int, capacity: int, dtype: torch.dtype) -> Cache:
        key = (config, batch, capacity, dtype)
        if key not in self.buffers:
            self.buffers[key] = super().new_cache(config, batch, capacity, dtype)
        return self.buffers[key]


class LayersShare(Backend):
    """All layers of a cache are one buffer."""

    name = "layers-share"

    def new_cache(self, config: Config, batch: int, capacity: int, dtype: torch.dtype) -> Cache:
        cache: Cache = super().new_cache(config, batch, capacity, dtype)
        return Cache([cache.layers[0]] * len(cache.layers), capacity)


class RowsShare(Spelled):
    """All rows of a cache are one buffer, which has what the last of them wrote."""

    name = "rows-share"

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, positions: Tensor
    ) -> tuple[Tensor, Any]:
        mixed, cache = super().attention(q, k, v, cache, positions)
        for part in () if cache is None else cache:
            part.copy_(part[-1:].clone().expand_as(part))
        return mixed, cache


class CapacityOffByOne(Backend):
    """Promises one slot more than it has."""

    name = "capacity-off-by-one"

    def new_cache(self, config: Config, batch: int, capacity: int, dtype: torch.dtype) -> Cache:
        cache: Cache = super().new_cache(config, batch, capacity - 1, dtype)
        cache.capacity = capacity
        return cache


class LastSlotRefused(Backend):
    """Says that it is full one slot before it is."""

    name = "last-slot-refused"
    raises = True

    def new_cache(self, config: Config, batch: int, capacity: int, dtype: torch.dtype) -> Cache:
        cache: Cache = super().new_cache(config, batch, capacity, dtype)
        cache.capacity = capacity - 1
        return cache


class WrapsAround(Spelled):
    """A full cache goes on over its first tokens instead of being an error."""

    name = "wraps-around"

    def new_cache(self, config: Config, batch: int, capacity: int, dtype: torch.dtype) -> Cache:
        cache: Cache = super().new_cache(config, batch, capacity, dtype)
        return replace(cache, capacity=1 << 30)

    def slots(self, positions: Tensor, spare: int) -> Tensor:
        return torch.where(positions < 0, spare, positions % spare)
