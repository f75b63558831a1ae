"""The latent cache where it is read: on the card for the layers that are there, in CPU memory for the others.

On the card a token's rows of all layers lie beside each other: the cache grows at its end, and no row ever moves. A row
of 1,152 bytes (512 + 64 in bf16) is long enough to be read alone; SGLang's pages of MLA's cache are one row by default.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from localmoe.errors import ContextOverflowError, UsageError
from localmoe.model.card.arena import Arena
from localmoe.model.config import ModelConfig
from localmoe.model.kv_cache import LatentCache, row_bytes
from localmoe.model.sizes import CACHE_STEP, card_cache_bytes

_PATIENCE = 32
"""Short passes for which half of the room was enough, before it is left: neither a question beside a long conversation
nor the steps of a long prompt move experts back and forth."""


class CardLatents:
    """The card's part, at one address that CUDA graphs know: the front of `arena`, of which it takes more as
    the context grows, and leaves what a much shorter one does without; without an arena all of it at once. One cache at
    a time holds it."""

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        dtype: torch.dtype,
        layers: Iterable[int],
        device: torch.device,
        arena: Arena | None = None,
    ) -> None:
        stored = torch.uint8 if dtype == torch.int8 else dtype
        width, indices = row_bytes(config, dtype) // stored.itemsize, list(layers)
        self._token = card_cache_bytes(row_bytes(config, dtype), len(indices), 1)
        self.capacity = capacity
        if arena is None:
            arena = Arena(capacity * self._token, device, taken=capacity * self._token)
        self._arena = arena
        memory = arena.memory[: capacity * self._token].view(stored).view(capacity, len(indices), -1)
        self.rows = dict(zip(indices, memory[..., :width].unbind(1), strict=True))
        self.holder: Callable[[], CardCache | None] = lambda: None
        self._roomy = 0  # passes one after the other

    @property
    def nbytes(self) -> int:
        """Bytes that are the cache's now."""
        return min(self._arena.taken, self.capacity * self._token)

    def make_room(self, tokens: int) -> None:
        """Have the rows of so many tokens, up to `capacity`. Between passes."""
        if tokens * self._token > self._arena.taken:
            self._arena.take(self._room(tokens))

    def leave_room(self, tokens: int) -> None:
        """A short pass comes that needs the rows of so many tokens, and no row behind them is anybody's. Between
        passes, and after `make_room`."""
        room = self._room(tokens)
        self._roomy = self._roomy + 1 if 2 * room <= self._arena.taken else 0
        if self._roomy >= _PATIENCE:
            self._roomy = 0
            self._arena.leave(room)

    def _room(self, tokens: int) -> int:
        return min(-(-tokens // CACHE_STEP) * CACHE_STEP, self.capacity) * self._token


class CardCache(LatentCache):
    """A sequence's latents. Making one takes the card's memory from the one before, which is then of no more use."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, latents: CardLatents, capacity: int) -> None:
        others = (layer for layer in range(config.num_hidden_layers) if layer not in latents.rows)
        super().__init__(config, min(capacity, latents.capacity), dtype, layers=others)
        self._latents = latents
        latents.holder = weakref.ref(self)  # a circle would keep the card's memory after the model

    @property
    def layers(self) -> tuple[int, ...]:
        """Their indices, those on the card and the others."""
        return tuple(sorted((*super().layers, *self._latents.rows)))

    @property
    def nbytes(self) -> int:
        """Bytes allocated now, over all layers."""
        return super().nbytes + self._latents.nbytes

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
        """Have room for `count` more tokens. Between passes. Raises ContextOverflowError where they do not fit,
        UsageError for a cache that lost its memory."""
        if self._latents.holder() is not self:
            raise UsageError("another generation has begun on the card; finish one before the next")
        if self.length + count > self.capacity:
            raise ContextOverflowError(f"the context holds {self.capacity} tokens and {self.length + count} are needed")
        self._latents.make_room(self.length + count)
