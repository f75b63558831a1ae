"""A stored matrix, or a stack of equal ones, as the kernels take it: on the device, its words as they are on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton.language as tl
from torch import Tensor

from localmoe.errors import DeviceError
from localmoe.formats import nf4
from localmoe.formats.scheme import NF4_BLOCK
from localmoe.formats.weights import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, Nf4Weight, Weight, dequantize
from localmoe.kernels.triton.launch import Launch

_DENSE, _INT4, _INT8, _NF4 = range(4)  # as unpack.py numbers them
_ALIGNED = 16  # what a program loads at a time
SLOT_UNIT = 256
"""A slot's bytes are a multiple of this: Triton then knows that all in it is aligned, whatever its dtype."""


@dataclass(frozen=True)
class DeviceMatrix:
    """`count` matrices [out, in], stacked. `values` are [count * out, words], `scales` [count * out, groups]; where
    a stack's matrices do not follow each other directly both have a dimension more, [count, out, ...].

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

    @property
    def strides(self) -> tuple[int, int]:
        """From one matrix of the stack to the next: elements of `values` and of `scales`."""
        if self.values.dim() == 3:
            return self.values.stride(0), self.scales.stride(0) if self.octets else 0
        scales = self.out_features * self.scales.shape[1] if self.octets else 0
        return self.out_features * self.values.shape[1], scales

    def rows(self, first: int, last: int) -> DeviceMatrix:
        """Rows [first, last) of the first matrix, as a matrix of their own over the same memory."""
        scales = self.scales[first:last] if self.octets else self.scales
        return replace(self, count=1, out_features=last - first, values=self.values[first:last], scales=scales)

    def put(self, place: int, weight: Weight) -> None:
        """Copy a matrix of the same form and shape to a place of the stack; on the current stream, from pinned memory
        without waiting. Raises DeviceError for another form or shape."""
        kind, group, values, scales = _parts(weight)
        if (kind, group, weight.out_features, weight.in_features) != (
            self.kind, self.group, self.out_features, self.in_features
        ):  # fmt: skip
            raise DeviceError("the CUDA kernels need all matrices of a stack to have one form and shape")
        apart = self.values.dim() == 3
        rows = place if apart else slice(place * self.out_features, (place + 1) * self.out_features)
        self.values[rows].copy_(values, non_blocking=True)
        if self.octets:
            self.scales[rows].copy_(scales, non_blocking=True)


def vector_knobs(kind: int, launch: Launch, columns: int | None = None) -> dict[str, int]:
    """A program's rows, columns and warps where a matrix of this kind is multiplied with a few vectors. `columns`
    instead of the usual number, for short rows."""
    if kind == _DENSE:
        rows, usual, warps = launch.matvec_rows, launch.matvec_columns, launch.matvec_warps
    else:
        usual = launch.packed_columns_int8 if kind == _INT8 else launch.packed_columns
        rows, warps = launch.packed_rows, launch.packed_warps
    return {"BLOCK_N": rows, "BLOCK_K": columns or usual, "num_warps": warps}


def stack_knobs(kind: int, launch: Launch, count: int) -> dict[str, int]:
    """The same where `count` such matrices, a power of 2, are multiplied beside each other: a warp each."""
    if count == 1:
        return vector_knobs(kind, launch)
    if kind == _DENSE:
        return {"BLOCK_N": launch.stack_rows, "BLOCK_K": launch.stack_columns, "num_warps": min(count, 8)}
    knobs = vector_knobs(kind, launch)
    return knobs | {"num_warps": min(count * knobs["num_warps"], 8)}


def upload(weights: Sequence[Weight], device: torch.device) -> DeviceMatrix:
    """Stack matrices of one shape and form on `device`. FP8 becomes bf16. Raises DeviceError for mixed forms, and for
    rows that the kernels cannot read."""
    stack = empty_stack(weights[0], len(weights), device)
    for place, weight in enumerate(weights):
        stack.put(place, weight)
    return stack


def empty_stack(like: Weight, count: int, device: torch.device, *, pinned: bool = False) -> DeviceMatrix:
    """Room for `count` matrices of the form and shape of `like`, or in pinned CPU memory for copies to such. Raises
    DeviceError as `upload` does."""
    kind, group, values, scales = _parts(like)
    _check_rows(kind, like)
    room = [
        torch.empty(count * part.shape[0], *part.shape[1:], dtype=part.dtype, device=device, pin_memory=pinned)
        for part in (values, scales)
    ]
    table = torch.tensor(nf4.VALUES, dtype=torch.float32, device=device)
    return DeviceMatrix(kind, group, count, like.out_features, like.in_features, room[0], room[1], table)


def slot_bytes(weights: Sequence[Weight]) -> int:
    """Bytes of a slot that holds one of each of these matrices, as `slot_stacks` lays them out."""
    return _up(sum(_up(part.nbytes, _ALIGNED) for weight in weights for part in _parts(weight)[2:]), SLOT_UNIT)


def slot_stacks(likes: Sequence[Weight], memory: Tensor) -> list[DeviceMatrix]:
    """A stack for each of `likes`, one matrix of each in a slot: uint8 `memory` [slots, bytes], at least `slot_bytes`
    each and a multiple of `SLOT_UNIT`. Raises DeviceError as `upload` does."""
    stacks, at = [], 0
    for like in likes:
        kind, group, *parts = _parts(like)
        _check_rows(kind, like)
        views = []
        for part in parts:
            if part.numel() == 0:
                views.append(part.to(memory.device))
                continue
            own = memory[:, at : at + part.nbytes].view(part.dtype)  # [slots, numel]
            views.append(own.unflatten(1, part.shape))
            at += _up(part.nbytes, _ALIGNED)
        table = torch.tensor(nf4.VALUES, dtype=torch.float32, device=memory.device)
        stacks.append(
            DeviceMatrix(kind, group, len(memory), like.out_features, like.in_features, views[0], views[1], table)
        )
    return stacks


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _check_rows(kind: int, like: Weight) -> None:
    if kind != _DENSE and like.in_features % 8:
        raise DeviceError(f"the CUDA kernels need rows of a multiple of 8 weights, not {like.in_features}")


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
