"""One file on its way from the hub: appended to, hashed as it grows, kept when the connection is cut.

huggingface_hub (2.4) throws an unfinished file away, which on an 8 GB shard can cost hours; so the bytes
are kept here, and the next attempt, in this run or a later one, asks for the rest with a Range request.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from localmoe.errors import HubError, VerificationError
from localmoe.hub.cache import new_hash
from localmoe.hub.listing import Listing, RemoteFile

CHUNK = 1 << 19
RETRIES = 5
RETRY_SECONDS = 1.0


class PartialFile:
    """The unfinished copy of `remote` at `path`, locked against a second process.

    `advance` is told how many bytes were gained, or lost (negative) when the file has to start over.
    """

    def __init__(self, path: Path, remote: RemoteFile, advance: Callable[[int], None]) -> None:
        self.path = path
        self.remote = remote
        self.size = 0
        self._advance = advance
        self._hash = new_hash(remote.digest, remote.size)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            self._lock()
        except BaseException:
            self._file.close()
            raise
        self._take_up()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A process that finished between our open and our lock has moved the file to where it belongs.
            ours = os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise HubError(f"another process is downloading {self.remote.name}: wait for it, then run this again")

    def _take_up(self) -> None:
        """Hash what an earlier run left."""
        self._file.seek(0)
        while chunk := self._file.read(1 << 22):
            self._hash.update(chunk)
            self.size += len(chunk)
        self._advance(self.size)
        if self.size > self.remote.size:
            self.restart()

    def check(self) -> None:
        """Between two attempts: raises if the download is to stop."""
        self._advance(0)

    def write(self, chunk: bytes) -> None:
        if self.size + len(chunk) > self.remote.size:
            raise VerificationError(f"the server sent more of {self.remote.name} than its {self.remote.size} bytes")
        self._file.write(chunk)
        self._file.flush()  # what has come must survive a kill
        self._hash.update(chunk)
        self.size += len(chunk)
        self._advance(len(chunk))

    def restart(self) -> None:
        """Forget every byte."""
        self._file.truncate(0)
        self._hash = new_hash(self.remote.digest, self.remote.size)
        self._advance(-self.size)
        self.size = 0

    def is_right(self) -> bool:
        """Whether all bytes are there and their hash is the one the repository lists."""
        return self.size == self.remote.size and self._hash.hexdigest() == self.remote.digest

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def fetch(listing: Listing, partial: PartialFile) -> None:
    """Bring `partial` to its full size, going on where it stands.

    A connection that breaks is taken up again; RETRIES attempts in a row without one new byte end it.
    Raises what huggingface_hub raises.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    remote = partial.remote
    url = hf_hub_url(listing.repo, remote.name, revision=listing.commit)
    idle = 0
    while partial.size < remote.size:
        partial.check()
        start = partial.size
        headers = build_hf_headers(library_name="localmoe", headers={"Accept-Encoding": "identity"})
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            with http_stream_backoff(
                "GET",
                url,
                headers=headers,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                max_retries=RETRIES,
                base_wait_time=RETRY_SECONDS,
                retry_on_exceptions=(),
            ) as response:
                hf_raise_for_status(response)
                if start and response.status_code != 206:  # a server without Range sends the whole file
                    partial.restart()
                for chunk in response.iter_bytes(chunk_size=CHUNK):
                    partial.write(chunk)
        except HfHubHTTPError:
            raise
        except HTTPError:
            if idle == RETRIES:
                raise
        idle = 0 if partial.size > start else idle + 1
        if idle > RETRIES:
            raise HubError(f"the server ends {remote.name} at byte {partial.size} of {remote.size}: run it again")
        if partial.size < remote.size:
            time.sleep(RETRY_SECONDS)
