"""A stored matrix, or a stack of equal ones, as the kernels take it: on the device, its words as they are on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from localmoe.errors import DeviceError
from localmoe.formats import nf4
from localmoe.formats.scheme import NF4_BLOCK
from localmoe.formats.weights import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, Nf4Weight, Weight, dequantize

_DENSE, _INT4, _INT8, _NF4 = range(4)  # as unpack.py numbers them


@dataclass(frozen=True)
class DeviceMatrix:
    """`count` matrices [out, in], stacked. `values` are [count * out, words], `scales` [count * out, groups].

    `table` holds NF4's sixteen values; of the other forms it, and a dense one's `scales`, is a placeholder.
    """

    kind: int
    group: int
    count: int
    out_features: int
    in_features: int
    values: Tensor
    scales: Tensor
    table: Tensor

    @property
    def octets(self) -> bool:
        """Whether `matvec` wants its vectors in octets."""
        return self.kind != _DENSE

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (self.scales.nbytes if self.octets else 0)


def upload(weights: Sequence[Weight], device: torch.device) -> DeviceMatrix:
    """Stack matrices of one shape and form on `device`. FP8 becomes bf16. Raises DeviceError for mixed forms."""
    parts = [_parts(weight) for weight in weights]
    kinds = {(kind, group) for kind, group, _, _ in parts}
    shapes = {(weight.out_features, weight.in_features) for weight in weights}
    if len(kinds) != 1 or len(shapes) != 1:
        raise DeviceError("the CUDA kernels need all matrices of a stack to have one form and shape")
    ((kind, group),) = kinds
    ((out_features, in_features),) = shapes
    if kind != _DENSE and in_features % 8:
        raise DeviceError(f"the CUDA kernels need rows of a multiple of 8 weights, not {in_features}")
    values = torch.cat([part[2] for part in parts]).to(device)
    scales = torch.cat([part[3] for part in parts]).to(device)
    table = torch.tensor(nf4.VALUES, dtype=torch.float32, device=device)
    return DeviceMatrix(kind, group, len(parts), out_features, in_features, values, scales, table)


def _parts(weight: Weight) -> tuple[int, int, Tensor, Tensor]:
    """Kind, group, words and scales."""
    match weight:
        case Int4Weight():
            return _INT4, weight.group_size, weight.packed, weight.scale
        case Int8Weight():
            return _INT8, weight.group_size, weight.packed.contiguous().view(torch.int64), weight.scale
        case Nf4Weight():
            return _NF4, NF4_BLOCK, weight.codes.contiguous().view(torch.int32), weight.absmax
        case Fp8Weight():
            return _DENSE, 32, dequantize(weight, torch.bfloat16), torch.empty(0)
        case DenseWeight():
            return _DENSE, 32, weight.tensor.contiguous(), torch.empty(0)


def octets(x: Tensor) -> Tensor:
    """[..., n] in the order that a matrix of quantized words wants; 8 must divide n."""
    ordered: Tensor = x.unflatten(-1, (-1, 8)).transpose(-1, -2).flatten(-2)
    return ordered.contiguous()


_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of it."""
    return _DTYPES[dtype]
