"""How far a quantization is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["quantize", "measure", "hash"]


@dataclass(frozen=True)
class Progress:
    """Bytes done of the total, and the tensor or file at hand. `quantize` counts bytes of the source; `measure` those
    of both models, which are run on the held-out text; `hash` those of the files whose SHA-256 is taken, at the end."""

    stage: Stage
    done_bytes: int
    total_bytes: int
    item: str


OnProgress = Callable[[Progress], None]


class Meter:
    """Adds up bytes, from any thread, and tells one caller at a time."""

    def __init__(self, callback: OnProgress | None) -> None:
        self._callback = callback
        self._lock = threading.Lock()
        self._stage: Stage = "quantize"
        self._done = self._total = 0

    def restart(self, stage: Stage, total_bytes: int) -> None:
        """Begin a stage."""
        self._stage, self._done, self._total = stage, 0, total_bytes

    def add(self, count: int, item: str) -> None:
        """`count` more bytes are done, of `item`."""
        with self._lock:
            self._done += count
            if self._callback is not None:
                self._callback(Progress(self._stage, self._done, self._total, item))
