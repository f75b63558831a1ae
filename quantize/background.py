"""A thread of one's own beside a quantization, which stops when that is left."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self


class Background:
    """One thread for jobs in their order. Leaving, early or not, sets `_stopped`, drops the jobs that wait, and waits
    for the one that runs."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)
