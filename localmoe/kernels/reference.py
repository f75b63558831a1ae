"""The truth that every fast kernel is tested against: dequantize to float32, multiply in float32.

T = tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from localmoe.formats.weights import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, Nf4Weight, Weight, dequantize

_BLOCK_WEIGHTS = 1 << 24  # weights dequantized at a time: 64 MB of float32, whatever the matrix


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x @ W^T: float32 [T, in] and a stored [out, in] matrix -> float32 [T, out].

    Rows of W are taken a block at a time, so that a vocabulary-sized head needs no float32 copy of itself.
    """
    rows = _rows_per_block(weight)
    if rows >= weight.out_features:
        return x @ dequantize(weight).T
    result = torch.empty(x.shape[0], weight.out_features, dtype=torch.float32)  # [T, out]
    for start in range(0, weight.out_features, rows):
        stop = min(start + rows, weight.out_features)
        result[:, start:stop] = x @ dequantize(row_slice(weight, start, stop)).T
    return result


def expert(x: Tensor, gate: Weight, up: Weight, down: Weight) -> Tensor:
    """One expert's SwiGLU: down(silu(gate x) * up x), float32 [T, H] -> [T, H]."""
    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


def row_slice(weight: Weight, start: int, stop: int) -> Weight:
    """Rows start to stop of a stored matrix, without a copy; FP8 must be cut where its blocks are."""
    match weight:
        case DenseWeight():
            return DenseWeight(weight.tensor[start:stop])
        case Int4Weight():
            return Int4Weight(weight.packed[start:stop], weight.scale[start:stop], weight.group_size)
        case Int8Weight():
            return Int8Weight(weight.packed[start:stop], weight.scale[start:stop], weight.group_size)
        case Nf4Weight():
            return Nf4Weight(weight.codes[start:stop], weight.absmax[start:stop])
        case Fp8Weight():
            height = weight.block[0]
            if start % height:
                raise ValueError(f"row {start} is not a multiple of the block height {height}")
            scales = weight.scale_inv[start // height : -(-stop // height)]
            return Fp8Weight(weight.values[start:stop], scales, weight.block)


def _rows_per_block(weight: Weight) -> int:
    rows = max(1, _BLOCK_WEIGHTS // max(1, weight.in_features))
    if isinstance(weight, Fp8Weight):
        rows = max(1, rows // weight.block[0]) * weight.block[0]
    return rows
