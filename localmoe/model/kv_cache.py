"""The latent cache: what MLA remembers of a token, `kv_lora_rank + qk_rope_head_dim` numbers a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from localmoe.errors import ContextOverflowError
from localmoe.model.config import ModelConfig

_STEP = 256


class LatentCache:
    """Latents (after their norm) and rotated shared keys of the tokens so far, one matrix a layer.

    Memory is taken as the context grows, by half again each time, never beyond `capacity` tokens: a long
    maximum context costs nothing until it is used. A forward pass appends to every layer, then advances the
    length once, so a pass that is interrupted leaves the cache as it was.
    """

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype = torch.float32) -> None:
        self.capacity = capacity
        self._length = 0
        self._width = config.latent_width
        self._rows = [torch.empty(0, self._width, dtype=dtype) for _ in range(config.num_hidden_layers)]

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes allocated now, over all layers."""
        return sum(rows.nbytes for rows in self._rows)

    def append(self, layer: int, rows: Tensor) -> Tensor:
        """Write `rows` [T, width] after the tokens held and return all of the layer's: [length + T, width].

        The result is a view, valid until the next append. Raises ContextOverflowError beyond `capacity`.
        """
        held = self.reserve(layer, len(rows))
        held[self._length :] = rows
        return held

    def reserve(self, layer: int, count: int) -> Tensor:
        """The layer's rows [length + count, width], the last `count` of them to be written by the caller.

        As `append` otherwise.
        """
        end = self._length + count
        if end > self.capacity:
            raise ContextOverflowError(f"the context holds {self.capacity} tokens and {end} are needed")
        held = self._rows[layer]
        if end > len(held):
            held = self._grow(layer, end)
        return held[:end]

    def advance(self, count: int) -> None:
        """Count `count` appended tokens as held: once a pass, after the last layer."""
        self._length += count

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on. Raises ValueError for more than is held."""
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate a cache of {self._length} tokens to {length}")
        self._length = length

    def _grow(self, layer: int, needed: int) -> Tensor:
        held = self._rows[layer]
        size = max(needed, len(held) + len(held) // 2)
        size = min(-(-size // _STEP) * _STEP, self.capacity)
        grown = torch.empty(size, self._width, dtype=held.dtype)
        grown[: self._length] = held[: self._length]
        self._rows[layer] = grown  # one layer at a time: the old copy lives only this long
        return grown
