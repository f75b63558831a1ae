"""DeepSeek's FP8 checkpoints: float8 e4m3 values with one float32 factor a block of 128 x 128.

Source of the maths: `weight_dequant` in DeepSeek-V3's inference/kernel.py (w = value * weight_scale_inv);
blocks at the right and bottom edges are cut off, not padded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scale_shape(out_features: int, in_features: int, block: tuple[int, int]) -> tuple[int, int]:
    """Shape of `weight_scale_inv` for an [out, in] matrix."""
    return -(-out_features // block[0]), -(-in_features // block[1])


def dequantize(values: Tensor, scale_inv: Tensor, block: tuple[int, int] = (128, 128)) -> Tensor:
    """float32 [out, in] from e4m3 `values` [out, in] and `scale_inv` [ceil(out/128), ceil(in/128)]."""
    weight = values.to(torch.float32)
    factors = scale_inv.to(torch.float32).repeat_interleave(block[1], dim=1)[:, : values.shape[1]]  # [blocks, in]
    for index in range(factors.shape[0]):
        weight[index * block[0] : (index + 1) * block[0]] *= factors[index]
    return weight
