"""The forms a matrix takes in memory, straight from the file: values and scales, nothing repacked.

Every form is an [out_features, in_features] matrix. `dequantize` is the one definition of what its
numbers mean; kernels are tested against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.formats import fp8, int4, int8, nf4


@dataclass(frozen=True)
class DenseWeight:
    """Not quantized: `tensor` [out, in], float32, float16 or bfloat16."""

    tensor: Tensor

    @property
    def out_features(self) -> int:
        return self.tensor.shape[0]

    @property
    def in_features(self) -> int:
        return self.tensor.shape[1]

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


@dataclass(frozen=True)
class Int4Weight:
    """`packed` int32 [out, in/8] of q+8 nibbles, `scale` bf16 [out, in/group_size]: w = q * scale."""

    packed: Tensor
    scale: Tensor
    group_size: int

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def in_features(self) -> int:
        return self.packed.shape[1] * 8

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes


@dataclass(frozen=True)
class Int8Weight:
    """`packed` int32 [out, in/4] of q+128 bytes, `scale` bf16 [out, in/group_size]: w = q * scale."""

    packed: Tensor
    scale: Tensor
    group_size: int

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def in_features(self) -> int:
        return self.packed.shape[1] * 4

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes


@dataclass(frozen=True)
class Nf4Weight:
    """`codes` uint8 [out, in/2], high nibble first, `absmax` float32 [out, in/64]: w = NF4[code] * absmax."""

    codes: Tensor
    absmax: Tensor

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1] * 2

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes


@dataclass(frozen=True)
class Fp8Weight:
    """`values` float8_e4m3fn [out, in], `scale_inv` float32, one a block: w = value * scale_inv."""

    values: Tensor
    scale_inv: Tensor
    block: tuple[int, int] = (128, 128)

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        return self.values.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale_inv.nbytes


Weight = DenseWeight | Int4Weight | Int8Weight | Nf4Weight | Fp8Weight


def dequantize(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix's numbers, [out, in]: computed in float32, then rounded to `dtype`.

    int4 and int8 are exact in float32: at most 8 bits of value times 8 bits of scale.
    """
    match weight:
        case DenseWeight():
            return weight.tensor.to(dtype)
        case Int4Weight():
            return int4.dequantize(weight.packed, weight.scale, weight.group_size).to(dtype)
        case Int8Weight():
            return int8.dequantize(weight.packed, weight.scale, weight.group_size).to(dtype)
        case Nf4Weight():
            return nf4.dequantize(weight.codes, weight.absmax).to(dtype)
        case Fp8Weight():
            return fp8.dequantize(weight.values, weight.scale_inv, weight.block).to(dtype)


def rows_of(weight: Weight, indices: Tensor) -> Weight:
    """Rows `indices` int64 [n] of a matrix, in its own form; no others are read. Raises IndexError beyond the last."""
    match weight:
        case DenseWeight():
            return DenseWeight(weight.tensor[indices])
        case Int4Weight():
            return Int4Weight(weight.packed[indices], weight.scale[indices], weight.group_size)
        case Int8Weight():
            return Int8Weight(weight.packed[indices], weight.scale[indices], weight.group_size)
        case Nf4Weight():
            return Nf4Weight(weight.codes[indices], weight.absmax[indices])
        case Fp8Weight():
            values = weight.values.view(torch.uint8)[indices].view(torch.float8_e4m3fn)
            height, width = weight.block
            return Fp8Weight(values, weight.scale_inv[indices // height], (1, width))
