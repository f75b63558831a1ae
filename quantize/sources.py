"""Reading a source checkpoint a few rows at a time: bf16, fp16, fp32, and DeepSeek's FP8 in blocks.

Rows come straight from the file into fresh memory, never through a mapping, so resident memory is bounded by
the slab whatever the matrix. What cannot be trusted (NaN, infinity, an FP8 matrix without its scales) is an
error that names the tensor.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from localmoe.errors import CheckpointError, StorageError, UsageError
from localmoe.formats import fp8
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.safetensors import TensorInfo
from quantize.foreign import open_packed

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn
SCALE = "_scale_inv"

_SLAB_BYTES = 8 * 2**20  # of the source's own dtype; a slab of FP8 is four times that in float32


@dataclass(frozen=True)
class Slab:
    """Rows `start` to `start + len(values)` of a matrix, as they are stored."""

    info: TensorInfo
    start: int
    values: Tensor
    """[rows, in]"""
    factors: Tensor | None = None
    """Of FP8: one for each of their blocks, whole ones but at the matrix's edges."""
    block: tuple[int, int] = (128, 128)

    @property
    def source_bytes(self) -> int:
        """Without the factors."""
        return self.values.nbytes

    @property
    def rows(self) -> Tensor:
        """Float32 [rows, in], made each time. Raises CheckpointError, naming the tensor, for NaN and infinity."""
        if self.factors is not None:
            rows = fp8.dequantize(self.values, self.factors, self.block)
        else:
            rows = self.values.to(torch.float32)
        _check_finite(self.info, rows)
        return rows

    def check_finite(self) -> None:
        """Raises CheckpointError, naming the tensor, for NaN and infinity."""
        _ = self.rows


def open_source(directory: Path) -> Checkpoint:
    """Open an unquantized checkpoint, or a `ForeignCheckpoint` that others packed. Checks that FP8 matrices and scales
    come in pairs.

    Raises UsageError for a checkpoint that is in our own layout already, CheckpointError and UnsupportedModelError as
    `Checkpoint.open` does.
    """
    foreign = open_packed(directory)
    if foreign is not None:
        return foreign
    return check_source(Checkpoint.open(directory))


def check_source(checkpoint: Checkpoint) -> Checkpoint:
    """What `open_source` checks of an opened checkpoint, which it returns."""
    directory = checkpoint.directory
    if checkpoint.quantization is not None:
        kinds = ", ".join(sorted({group.scheme.kind for group in checkpoint.quantization.groups}))
        raise UsageError(
            f"{directory}: is quantized already ({checkpoint.quantization.method}, {kinds}); "
            "run it as it is, or quantize the checkpoint that it was made from"
        )
    for info in checkpoint.tensors.values():
        if info.dtype == FP8:
            _check_fp8(checkpoint, info)
        elif info.name.endswith(SCALE):
            weight = checkpoint.tensors.get(info.name.removesuffix(SCALE))
            if weight is None or weight.dtype != FP8:
                raise CheckpointError(f"{info.file.name}: {info.name} is the scale of an FP8 weight that is missing")
        elif info.dtype == torch.float8_e5m2:
            raise CheckpointError(f"{info.file.name}: {info.name} is float8 e5m2, which localmoe does not read")
    return checkpoint


def _check_fp8(checkpoint: Checkpoint, info: TensorInfo) -> None:
    where = f"{info.file.name}: {info.name}"
    if checkpoint.fp8_block is None:
        raise CheckpointError(f"{where} is FP8, but config.json has no fp8 quantization_config")
    if len(info.shape) != 2 or not info.name.endswith(".weight"):
        raise CheckpointError(f"{where} is FP8 but not a matrix named .weight")
    scale = checkpoint.tensors.get(info.name + SCALE)
    if scale is None:
        raise CheckpointError(f"{where} is FP8 and its scale {info.name}{SCALE} is missing; pull the model again")
    wanted = fp8.scale_shape(info.shape[0], info.shape[1], checkpoint.fp8_block)
    if scale.shape != wanted or scale.dtype not in FLOATS:
        raise CheckpointError(
            f"{scale.file.name}: {scale.name} is {scale.dtype} {list(scale.shape)}; float32 {list(wanted)} is needed"
        )


class SourceReader:
    """Reads slabs of a checkpoint's tensors, from any thread; keeps its files open."""

    def __init__(self, checkpoint: Checkpoint, slab_bytes: int = _SLAB_BYTES) -> None:
        self.checkpoint = checkpoint
        self._slab_bytes = slab_bytes
        self._descriptors: dict[Path, int] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def forget(self, file: Path) -> None:
        """Close a file that is about to be deleted; nothing may be reading it."""
        with self._opening:
            descriptor = self._descriptors.pop(file, None)
        if descriptor is not None:
            os.close(descriptor)

    def matrix(self, name: str) -> Iterator[Slab]:
        """The rows of matrix `name` [out, in].

        Raises CheckpointError, naming the tensor, for a dtype that is not a weight's.
        """
        info = self.checkpoint.info(name)
        if info.dtype != FP8 and info.dtype not in FLOATS:
            raise CheckpointError(f"{info.file.name}: {name} is {info.dtype}; a weight must be float32, 16 or 8")
        out_features, in_features = info.shape
        block = self.checkpoint.fp8_block if info.dtype == FP8 else None
        scale = self.checkpoint.read(name + SCALE) if block else None
        row_bytes = in_features * info.dtype.itemsize
        step = self._rows(row_bytes, block[0] if block else 1)
        for start in range(0, out_features, step):
            stop = min(out_features, start + step)
            values = self._read(info, start * row_bytes, stop * row_bytes).view(info.dtype).view(-1, in_features)
            if block and scale is not None:
                yield Slab(info, start, values, scale[start // block[0] : -(-stop // block[0])], block)
            else:
                yield Slab(info, start, values)

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(offset in bytes, flat piece in the tensor's own dtype) of any tensor that is not FP8.

        Raises CheckpointError for NaN and infinity.
        """
        info = self.checkpoint.info(name)
        step = self._slab_bytes - self._slab_bytes % info.dtype.itemsize
        for start in range(0, info.nbytes, step):
            piece = self._read(info, start, min(info.nbytes, start + step)).view(info.dtype)
            if info.dtype.is_floating_point:
                _check_finite(info, piece)
            yield start, piece

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors are the same to the bit; read side by side, a slab of each at a time."""
        one, other = self.checkpoint.info(first), self.checkpoint.info(second)
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return all(
            torch.equal(self._read(one, start, stop), self._read(other, start, stop))
            for start in range(0, one.nbytes, self._slab_bytes)
            for stop in (min(one.nbytes, start + self._slab_bytes),)
        )

    def _rows(self, row_bytes: int, multiple: int) -> int:
        """How many rows a slab has: whole FP8 blocks, at least one."""
        return max(1, self._slab_bytes // max(1, row_bytes) // multiple) * multiple

    def _read(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """uint8 copy of bytes `start` to `stop` of a tensor."""
        buffer = torch.empty(stop - start, dtype=torch.uint8)
        view = buffer.numpy().data
        try:
            descriptor = self._descriptor(info.file)
            offset = info.offset + start
            while view:
                count = os.preadv(descriptor, [view], offset)
                if count == 0:
                    raise CheckpointError(f"{info.file.name}: ends inside {info.name}; download it again")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise StorageError(f"{info.file}: cannot be read ({error.strerror})") from error
        return buffer

    def _descriptor(self, file: Path) -> int:
        with self._opening:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[file]


def _check_finite(info: TensorInfo, values: Tensor) -> None:
    if values.numel() == 0:
        return
    lowest, highest = torch.aminmax(values)  # both are NaN where one element is
    if not (lowest.isfinite() and highest.isfinite()):
        raise CheckpointError(f"{info.file.name}: {info.name} has NaN or infinite values; pull the model again")
