"""NF4 in blocks of 64, as bitsandbytes packs it (high nibble first), without double quantization.

The sixteen values are the quantiles of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, appendix E).
bitsandbytes rounds; reading needs only the table.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import Tensor

from localmoe.formats.scheme import NF4_BLOCK

VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def _bitsandbytes() -> Any:
    """bitsandbytes.functional, imported late (it takes seconds) and without its advice about other packages."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return importlib.import_module("bitsandbytes.functional")


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes uint8 [out, in/2], absmax float32 [out, in/64]) of a float32 matrix [out, in], 64 dividing `in`."""
    bnb = _bitsandbytes()
    out_features, in_features = weight.shape
    packed, state = bnb.quantize_4bit(
        weight.to(torch.float32).contiguous(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False
    )
    codes: Tensor = packed.view(torch.uint8).reshape(out_features, in_features // 2)
    absmax: Tensor = state.absmax.to(torch.float32).reshape(out_features, in_features // NF4_BLOCK)
    return codes, absmax


def dequantize(codes: Tensor, absmax: Tensor) -> Tensor:
    """float32 [out, in]."""
    table = torch.tensor(VALUES, dtype=torch.float32, device=codes.device)
    indices = torch.stack((codes >> 4, codes & 15), dim=-1).flatten(1)  # [O, in]
    groups = table[indices.to(torch.int32)].reshape(*absmax.shape, NF4_BLOCK)  # [O, G, 64]
    groups *= absmax.unsqueeze(-1)
    return groups.flatten(1)
