"""A checkpoint on the hub whose shards are fetched one at a time and dropped again: no disk need hold them all.

The shards lie in a directory of the caller's, not in the hub's cache, so that dropping one can never delete what the
user has pulled; a shard that the cache does hold is used where it is, and stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from localmoe.errors import CheckpointError, HubError, VerificationError
from localmoe.formats.checkpoint import read_json
from localmoe.formats.safetensors import TensorInfo, header_length, parse_header
from localmoe.hub import cache, partial
from localmoe.hub.download import WithoutWeights, quiet_hub
from localmoe.hub.listing import RemoteFile, hub_errors

_HEADER_GUESS = 1 << 20  # bytes asked for at once: most headers fit


class RemoteShards:
    """The shards of `found`, which come to `scratch`. `advance` is told of every byte that comes, and its file."""

    def __init__(
        self,
        found: WithoutWeights,
        scratch: Path,
        advance: Callable[[int, str], None] = lambda count, file: None,
    ) -> None:
        self.found = found
        self.scratch = scratch
        self._advance = advance
        self._files = {file.name: file for file in found.weights}

    def path(self, name: str) -> Path:
        """Where a shard is, or will be once it is fetched."""
        held = self._held(self._files[name])
        return self.scratch / name if held is None else held

    def size(self, name: str) -> int:
        """Bytes that a shard takes on disk while it is here: nothing where the cache has it."""
        return 0 if self._held(self._files[name]) is not None else self._files[name].size

    def sha256(self, name: str) -> str | None:
        """What the repository lists, and `fetch` has checked; None for a file outside LFS."""
        digest = self._files[name].digest
        return digest if len(digest) == 64 else None

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor that the index names, from the shards' headers alone. Raises HubError, CheckpointError."""
        found: dict[tuple[str, str], TensorInfo] = {}
        for file in self._files.values():
            first = self.read(file.name, 0, min(_HEADER_GUESS, file.size))
            end = 8 + header_length(self.scratch / file.name, first, file.size)
            raw = first[8:end] if end <= len(first) else first[8:] + self.read(file.name, len(first), end)
            for info in parse_header(self.path(file.name), raw, file.size)[0]:
                found[file.name, info.name] = info
        index = self.found.snapshot / cache.INDEX
        if not index.is_file():
            return {name: info for (_, name), info in found.items()}
        tensors = {}
        for name, file_name in read_json(index)["weight_map"].items():  # pull has checked that it names our shards
            if (file_name, name) not in found:
                raise CheckpointError(f"{cache.INDEX}: {name} should be in {file_name}, which does not hold it")
            tensors[name] = found[file_name, name]
        return tensors

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a shard: from the disk where it is there, else from the hub. Raises HubError."""
        path = self.path(name)  # a shard that is here whole
        if path.is_file():
            with path.open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        return b"".join(self._ranges(self._files[name], start, stop))

    def fetch(self, name: str, stopped: Callable[[], bool] = lambda: False) -> Path:
        """Have a shard here, whole and with the listed hash; goes on where an earlier run's part ends.

        Raises HubError, StorageError, VerificationError; InterruptedError once `stopped` says so.
        """
        path = self.path(name)
        if path.is_file():  # it got its name after its hash was right
            return path
        file = self._files[name]

        def advance(count: int) -> None:
            if stopped():
                raise _StoppedError
            self._advance(count, name)

        try:
            with quiet_hub(), hub_errors(self.found.listing.repo, self.found.listing.revision, f"while pulling {name}"):
                self._download(file, path, advance)
        except _StoppedError:
            raise InterruptedError(f"{name}: stopped") from None
        return path

    def drop(self, name: str) -> None:
        """Delete a shard that was fetched; the cache's own stay."""
        (self.scratch / name).unlink(missing_ok=True)

    def clean(self) -> None:
        """Delete what is left, and the directory."""
        for name in self._files:
            self.drop(name)
            self._partial(name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or something else is in it
            self.scratch.rmdir()

    def _download(self, file: RemoteFile, path: Path, advance: Callable[[int], None]) -> None:
        with partial.PartialFile(self._partial(file.name), file, advance) as part:
            resumed = part.size > 0
            partial.fetch(self.found.listing, part)
            if not part.is_right() and resumed:  # what was here may have been damaged: once more, from zero
                part.restart()
                partial.fetch(self.found.listing, part)
            if not part.is_right():
                part.restart()
                raise VerificationError(
                    f"{file.name} of {self.found.listing.repo} does not have the hash the repository lists "
                    f"({file.digest[:12]}…): the server or the way to it changes bytes; try again later"
                )
            part.path.replace(path)

    def _partial(self, name: str) -> Path:
        return self.scratch / f"{name}.incomplete"

    def _held(self, file: RemoteFile) -> Path | None:
        """The hub cache's own copy, complete by its size (its hash was checked when it was pulled)."""
        path = self.found.snapshot / file.name
        return path if path.is_file() and path.stat().st_size == file.size else None

    def _ranges(self, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        listing = self.found.listing
        url = hf_hub_url(listing.repo, file.name, revision=listing.commit)
        wanted = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
        headers = build_hf_headers(library_name="localmoe", headers=wanted)
        with (
            quiet_hub(),
            hub_errors(listing.repo, listing.revision, f"while reading {file.name}"),
            http_stream_backoff(
                "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                max_retries=partial.RETRIES, base_wait_time=partial.RETRY_SECONDS,
            ) as response,
        ):  # fmt: skip
            hf_raise_for_status(response)
            at = start if response.status_code == 206 else 0  # a server without Range sends the whole file
            for chunk in response.iter_bytes(chunk_size=partial.CHUNK):
                yield chunk[max(start - at, 0) : max(stop - at, 0)]
                at += len(chunk)
                if at >= stop:
                    return
        raise HubError(f"{file.name} of {listing.repo} ended early: run the same command again")


class _StoppedError(Exception):
    """The caller wants no more."""
