"""SHA-256 of a file while it is being filled: its bytes are hashed as they come, not read once more at the end."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Container, Mapping

from localmoe.formats.shards import Shard

_BUFFER = 4 * 2**20  # bytes


class GrowingHash:
    """Of one shard, from its beginning as far as every tensor is written. Not for two threads at a time."""

    def __init__(self, shard: Shard, unit_of: Mapping[str, str]) -> None:
        """`unit_of` is the unit of each tensor, whose tensors are all there once it is finished."""
        self._size = shard.size
        places = sorted((offset, unit_of[name]) for name, (offset, _) in shard.places.items())
        self._places = places[::-1]  # the next one last
        self._digest = hashlib.sha256()
        self.hashed = 0
        """Bytes."""

    def advance(
        self, descriptor: int, finished: Container[str], progress: Callable[[int], None] = lambda count: None
    ) -> None:
        """Hash on to the first tensor whose unit is not finished. `progress` gets the bytes of each step."""
        while self._places and self._places[-1][1] in finished:
            self._places.pop()
        end = self._places[-1][0] if self._places else self._size
        buffer = bytearray(min(_BUFFER, end - self.hashed))
        while self.hashed < end:
            count = os.preadv(descriptor, [memoryview(buffer)[: end - self.hashed]], self.hashed)
            if count == 0:
                raise OSError("ends too early")
            self._digest.update(memoryview(buffer)[:count])
            self.hashed += count
            progress(count)

    def hexdigest(self) -> str:
        """Of the whole file, once `advance` came to its end."""
        if self.hashed != self._size:
            raise ValueError(f"{self.hashed} of {self._size} bytes are hashed")
        return self._digest.hexdigest()
