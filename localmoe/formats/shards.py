"""Planning safetensors shards: every tensor's place is known before the first byte is written.

The container is `safetensors.read_header`'s. Its data must have no holes, so tensors keep the alignment
that the kernels like (64 bytes, a cache line) by order: those whose size is a multiple of 64 come first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from localmoe.formats.safetensors import DTYPE_NAMES
from localmoe.formats.scheme import TensorSpec

ALIGNMENT = 64
SHARD_BYTES = 4_500_000_000


@dataclass(frozen=True)
class Unit:
    """Tensors that belong together (one module's values and scales): one shard, one entry in the journal."""

    name: str
    tensors: Mapping[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        return sum(spec_bytes(spec) for spec in self.tensors.values())


@dataclass(frozen=True)
class Shard:
    """One output file: its first bytes, and each tensor's (offset in the file, size), in bytes."""

    file: str
    header: bytes
    places: Mapping[str, tuple[int, int]]
    size: int


def spec_bytes(spec: TensorSpec) -> int:
    """Size of a tensor of this dtype and shape."""
    dtype, shape = spec
    return prod(shape) * dtype.itemsize


def plan_shards(units: Sequence[Unit], shard_bytes: int = SHARD_BYTES) -> tuple[Shard, ...]:
    """Lay out `units`, in their order, over as few files of about `shard_bytes` as that takes."""
    groups: list[list[Unit]] = [[]]
    filled = 0
    for unit in units:
        if groups[-1] and filled + unit.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(unit)
        filled += unit.nbytes
    if len(groups) == 1:
        return (_plan_shard("model.safetensors", groups[0]),)
    count = len(groups)
    return tuple(
        _plan_shard(f"model-{number:05}-of-{count:05}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    )


def index_json(shards: Sequence[Shard]) -> bytes:
    """`model.safetensors.index.json`."""
    weight_map = {name: shard.file for shard in shards for name in shard.places}
    total = sum(size for shard in shards for _, size in shard.places.values())
    value = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"


def _plan_shard(file: str, units: Iterable[Unit]) -> Shard:
    tensors = [(name, spec) for unit in units for name, spec in unit.tensors.items()]
    # A stable sort: within each half a module's values and scales stay neighbours.
    tensors.sort(key=lambda tensor: spec_bytes(tensor[1]) % ALIGNMENT != 0)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: list[tuple[str, int, int]] = []
    position = 0
    for name, spec in tensors:
        dtype, shape = spec
        size = spec_bytes(spec)
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        begins.append((name, position, size))
        position += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    places = {name: (len(header) + begin, size) for name, begin, size in begins}
    return Shard(file, header, places, len(header) + position)
