"""Grouped symmetric int8, as compressed-tensors' `pack-quantized` stores it: byte i of a row is q + 128."""

from __future__ import annotations

import torch
from torch import Tensor

from localmoe.formats import grouped

LOWEST, HIGHEST = -128, 127


def quantize(weight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """Nearest grid points, int8 [out, in], of float32 `weight` [out, in]; `scale` bf16 [out, in / group_size]."""
    return grouped.nearest(weight, scale, group_size, LOWEST, HIGHEST)


def pack(q: Tensor) -> Tensor:
    """int8 [out, in] -> int32 [out, in / 4]."""
    return (q.contiguous().view(torch.uint8) ^ 128).view(torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """int32 [out, in / 4] -> int8 [out, in]."""
    return (packed.contiguous().view(torch.uint8) ^ 128).view(torch.int8)


def dequantize(packed: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """float32 [out, in]: q * scale, exact (8 bits of value, 8 of scale)."""
    return grouped.scaled(unpack(packed), scale, group_size)
