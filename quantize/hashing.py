"""SHA-256 of the source's files, computed beside the quantization while the page cache still has them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from localmoe.errors import CheckpointError, StorageError
from localmoe.formats.manifest import FileRecord
from localmoe.hub.cache import is_digest
from quantize.background import Background

_BUFFER = 4 * 2**20


class _StoppedError(Exception):
    """The quantization ended early; nobody waits for the hash."""


class SourceHasher(Background):
    """Hashes each file once, in one background thread; `known` are hashes from before a kill, by file name.

    A known hash counts while the file's size and modification time are the recorded ones. `seen` is what `look_at`
    found of the files when their headers were read: a file that has become another by the end is an error.
    """

    def __init__(self, known: Mapping[str, Mapping[str, Any]], seen: Mapping[Path, tuple[int, int]]) -> None:
        super().__init__()
        self._known = known
        self._jobs: dict[Path, Future[FileRecord]] = {}
        self._stats = dict(seen)

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
            self._jobs[path] = self._pool.submit(self._hash, path)

    def facts(self) -> dict[str, dict[str, Any]]:
        """What is known of the files that were begun, for `known` of a later run: the hash of those that have one yet.

        Raises CheckpointError for a file whose bytes are not those that were pulled.
        """
        facts: dict[str, dict[str, Any]] = {}
        for path, job in self._jobs.items():
            size, mtime_ns = self._stats[path]
            facts[path.name] = {"bytes": size, "mtime_ns": mtime_ns}
            if job.done():
                facts[path.name]["sha256"] = job.result().sha256
        return facts

    def results(self) -> dict[str, FileRecord]:
        """Wait for all files. Raises CheckpointError when one was changed since it was first looked at."""
        records = {path.name: job.result() for path, job in self._jobs.items()}
        for path, before in self._stats.items():
            if _stat(path) != before:
                raise CheckpointError(f"{path}: was changed while it was being read; start again")
        return records

    def _hash(self, path: Path) -> FileRecord:
        record = sha256_of(path, self._check_stop)
        if content_address(path) not in (None, record.sha256):
            raise CheckpointError(f"{path}: its bytes are not those that were pulled; localmoe pull repairs it")
        return record

    def _check_stop(self, done_bytes: int) -> None:
        if self._stopped.is_set():
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


def content_address(path: Path) -> str | None:
    """The SHA-256 that a file of the hub's cache was pulled with, which is the name of what it links to."""
    target = path.readlink() if path.is_symlink() else path
    addressed = target is not path and target.parent.name == "blobs" and len(target.name) == 64
    return target.name if addressed and is_digest(target.name) else None


def stamp(
    paths: Iterable[Path], listed: Mapping[str, tuple[int, str]] | None = None
) -> list[tuple[str, int, int | str]]:
    """(name, size, SHA-256 by the hub's cache or else modification time in ns) of files: what changes when a file does,
    without reading it. `listed` are sizes and hashes, by name, of files that are still to come into that cache."""
    listed = listed or {}
    found: list[tuple[str, int, int | str]] = []
    for path in sorted(paths):
        if path.name in listed:
            found.append((path.name, *listed[path.name]))
        else:
            size, mtime_ns = _stat(path)
            found.append((path.name, size, content_address(path) or mtime_ns))
    return found


def unchanged(facts: Mapping[str, Mapping[str, Any]], paths: Iterable[Path]) -> bool:
    """Whether what an earlier run read of `paths`, by its `facts`, is what is there: a file that has not been touched
    since, or one that was found to be as it was pulled."""
    for path in paths:
        fact = facts.get(path.name)
        if fact is None or fact.get("sha256", "") == content_address(path):
            continue
        if not path.is_file() or (fact.get("bytes"), fact.get("mtime_ns")) != _stat(path):
            return False
    return True


def _stat(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return status.st_size, status.st_mtime_ns
