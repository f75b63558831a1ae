import hashlib
import os
import random
from pathlib import Path

import pytest
import torch

from localmoe.formats.growing_hash import GrowingHash
from localmoe.formats.shards import Shard, Unit, plan_shards


def shard_of(count: int) -> tuple[Shard, dict[str, str]]:
    """Units of two tensors, the second of which lies at the end of the file."""
    units = [
        Unit(f"u{index}", {f"u{index}.a": (torch.int32, (16, 5 + index)), f"u{index}.b": (torch.int64, (2,))})
        for index in range(count)
    ]
    (shard,) = plan_shards(units)
    return shard, {name: unit.name for unit in units for name in unit.tensors}


@pytest.mark.parametrize("seed", range(4))
def test_a_file_filled_in_any_order_has_its_hash(tmp_path: Path, seed: int) -> None:
    shard, unit_of = shard_of(6)
    dice = random.Random(seed)
    data = bytearray(shard.header + dice.randbytes(shard.size - len(shard.header)))
    path = tmp_path / "shard"
    path.write_bytes(shard.header + bytes(shard.size - len(shard.header)))  # not filled yet
    growing, finished, seen = GrowingHash(shard, unit_of), set[str](), list[int]()
    descriptor = os.open(path, os.O_RDWR)
    try:
        for unit in dice.sample(sorted(set(unit_of.values())), 6):
            for name, (offset, size) in shard.places.items():
                if unit_of[name] == unit:
                    os.pwrite(descriptor, data[offset : offset + size], offset)
            finished.add(unit)
            growing.advance(descriptor, finished, seen.append)
            missing = [offset for name, (offset, _) in shard.places.items() if unit_of[name] not in finished]
            assert growing.hashed == sum(seen) == min(missing, default=shard.size)
    finally:
        os.close(descriptor)
    assert growing.hexdigest() == hashlib.sha256(data).hexdigest()


def test_what_is_not_there_has_no_hash(tmp_path: Path) -> None:
    shard, unit_of = shard_of(2)
    path = tmp_path / "shard"
    path.write_bytes(shard.header)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        growing = GrowingHash(shard, unit_of)
        growing.advance(descriptor, ())
        assert growing.hashed == len(shard.header)
        with pytest.raises(ValueError, match="bytes are hashed"):
            growing.hexdigest()
        with pytest.raises(OSError, match="ends too early"):
            growing.advance(descriptor, {"u0"})
    finally:
        os.close(descriptor)
