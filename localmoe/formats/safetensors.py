"""The safetensors container: one shard's header, read from a file that nobody vouches for.

The layout is 8 bytes of little-endian header length, a JSON object, then the data
(https://huggingface.co/docs/safetensors). It is read here and not through the library because localmoe
needs what the library hides: each tensor's place in the file, for bounded reads and for mapping.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import torch

from localmoe.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_LONGEST_HEADER = 100_000_000  # bytes; the library's own limit
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,512}")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `offset` and `nbytes` are bytes in `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """Tensors of one shard in file order, and the header's `__metadata__`.

    Raises CheckpointError, naming the file and the tensor, for anything that does not add up: a truncated
    file, overlapping or missing bytes, a shape that contradicts its size, a duplicate or unsafe name.
    """
    raw, size = _read_raw(path)
    return parse_header(path, raw, size)


def parse_header(path: Path, raw: bytes, size: int) -> tuple[list[TensorInfo], dict[str, str]]:
    """As `read_header`, of the header's JSON `raw` of a file with `size` bytes that need not be at `path` yet."""
    data_start = 8 + len(raw)
    header = _json_object(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path.name}: the header's __metadata__ is not a map of strings")
    tensors = [_tensor_info(path, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            raise CheckpointError(
                f"{path.name}: {tensor.name} does not start where the tensor before it ends; the file is damaged"
            )
        position += tensor.nbytes
    if position != size:
        raise CheckpointError(
            f"{path.name}: the file has {size} bytes and its header describes {position}; "
            "it is cut off or damaged: download it again"
        )
    return tensors, metadata


def header_length(path: Path, first: bytes, size: int) -> int:
    """Bytes of the header's JSON, from the first eight of a file of `size`. Raises CheckpointError."""
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or size < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise CheckpointError(f"{path.name}: not a safetensors file, or cut off in its header")
    return length


def _read_raw(path: Path) -> tuple[bytes, int]:
    """(the header's JSON, size of the file)."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return file.read(header_length(path, file.read(8), size)), size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _json_object(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: the safetensors header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: the safetensors header is not an object")
    return header


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:80]!r} stands there twice")
    return result


def _tensor_info(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    if not _NAME.fullmatch(name) or ".." in name:
        raise CheckpointError(f"{path.name}: {name[:80]!r} is not a tensor name that localmoe accepts")
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path.name}: the header's entry for {name} is not an object")
    dtype = DTYPES.get(str(entry.get("dtype")))
    if dtype is None:
        raise CheckpointError(f"{path.name}: {name} has the unknown dtype {str(entry.get('dtype'))[:20]!r}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path.name}: {name} has no valid shape and data_offsets in the header")
    begin, end = offsets
    if end - begin != prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{path.name}: {name} has {end - begin} bytes, but shape {shape} of {entry['dtype']} "
            f"needs {prod(shape) * dtype.itemsize}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def _sizes(value: object) -> TypeGuard[list[int]]:
    """A list of non-negative integers (and no booleans)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**48 for item in value)
