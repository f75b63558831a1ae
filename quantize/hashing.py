"""SHA-256 of the source's files, computed beside the quantization while the page cache still has them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from localmoe.errors import CheckpointError, StorageError
from localmoe.formats.manifest import FileRecord

_BUFFER = 4 * 2**20


class _StoppedError(Exception):
    """The quantization ended early; nobody waits for the hash."""


class SourceHasher:
    """Hashes each file once, in one background thread; `known` are hashes from before a kill, by file name.

    A known hash counts while the file's size and modification time are the recorded ones. `seen` is what `look_at`
    found of the files when their headers were read: a file that has become another by the end is an error.
    """

    def __init__(self, known: Mapping[str, Mapping[str, Any]], seen: Mapping[Path, tuple[int, int]]) -> None:
        self._known = known
        self._jobs: dict[Path, Future[FileRecord]] = {}
        self._stats = dict(seen)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def start(self, path: Path) -> None:
        """Begin to hash `path`, unless it has been begun or is known."""
        if path in self._jobs:
            return
        size, mtime_ns = self._stats[path]
        known = self._known.get(path.name, {})
        digest = known.get("sha256")
        if (known.get("bytes"), known.get("mtime_ns")) == (size, mtime_ns) and isinstance(digest, str):
            future: Future[FileRecord] = Future()
            future.set_result(FileRecord(digest, size))
            self._jobs[path] = future
        else:
            self._jobs[path] = self._pool.submit(sha256_of, path, self._check_stop)

    def finished(self) -> dict[str, dict[str, Any]]:
        """Facts about the files that are hashed by now, for `known` of a later run."""
        return {
            path.name: {"sha256": job.result().sha256, "bytes": job.result().bytes, "mtime_ns": self._stats[path][1]}
            for path, job in self._jobs.items()
            if job.done()
        }

    def results(self) -> dict[str, FileRecord]:
        """Wait for all files. Raises CheckpointError when one was changed since it was first looked at."""
        records = {path.name: job.result() for path, job in self._jobs.items()}
        for path, before in self._stats.items():
            if _stat(path) != before:
                raise CheckpointError(f"{path}: was changed while it was being read; start again")
        return records

    def _check_stop(self, done_bytes: int) -> None:
        if self._stop.is_set():
            raise _StoppedError


def sha256_of(path: Path, progress: Callable[[int], None] = lambda done_bytes: None) -> FileRecord:
    """Hash a file through a small buffer; `progress` gets the bytes of each step. Raises StorageError."""
    digest = hashlib.sha256()
    buffer = bytearray(_BUFFER)
    size = 0
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                size += count
                progress(count)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    return FileRecord(digest.hexdigest(), size)


def look_at(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """(size, modification time in ns) of files. Raises CheckpointError."""
    return {path: _stat(path) for path in paths}


def stamp(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """(name, size, modification time in ns) of files: what changes when a file does, without reading it."""
    return [(path.name, *_stat(path)) for path in sorted(paths)]


def _stat(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return status.st_size, status.st_mtime_ns
