"""The latent cache where it is read: on the card for the layers that are there, in CPU memory for the others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from localmoe.errors import ContextOverflowError, UsageError
from localmoe.model.config import ModelConfig
from localmoe.model.kv_cache import LatentCache, row_bytes


class CardLatents:
    """The card's part, taken once for the whole context: a CUDA graph knows it by its address. One cache at a time
    holds it."""

    def __init__(
        self, config: ModelConfig, capacity: int, dtype: torch.dtype, layers: Iterable[int], device: torch.device
    ) -> None:
        stored = torch.uint8 if dtype == torch.int8 else dtype
        width, indices = row_bytes(config, dtype) // stored.itemsize, list(layers)
        memory = torch.zeros(len(indices), capacity, width, dtype=stored, device=device)
        self.capacity = capacity
        self.rows = dict(zip(indices, memory.unbind(0), strict=True))
        self.holder: CardCache | None = None


class CardCache(LatentCache):
    """A sequence's latents. Making one takes the card's memory from the one before, which is then of no more use."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, latents: CardLatents, capacity: int) -> None:
        others = (layer for layer in range(config.num_hidden_layers) if layer not in latents.rows)
        super().__init__(config, min(capacity, latents.capacity), dtype, layers=others)
        self._latents = latents
        latents.holder = self

    @property
    def nbytes(self) -> int:
        """Bytes allocated now, over all layers."""
        return super().nbytes + sum(rows.nbytes for rows in self._latents.rows.values())

    def reserve(self, layer: int, count: int) -> Tensor:
        """As `LatentCache.reserve`; rows of the card's layers are on the card."""
        if layer not in self._latents.rows:
            return super().reserve(layer, count)
        self.check_room(count)
        return self._latents.rows[layer][: self.length + count]

    def rows(self, layer: int) -> Tensor:
        """All of a card layer's rows, [capacity of the card's memory, width]."""
        return self._latents.rows[layer]

    def check_room(self, count: int) -> None:
        """Raises ContextOverflowError where `count` more tokens do not fit, UsageError for a cache that lost its
        memory."""
        if self._latents.holder is not self:
            raise UsageError("another generation has begun on the card; finish one before the next")
        if self.length + count > self.capacity:
            raise ContextOverflowError(f"the context holds {self.capacity} tokens and {self.length + count} are needed")
