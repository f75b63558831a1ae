"""How far the files of a download are, together, and how one that fails stops the others."""

from __future__ import annotations

import threading

from localmoe.hub.cache import OnProgress, Progress


class StoppedError(Exception):
    """Another file's download failed, or the user pressed Ctrl-C."""


class Meter:
    """Adds up the bytes of all files, from all threads, and passes them on."""

    def __init__(self, total: int, report: OnProgress | None) -> None:
        self.total = total
        self.received = 0
        self.stop = threading.Event()
        self._done: dict[str, int] = {}
        self._report = report
        self._lock = threading.Lock()

    def advance(self, item: str, count: int) -> None:
        if self.stop.is_set():
            raise StoppedError
        with self._lock:
            self._done[item] = self._done.get(item, 0) + count
            if self._report is not None:
                self._report(Progress(sum(self._done.values()), self.total, item))

    def start_over(self, item: str) -> None:
        self.advance(item, -self._done.get(item, 0))

    def count_received(self, count: int) -> None:
        with self._lock:
            self.received += count
