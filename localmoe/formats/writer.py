"""Writing a model directory so that a kill, a full disk or a power cut costs minutes and never leaves half a model.

Shards are laid out beforehand, allocated in full as `NAME.partial`, and filled tensor by tensor in any order.
A journal (journal.py) lists the tensors that are on disk; a second run with the same fingerprint goes on after
them. A thread beside the work waits for the disk, and hashes what is there. At the end the shards get their names, then
config and index, and the manifest comes last.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from localmoe.errors import CheckpointError, StorageError, UsageError, VerificationError
from localmoe.formats.growing_hash import GrowingHash
from localmoe.formats.journal import JOURNAL_NAME, Journal, storage_errors, sync_directory
from localmoe.formats.manifest import MANIFEST_NAME, FileRecord, Manifest, Settings
from localmoe.formats.safetensors import TensorInfo, read_header
from localmoe.formats.shards import Shard, Unit, index_json, plan_shards

INDEX_NAME = "model.safetensors.index.json"
PARTIAL = ".partial"

_SYNC_BYTES = 128 * 2**20  # written data may be redone after a kill up to this much
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.partial)?")
Facts = Mapping[str, Mapping[str, Any]]
_ALLOCATION_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class CheckpointWriter:
    """An output directory that is being filled. `records` holds what `finish` recorded, of earlier runs too."""

    def __init__(self, directory: Path, units: Sequence[Unit], journal: Journal, created: bool) -> None:
        shards = plan_shards(units)
        self.directory = directory
        self.records: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self._shards = shards
        self._unit_bytes = {unit.name: unit.nbytes for unit in units}
        self._journal = journal
        self._created = created  # the directory is ours alone, so giving up may remove it
        self._places = {name: (shard, place) for shard in shards for name, place in shard.places.items()}
        self._descriptors: dict[str, int] = {}
        self._pending: list[dict[str, Any]] = []
        self._unsynced = 0
        self._syncing: Future[None] | None = None
        self._background = ThreadPoolExecutor(max_workers=1)
        unit_of = {name: unit.name for unit in units for name in unit.tensors}
        self._hashes = {shard.file: GrowingHash(shard, unit_of) for shard in shards}

    @classmethod
    def open(
        cls,
        directory: Path,
        settings: Settings,
        fingerprint: str,
        units: Sequence[Unit],
        unchanged: Callable[[Facts], bool] = lambda facts: True,
    ) -> CheckpointWriter:
        """Claim `directory` and make room for `units`, or take up what an earlier run left there.

        `fingerprint` stands for everything that decides the output's bytes: another one starts over, and so do `facts`
        of an earlier run that are not `unchanged`.
        Raises UsageError when the directory holds other settings' output or something that is not ours,
        StorageError when the disk has no room (naming the bytes needed) or cannot be written.
        """
        created = claim(directory, settings)
        journal = Journal.open(directory / JOURNAL_NAME)
        writer = cls(directory, units, journal, created)
        try:
            writer._check_owner(settings)
            writer._begin(settings, fingerprint, unchanged)
        except BaseException:
            journal.close()
            raise
        return writer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, CheckpointError) and not isinstance(error, VerificationError):
                self.discard()  # the source must change, which would start over anyway
            elif error is not None:
                with contextlib.suppress(StorageError):  # the first error is the one to tell
                    self.sync()
        finally:
            self.close()

    def write(self, name: str, data: Tensor, at: int = 0) -> None:
        """Put `data`'s bytes into tensor `name`, `at` bytes from its beginning. Any thread may. Raises StorageError."""
        shard, (offset, size) = self._places[name]
        raw = data.contiguous().reshape(-1).view(torch.uint8).numpy().data
        if at + len(raw) > size:
            raise ValueError(f"{name} has {size} bytes; {len(raw)} at {at} do not fit")
        self._put(self._descriptors[shard.file], raw, offset + at)

    def finish(self, unit: str, record: Mapping[str, Any]) -> None:
        """All of `unit`'s tensors are written; `record` comes back in `records` after a resume."""
        self.records[unit] = dict(record)
        self._pending.append({"unit": unit, "record": self.records[unit]})
        self._unsynced += self._unit_bytes[unit]
        if self._unsynced >= _SYNC_BYTES:
            self._wait_for_disk()
            self._syncing = self._background.submit(self._sync, self._taken())

    def remember(self, key: str, fact: Mapping[str, Any]) -> None:
        """Keep a fact about the source, such as a file's hash, over a kill: see `facts`."""
        self.facts[key] = dict(fact)
        self._pending.append({"fact": key, "value": self.facts[key]})

    def sync(self) -> None:
        """Have all that was written on the disk, and wait for it."""
        self._wait_for_disk()
        self._to_disk(self._taken())

    def tensors(self) -> dict[str, TensorInfo]:
        """What is being written, as it lies in the files now."""
        paths = [self._partial(shard) for shard in self._shards]
        found = [
            path if path.exists() else self.directory / shard.file
            for path, shard in zip(paths, self._shards, strict=True)
        ]
        return {info.name: info for path in found for info in read_header(path)[0]}

    def commit(
        self,
        small_files: Mapping[str, bytes],
        manifest: Callable[[Mapping[str, FileRecord]], Manifest],
        progress: Callable[[int, str], None] = lambda done_bytes, file: None,
    ) -> Manifest:
        """Give every file its name, the manifest last. `manifest` gets all files' hashes; `progress` the bytes read.

        Raises StorageError; a kill at any point is resumed by the next run.
        """
        self.sync()
        files = {INDEX_NAME: index_json(self._shards), **small_files}
        records = {name: FileRecord(hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()}
        records |= self._hash_shards(progress)
        result = manifest(records)
        self._journal.append([{"committing": True}])
        with storage_errors(self.directory):
            (self.directory / MANIFEST_NAME).unlink(missing_ok=True)  # an older output of the same settings
            sync_directory(self.directory)
            for shard in self._shards:
                partial = self._partial(shard)
                if partial.exists():
                    partial.rename(self.directory / shard.file)
            for stale in self._strays({shard.file for shard in self._shards}):
                stale.unlink()
            for name, data in files.items():
                self._replace(name, data)
            sync_directory(self.directory)
            self._replace(MANIFEST_NAME, result.to_bytes())
            self._journal.remove()
            sync_directory(self.directory)
        return result

    def discard(self) -> None:
        """Give up: delete what this plan has written, and the directory if there was none before."""
        with storage_errors(self.directory):
            for stray in self._strays(set()):
                if stray.name.endswith(PARTIAL):
                    stray.unlink()
            self._journal.remove()
            if self._created and not any(self.directory.iterdir()):
                self.directory.rmdir()

    def close(self) -> None:
        """Close the files and release the directory."""
        self._background.shutdown()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._journal.close()

    def _taken(self) -> list[dict[str, Any]]:
        """The journal's next entries, whose data has been written."""
        taken, self._pending, self._unsynced = self._pending, [], 0
        return taken

    def _wait_for_disk(self) -> None:
        """Until nothing goes on in the background. Raises what went wrong there."""
        syncing, self._syncing = self._syncing, None
        if syncing is not None:
            syncing.result()

    def _sync(self, entries: list[dict[str, Any]]) -> None:
        self._to_disk(entries)
        with storage_errors(self.directory):
            for file, growing in self._hashes.items():
                growing.advance(self._descriptors[file], self.records)

    def _to_disk(self, entries: list[dict[str, Any]]) -> None:
        """Data first, then the journal's word for it."""
        with storage_errors(self.directory):
            for descriptor in self._descriptors.values():
                os.fdatasync(descriptor)
        if entries:
            self._journal.append(entries)

    def _check_owner(self, settings: Settings) -> None:
        """The journal's head is read under its lock, so this is the word that counts."""
        head = self._journal.entries[0] if self._journal.entries else None
        if head is not None and head.get("settings") != str(settings):
            raise UsageError(
                f"{self.directory}: holds an unfinished quantization ({str(head.get('settings'))[:80]}), not "
                f"{settings}; give it the same options, delete it, or write elsewhere with -o"
            )

    def _begin(self, settings: Settings, fingerprint: str, unchanged: Callable[[Facts], bool]) -> None:
        entries = self._journal.entries
        facts = {
            entry["fact"]: entry["value"]
            for entry in entries[1:]
            if isinstance(entry.get("fact"), str) and isinstance(entry.get("value"), dict)
        }
        resumable = bool(entries) and entries[0].get("fingerprint") == fingerprint and unchanged(facts)
        committing = any("committing" in entry for entry in entries)
        if not (resumable and all(self._is_there(shard, committing) for shard in self._shards)):
            self._start_over(settings, fingerprint)
            return
        self.facts = facts
        for entry in entries[1:]:
            if entry.get("unit") in self._unit_bytes and isinstance(entry.get("record"), dict):
                self.records[entry["unit"]] = entry["record"]
        with storage_errors(self.directory):
            for shard in self._shards:
                path = self._partial(shard) if self._partial(shard).exists() else self.directory / shard.file
                self._descriptors[shard.file] = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)

    def _is_there(self, shard: Shard, committing: bool) -> bool:
        partial = self._partial(shard)
        path = self.directory / shard.file if committing and not partial.exists() else partial
        return path.is_file() and not path.is_symlink() and path.stat().st_size == shard.size

    def _start_over(self, settings: Settings, fingerprint: str) -> None:
        needed = sum(shard.size for shard in self._shards)
        try:
            with storage_errors(self.directory, needed):
                for stray in self._strays(set()):
                    if stray.name.endswith(PARTIAL):
                        stray.unlink()
                self._journal.restart()
                if shutil.disk_usage(self.directory).free < needed:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                for shard in self._shards:
                    self._allocate(shard)
                sync_directory(self.directory)
            # Last: a head in the journal promises that every partial file is there, whole.
            self._journal.append([{"settings": str(settings), "fingerprint": fingerprint}])
        except BaseException:
            self.discard()
            self.close()
            raise

    def _allocate(self, shard: Shard) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._partial(shard), flags, 0o644)
        self._descriptors[shard.file] = descriptor
        os.fchmod(descriptor, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, shard.size)  # a full disk shows now, not in an hour
        except OSError as error:
            if error.errno not in _ALLOCATION_UNSUPPORTED:
                raise
            os.ftruncate(descriptor, shard.size)
        self._put(descriptor, memoryview(shard.header), 0)

    def _put(self, descriptor: int, raw: memoryview, offset: int) -> None:
        with storage_errors(self.directory):
            while raw:
                count = os.pwrite(descriptor, raw, offset)
                raw, offset = raw[count:], offset + count

    def _hash_shards(self, progress: Callable[[int, str], None]) -> dict[str, FileRecord]:
        """SHA-256 of every shard as it is on disk, two files at a time; the beginnings have been hashed by now."""
        with ThreadPoolExecutor(max_workers=2) as pool:
            jobs = [pool.submit(self._hash, shard, progress) for shard in self._shards]
            return {shard.file: job.result() for shard, job in zip(self._shards, jobs, strict=True)}

    def _hash(self, shard: Shard, progress: Callable[[int, str], None]) -> FileRecord:
        growing = self._hashes[shard.file]
        progress(growing.hashed, shard.file)
        with storage_errors(self.directory):
            growing.advance(self._descriptors[shard.file], self._unit_bytes, lambda count: progress(count, shard.file))
        return FileRecord(growing.hexdigest(), shard.size)

    def _strays(self, keep: set[str]) -> list[Path]:
        """Shards and partial shards in the directory whose names are not in `keep`."""
        found = sorted(path for path in self.directory.iterdir() if _OURS.fullmatch(path.name))
        return [path for path in found if path.name not in keep]

    def _partial(self, shard: Shard) -> Path:
        return self.directory / (shard.file + PARTIAL)

    def _replace(self, name: str, data: bytes) -> None:
        """Write a small file whole or not at all."""
        temporary = self.directory / f".{name}.new"
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        try:
            os.fchmod(descriptor, 0o644)
            self._put(descriptor, memoryview(data), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.rename(self.directory / name)


def claim(directory: Path, settings: Settings) -> bool:
    """Make sure that writing to `directory` destroys nothing; True when it was created just now.

    Raises UsageError when it holds another settings' output or anything that localmoe did not write,
    CheckpointError for a damaged manifest, StorageError when it cannot be made.
    """
    with storage_errors(directory):
        if directory.exists() and not directory.is_dir():
            raise UsageError(f"{directory}: is a file; name a directory to write to")
        if not directory.exists():
            directory.mkdir(parents=True)
            return True
        names = {path.name for path in directory.iterdir()}
    if MANIFEST_NAME in names:
        found = Manifest.read(directory).settings
        if found != settings:
            raise UsageError(
                f"{directory}: holds another output ({found}), not {settings}; delete it or write elsewhere with -o"
            )
    elif names and JOURNAL_NAME not in names:
        raise UsageError(f"{directory}: is not empty and localmoe did not write it; write elsewhere with -o")
    return False
