"""What is already done of a long write, on disk: JSON lines, appended and synced, read back after a kill.

A line counts once its newline is there; a torn last line (a kill, a power cut) is dropped. The file is
locked while it is open, so two processes never write one directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from localmoe.errors import StorageError

JOURNAL_NAME = "localmoe.journal"

Entry = Mapping[str, Any]


@contextlib.contextmanager
def storage_errors(path: Path, bytes_needed: int | None = None) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the place and, for a full disk, how much is needed."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full and bytes_needed is not None:
            message = f"{path}: {error.strerror}; {bytes_needed:,} bytes are needed there: free some, or use -o"
        elif full:
            message = f"{path}: {error.strerror}; free some space and start again: it goes on where it was"
        else:
            message = f"{path}: cannot be written ({error.strerror or error})"
        raise StorageError(message) from error


def sync_directory(directory: Path) -> None:
    """Make renames and new names in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Journal:
    """An open, locked journal. `entries` is what earlier runs left."""

    def __init__(self, path: Path, descriptor: int, entries: list[dict[str, Any]]) -> None:
        self.path = path
        self.entries = entries
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open or create, lock, and cut off a torn last line.

        Raises StorageError when the file cannot be written, or another process holds it.
        """
        with storage_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            with storage_errors(path):
                _lock(path, descriptor)
                entries, valid = _parse(path.read_bytes())
                os.ftruncate(descriptor, valid)
                os.lseek(descriptor, 0, os.SEEK_END)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, entries)

    def append(self, entries: Sequence[Entry]) -> None:
        """Add entries and wait until they are on disk."""
        data = b"".join(json.dumps(entry, sort_keys=True).encode() + b"\n" for entry in entries)
        with storage_errors(self.path):
            while data:
                data = data[os.write(self._descriptor, data) :]
            os.fsync(self._descriptor)

    def restart(self) -> None:
        """Forget everything."""
        with storage_errors(self.path):
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
        self.entries = []

    def remove(self) -> None:
        """Delete the file: the write it was for is over."""
        with storage_errors(self.path):
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _lock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StorageError(f"{path.parent}: another localmoe is writing this directory; wait for it") from error
    if os.fstat(descriptor).st_nlink == 0:  # that other one ended, and removed the file, after our open
        raise StorageError(f"{path.parent}: another localmoe has just finished this directory; try again")


def _parse(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """(entries up to the first line that is torn or not ours, their length in bytes)."""
    entries: list[dict[str, Any]] = []
    position = 0
    while (end := data.find(b"\n", position)) >= 0:
        try:
            entry = json.loads(data[position:end])
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
        position = end + 1
    return entries, position
