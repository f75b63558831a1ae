"""The latent cache: what MLA remembers of a token, `kv_lora_rank + qk_rope_head_dim` numbers a layer.

In int8 a row is bytes: the latent as 128 + int8, the rotated key in bf16, which long contexts are sensitive to, and
the latent's float32 scale. vLLM's FP8 cache for MLA divides a row the same way.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from localmoe.errors import ContextOverflowError
from localmoe.formats.mapping import use_huge_pages
from localmoe.model.config import ModelConfig

_STEP = 256
_LARGE = 8 << 20  # bytes of a layer, beside which the 2 MiB that its last tokens may waste are little


def row_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of a token in one layer; `dtype` float32, bfloat16 or int8."""
    if dtype == torch.int8:
        return config.kv_lora_rank + 2 * config.qk_rope_head_dim + 4
    return config.latent_width * dtype.itemsize


def pack_int8(rows: Tensor, rank: int) -> Tensor:
    """Float32 rows [T, width], whose first `rank` numbers are the latent, as uint8 [T, row_bytes]."""
    latent = rows[:, :rank]
    scale = latent.abs().amax(dim=1, keepdim=True) / 127.0  # [T, 1]
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    values = ((latent * inverse).round().clamp(-127, 127) + 128).to(torch.uint8)
    return torch.cat((values, _as_bytes(rows[:, rank:].bfloat16()), _as_bytes(scale)), dim=1)


def unpack_int8(packed: Tensor, rank: int) -> Tensor:
    """Float32 rows [T, width] of what `pack_int8` made."""
    scale = packed[:, -4:].contiguous().view(torch.float32)  # [T, 1]
    keys = packed[:, rank:-4].contiguous().view(torch.bfloat16)  # [T, p]
    return torch.cat(((packed[:, :rank].float() - 128) * scale, keys.float()), dim=1)


def _as_bytes(values: Tensor) -> Tensor:
    """[T, n] as uint8 [T, n * itemsize]."""
    # With strides that `view` accepts even without tokens
    flat = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    return flat.copy_(values).view(torch.uint8)


class LatentCache:
    """Latents (after their norm) and rotated shared keys of the tokens so far, one matrix a layer.

    Memory is taken as the context grows, by half again each time, never beyond `capacity` tokens: a long
    maximum context costs nothing until it is used. A forward pass appends to every layer, then advances the
    length once, so a pass that is interrupted leaves the cache as it was. `layers` are their indices, by default
    all of the main model's.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        layers: Iterable[int] | None = None,
    ) -> None:
        self.capacity = capacity
        self._length = 0
        self._rank = config.kv_lora_rank
        self._packed = dtype == torch.int8
        stored = torch.uint8 if self._packed else dtype
        self._width = row_bytes(config, dtype) // stored.itemsize
        indices = range(config.num_hidden_layers) if layers is None else layers
        self._rows = {layer: torch.empty(0, self._width, dtype=stored) for layer in indices}
        self._together: dict[tuple[int, ...], tuple[int, tuple[Tensor, ...]]] = {}  # what `reserve_all` gave, how long

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._length

    @property
    def layers(self) -> tuple[int, ...]:
        """Their indices."""
        return tuple(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes allocated now, over all layers."""
        return sum(rows.nbytes for rows in self._rows.values())

    def append(self, layer: int, rows: Tensor) -> Tensor:
        """Write float32 `rows` [T, width] after the tokens held and return all of the layer's: [length + T, width].

        The result may be a view, valid until the next append; of an int8 cache it is float32. Raises
        ContextOverflowError beyond `capacity`.
        """
        held = self.write(layer, rows)
        return unpack_int8(held, self._rank) if self._packed else held

    def write(self, layer: int, rows: Tensor) -> Tensor:
        """As `append`, but returns the rows as stored."""
        held = self.reserve(layer, len(rows))
        held[self._length :] = pack_int8(rows, self._rank) if self._packed else rows
        return held

    def reserve(self, layer: int, count: int) -> Tensor:
        """The layer's rows as stored, [length + count, width], the last `count` of them to be written by the caller.

        In int8 they are bytes, [length + count, row_bytes]. As `append` otherwise.
        """
        end = self._length + count
        return self._with_room(layer, end)[:end]

    def reserve_all(self, layers: tuple[int, ...], count: int) -> tuple[Tensor, ...]:
        """As `reserve`, of several layers, with whatever room there is beyond; the same tuple until memory moves."""
        end = self._length + count
        least, rows = self._together.get(layers, (-1, ()))
        if end > least:
            rows = tuple(self._with_room(layer, end) for layer in layers)
            self._together[layers] = min(map(len, rows), default=0), rows
        return rows

    def _with_room(self, layer: int, end: int) -> Tensor:
        """All of the layer's rows, at least `end`."""
        if end > self.capacity:
            raise ContextOverflowError(f"the context holds {self.capacity} tokens and {end} are needed")
        held = self._rows[layer]
        return held if end <= len(held) else self._grow(layer, end)

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
        if grown.nbytes >= _LARGE:
            use_huge_pages(grown)
        grown[: self._length] = held[: self._length]
        self._together.clear()
        self._rows[layer] = grown  # one layer at a time: the old copy lives only this long
        return grown
