"""Grouped symmetric int4, as compressed-tensors' `pack-quantized` stores it.

Element i of a row is bits `4 * (i % 8)` of little-endian int32 word `i // 8`, stored as q + 8 with q in
[-8, 7]. So byte b of a row holds element 2b in its low nibble and 2b + 1 in its high one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from localmoe.formats import grouped

LOWEST, HIGHEST = -8, 7


def quantize(weight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """Nearest grid points, int8 [out, in] in [-8, 7], of float32 `weight` [out, in].

    `scale` is bf16 [out, in / group_size]; ties go to the even integer, a zero scale gives q = 0.
    """
    return grouped.nearest(weight, scale, group_size, LOWEST, HIGHEST)


def pack(q: Tensor) -> Tensor:
    """int8 [out, in] in [-8, 7] -> int32 [out, in / 8]."""
    nibbles = (q + 8).to(torch.uint8)  # [out, in]
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).contiguous().view(torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """int32 [out, in / 8] -> int8 [out, in] in [-8, 7]."""
    pairs = packed.contiguous().view(torch.uint8)  # [out, in / 2]
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1).to(torch.int8) - 8


def dequantize(packed: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """float32 [out, in]: q * scale, exact (4 bits of value, 8 of scale)."""
    return grouped.scaled(unpack(packed), scale, group_size)
