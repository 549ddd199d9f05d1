"""A model that runs: what `moge_hal.load` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moge_hal.backend import Backend, Step, StepOut
from moge_hal.cache import require_room
from moge_hal.config import Config
from moge_hal.errors import UserError, require_whole

if TYPE_CHECKING:
    from moge_hal.bind import Choice
    from moge_hal.generate import Piece
    from moge_hal.tokenizer import Tokenizer


class Model:
    """A configuration, a backend and a step: `model(input_ids)`, `model.generate(text)`."""

    def __init__(
        self,
        config: Config,
        backend: Backend,
        step: Step,
        dtype: torch.dtype,
        choices: list[Choice],
        weights: Mapping[str, Tensor],
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.config = config
        self.backend = backend
        self.dtype = dtype
        self.choices = choices
        # By canonical name, as they were before packing; may read from disk on access.
        self.weights = weights
        self.tokenizer = tokenizer
        self.run_step = step

    def __call__(self, input_ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Logits of whole rows: input_ids [B, S] -> [B, S, V], float32 (float64 in float64)."""
        try:
            ids = torch.as_tensor(input_ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"input_ids must be rows of ids of one length: {error}") from None
        if ids.dim() != 2 or not ids.numel():
            raise UserError(
                f"input_ids must have shape [B, S], not {list(ids.shape)}, and no size 0"
            )
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        return self.step(ids, positions, None).logits

    def step(self, ids: Tensor, positions: Tensor, cache: Any, last_only: bool = False) -> StepOut:
        """One step: ids and positions [B, S] (-1 = padding), a cache from `new_cache` or None.

        The cache is donated: use the one that comes back. Raises `UserError` for an id outside the
        vocabulary or a position beyond the context, and `CacheFullError` before anything is
        written. ids and positions may lie on the host, where these checks are free, or on the
        device, where they cost a read.
        """
        if ids.dim() != 2 or positions.shape != ids.shape:
            raise UserError(
                f"ids and positions must both have shape [B, S], "
                f"not {list(ids.shape)} and {list(positions.shape)}"
            )
        if any(t.is_floating_point() or t.is_complex() for t in (ids, positions)):
            raise UserError("ids and positions must be whole numbers")
        if ids.numel():
            vocab = self.config.vocab_size
            for token_id in (int(ids.min()), int(ids.max())):
                if not 0 <= token_id < vocab:
                    raise UserError(f"token id {token_id} is outside the vocabulary of {vocab}")
        if cache is not None:
            if cache.batch != len(ids):
                raise UserError(
                    f"the cache is for {cache.batch} rows, ids and positions have {len(ids)}; "
                    f"make one with new_cache({len(ids)})"
                )
            require_room(cache.capacity, positions)
        last = int(positions.max()) if positions.numel() else -1
        if last >= self.config.max_position_embeddings:
            raise UserError(
                f"position {last} lies beyond the context of "
                f"{self.config.max_position_embeddings} tokens; shorten the input"
            )
        device = self.backend.device()
        ids, positions = ids.to(device).long(), positions.to(device).long()
        with torch.inference_mode():
            return self.run_step(ids, positions, cache, last_only)

    def new_cache(self, batch: int, capacity: int | None = None) -> Any:
        """An empty cache for `batch` rows of `capacity` positions (None = the whole context)."""
        positions = self.config.max_position_embeddings if capacity is None else capacity
        require_whole("batch", batch)
        require_whole("capacity", positions)
        return self.backend.new_cache(self.config, batch, positions, self.dtype)

    def generate(self, prompt: str | Sequence[str], **options: Any) -> Any:
        """The text that follows: `moge_hal.generate.generate`, which see for the options."""
        from moge_hal.generate import generate

        return generate(self, prompt, **options)

    def stream(self, prompt: str | Sequence[str], **options: Any) -> Iterator[Piece]:
        """The same, piece by piece as it is written: `moge_hal.generate.stream`."""
        from moge_hal.generate import stream

        return stream(self, prompt, **options)

    def report(self) -> str:
        """Which implementation every operation got, and why: one line an operation."""
        head = f"backend {self.backend.name} on {self.backend.probe().device}, {self.dtype}"
        lines = [f"  {c.op:14} {c.implementation:8} {c.reason}" for c in self.choices]
        return "\n".join([head, *lines])
