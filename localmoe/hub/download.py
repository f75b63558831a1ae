"""`pull`: bring a checkpoint into the hub's cache, every byte of it checked.

    ask the hub once -> small files, config first -> what can be refused is refused -> the weights, four at a time

A file that is here is hashed, and fetched again only if its hash is wrong. A file that is cut off is kept, and
goes on from its last byte (partial.py). Plain HTTP throughout: hf_xet is not needed, and what it downloads
cannot be taken up again by a later run.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmoe.errors import (
    HubError,
    ModelNotFoundError,
    StorageError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
)
from localmoe.hub import cache, partial
from localmoe.hub.cache import OnProgress
from localmoe.hub.listing import Listing, RemoteFile, ask_hub, check_revision, hub_errors
from localmoe.hub.meter import Meter, StoppedError
from localmoe.hub.names import ModelRef, printable, refuse_unsupported, repo_of
from localmoe.hub.reports import PulledFile, PullReport, State, Survey
from localmoe.hub.verify import demo_directory, verify_source
from localmoe.text import tiktoken
from localmoe.text.tokenizer import FILE as TOKENIZER

WORKERS = 4
CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

OnArrival = Callable[[str], None]


def pull(ref: ModelRef, *, revision: str | None = None, progress: OnProgress | None = None) -> PullReport:
    """Download `ref`'s source, or check it if it is here, and repair what is damaged.

    With HF_HUB_OFFLINE set, and for the demo, it only checks. Raises UsageError, UnsupportedModelError, HubError,
    StorageError, and VerificationError for a file whose bytes are not those the repository lists.
    """
    if ref.directory is not None:
        raise UsageError(f"{ref.directory} is a directory; pull takes a name or a repository id")
    if ref.ending not in (None, "source"):
        raise UsageError(f"pull brings sources, not recipes: type `localmoe pull {ref.name}`, then quantize it")
    if revision is not None:
        check_revision(revision)
    refuse_unsupported(ref.name)
    repo = repo_of(ref.name)
    if repo is None:
        return _check_only(ref.name, None, demo_directory(), progress)
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        path = cache.find_snapshot(repo, revision)
        if path is None:
            raise HubError(f"HF_HUB_OFFLINE is set and {repo} is not complete here: unset it to download")
        return _check_only(ref.name, repo, path, progress)
    with quiet_hub():
        listing = ask_hub(repo, revision or constants.DEFAULT_REVISION)
        return _Pull(ref.name, listing, progress).run()


def pull_config(ref: ModelRef) -> Path:
    """The config.json of `ref`'s source, from the package, the cache, or else the hub: that one file, its hash checked.

    Raises ModelNotFoundError, UnsupportedModelError, HubError, StorageError, VerificationError.
    """
    refuse_unsupported(ref.name)
    repo = repo_of(ref.name)
    if repo is None:
        if ref.name != "demo":
            raise ModelNotFoundError(f"{ref.name} is not on this machine, and it is not a repository of the hub")
        return demo_directory() / CONFIG
    held = cache.find_config(repo)
    if held is not None:
        return held
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise HubError(f"HF_HUB_OFFLINE is set and the {CONFIG} of {repo} is not here: unset it to fetch that")
    with quiet_hub():
        return _Pull(ref.name, ask_hub(repo, constants.DEFAULT_REVISION), None).config()


def survey(ref: ModelRef) -> Survey:
    """Ask the hub what a pull of `ref` would bring; config.json and the index are fetched, no weights.

    Raises as `pull` does before its weights: UnsupportedModelError, HubError, StorageError, VerificationError.
    """
    refuse_unsupported(ref.name)
    repo = repo_of(ref.name)
    if repo is None:
        raise ModelNotFoundError(f"{ref.name} is not a repository of the hub")
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise HubError(f"HF_HUB_OFFLINE is set and {repo} is not complete here: unset it to download")
    with quiet_hub():
        return _Pull(ref.name, ask_hub(repo, constants.DEFAULT_REVISION), None).survey()


@dataclass(frozen=True)
class WithoutWeights:
    """A repository whose small files are in the cache's `snapshot`; `weights` are the shards that it has on the hub."""

    name: str
    listing: Listing
    snapshot: Path
    weights: tuple[RemoteFile, ...]


def pull_without_weights(ref: ModelRef, *, revision: str | None = None) -> WithoutWeights:
    """Bring all but the weights of `ref`'s source into the cache. Raises as `pull` does."""
    if revision is not None:
        check_revision(revision)
    refuse_unsupported(ref.name)
    repo = repo_of(ref.name)
    if ref.directory is not None or repo is None:
        raise UsageError(f"{ref.name} is not on the hub: only what is pulled can be discarded shard by shard")
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise HubError(f"HF_HUB_OFFLINE is set: unset it to pull {repo}")
    with quiet_hub():
        listing = ask_hub(repo, revision or constants.DEFAULT_REVISION)
        return _Pull(ref.name, listing, None).without_weights()


def pull_weights(
    found: WithoutWeights,
    *,
    first: Collection[str] = (),
    progress: OnProgress | None = None,
    arrived: OnArrival = lambda name: None,
) -> PullReport:
    """Bring the rest of what `pull_without_weights` found: the shards in `first`, then the others by name. `arrived` is
    told, in any thread, each shard that is here and right. Raises as `pull` does, and what `progress` raises."""
    with quiet_hub():
        return _Pull(found.name, found.listing, progress).run(first, arrived)


def _check_only(name: str, repo: str | None, path: Path, progress: OnProgress | None) -> PullReport:
    report = verify_source(path, progress=progress)
    report.raise_if_bad()
    files = tuple(
        PulledFile(file.name, file.stat().st_size, "present") for file in sorted(path.iterdir()) if file.is_file()
    )
    return PullReport(name, repo, path.name if repo else None, path, files, 0)


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep huggingface_hub's own words off the terminal: it repeats signed addresses and the server's text."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Pull:
    """One pull of one repository at one commit."""

    def __init__(self, name: str, listing: Listing, report: OnProgress | None) -> None:
        self._name = name
        self._listing = listing
        self._directory = cache.repo_directory(listing.repo)
        self._snapshot = self._directory / "snapshots" / listing.commit
        self._meter = Meter(sum(file.size for file in listing.files), report)

    def run(self, first: Collection[str] = (), arrived: OnArrival = lambda name: None) -> PullReport:
        small = [file for file in self._listing.files if not file.is_weights]
        with hub_errors(self._listing.repo, self._listing.revision, f"while writing to {self._directory}"):
            self._snapshot.mkdir(parents=True, exist_ok=True)
        done = [self._ensure(file) for file in small]
        self._check_supported()
        weights = sorted(self._weights(), key=lambda file: file.name not in first)
        self._meter.total = sum(file.size for file in (*small, *weights))
        self._check_space(weights)
        done += self._ensure_all(weights, arrived)
        self._finish()
        received = self._meter.received
        repo, commit = self._listing.repo, self._listing.commit
        return PullReport(self._name, repo, commit, self._snapshot, tuple(done), received)

    def without_weights(self) -> WithoutWeights:
        """Fetch what is not weights, and refuse what cannot be run."""
        with hub_errors(self._listing.repo, self._listing.revision, f"while writing to {self._directory}"):
            self._snapshot.mkdir(parents=True, exist_ok=True)
        for file in self._listing.files:
            if not file.is_weights:
                self._ensure(file)
        self._check_supported()
        return WithoutWeights(self._name, self._listing, self._snapshot, tuple(self._weights()))

    def config(self, *others: str) -> Path:
        """Fetch config.json and the `others`, if they are listed: the snapshot stays incomplete until a pull."""
        with hub_errors(self._listing.repo, self._listing.revision, f"while writing to {self._directory}"):
            self._snapshot.mkdir(parents=True, exist_ok=True)
        for file in self._listing.files:
            if file.name in (CONFIG, *others):
                self._ensure(file)
        return self._snapshot / CONFIG

    def survey(self) -> Survey:
        """What `run` would do, after `config`."""
        config = self.config(cache.INDEX, *(() if self._has(TOKENIZER) else (TOKENIZER_CONFIG,)))
        self._check_supported()
        weights = self._weights()
        files = [*(file for file in self._listing.files if not file.is_weights), *weights]
        return Survey(
            repo=self._listing.repo,
            config=config,
            directory=cache.root(),
            size_bytes=sum(file.size for file in files),
            missing_bytes=self._missing(files),
            begun=self._missing(weights) < sum(file.size for file in weights),
        )

    def _check_supported(self) -> None:
        """Refuse an architecture or a tokenizer we do not run before the weights are fetched, by
        UnsupportedModelError."""
        from localmoe.model.config import ModelConfig

        ModelConfig.from_dict(self._read_object(CONFIG))
        if not self._has(TOKENIZER):  # then there is a tiktoken.model
            why = tiktoken.refusal(self._read_object(TOKENIZER_CONFIG) if self._has(TOKENIZER_CONFIG) else {})
            if why is not None:
                raise UnsupportedModelError(f"{self._listing.repo} has no {TOKENIZER}: {why}")

    def _has(self, name: str) -> bool:
        return any(file.name == name for file in self._listing.files)

    def _read_object(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads((self._snapshot / name).read_bytes())
        except (ValueError, RecursionError) as error:
            raise HubError(f"{name} of {self._listing.repo} is not JSON: {printable(error)}") from error
        if not isinstance(value, dict):
            raise HubError(f"{name} of {self._listing.repo} is not a JSON object")
        return value

    def _weights(self) -> list[RemoteFile]:
        """The shards that the index names, or the single file; other safetensors are other formats' copies."""
        listed = {file.name: file for file in self._listing.files if file.is_weights}
        index = self._snapshot / cache.INDEX
        wanted = cache.shards_of(index) if index.exists() else [cache.SINGLE]
        for name in wanted:
            if name not in listed:
                raise HubError(f"{self._listing.repo} is incomplete: it has no {printable(name)}")
        return [listed[name] for name in wanted]

    def _check_space(self, weights: Sequence[RemoteFile]) -> None:
        needed = self._missing(weights)
        free = shutil.disk_usage(self._directory).free
        if needed > free:
            raise StorageError(
                f"{self._name} needs {needed / 1e9:.1f} GB more at {cache.root()} and {free / 1e9:.1f} GB is free: "
                "free some space, or set HF_HOME to a bigger disk"
            )

    def _missing(self, files: Sequence[RemoteFile]) -> int:
        """Bytes of these that are not here."""
        missing = {file.digest: file for file in files if self._held(file) is None}  # equal files share one blob
        held = sum(path.stat().st_size for file in missing.values() if (path := self._partial(file)).exists())
        return sum(file.size for file in missing.values()) - held

    def _ensure_all(self, files: Sequence[RemoteFile], arrived: OnArrival) -> list[PulledFile]:
        # Files of the same content share one blob, so only one of them is a download of its own.
        single = {file.digest: file for file in files}
        first = [file for file in files if single[file.digest] is file]
        with ThreadPoolExecutor(WORKERS) as pool:
            futures = [pool.submit(self._ensure_or_stop, file, arrived) for file in first]
            try:
                for future in as_completed(futures):
                    error = future.exception()
                    if error is not None and not isinstance(error, StoppedError):
                        raise error
            except BaseException:  # Ctrl-C included: the threads must not go on behind the prompt
                self._meter.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        twins = [self._ensure_or_stop(file, arrived) for file in files if file not in first]
        return [future.result() for future in futures] + twins

    def _ensure_or_stop(self, file: RemoteFile, arrived: OnArrival) -> PulledFile:
        """In a thread: the first error ends the other downloads too, at their next chunk."""
        if self._meter.stop.is_set():
            raise StoppedError
        try:
            pulled = self._ensure(file)
        except BaseException:
            self._meter.stop.set()
            raise
        arrived(file.name)
        return pulled

    def _ensure(self, file: RemoteFile) -> PulledFile:
        """Have `file` here with the right hash and linked into the snapshot, whatever that takes."""
        state: State | None = None
        with hub_errors(self._listing.repo, self._listing.revision, f"while downloading {file.name}"):
            held = self._held(file)
            if held is not None:
                if cache.matches(held, file.digest, lambda count: self._meter.advance(file.name, count)):
                    state = "present"
                else:
                    self._meter.start_over(file.name)
                    held.unlink()
            if state is None:
                resumed = self._download(file)
                state = "repaired" if held is not None else "resumed" if resumed else "downloaded"
            self._link(file)
        return PulledFile(file.name, file.size, state)

    def _held(self, file: RemoteFile) -> Path | None:
        """The copy that is here: the blob, or the snapshot's own file on a disk without links."""
        link = self._snapshot / file.name
        if link.is_file() and not link.is_symlink():
            return link
        blob = self._blob(file)
        return blob if blob.exists() else None

    def _download(self, file: RemoteFile) -> bool:
        """Fetch the file into the blobs; whether an earlier run's part was used. Raises VerificationError."""
        path = self._partial(file)
        with partial.PartialFile(path, file, lambda count: self._meter.advance(file.name, count)) as part:
            start = part.size
            self._fetch(part)
            if not part.is_right() and start:  # the part may have been damaged on this disk: once more, from zero
                part.restart()
                start = 0
                self._fetch(part)
            if not part.is_right():
                part.restart()
                raise VerificationError(
                    f"{file.name} of {self._listing.repo} does not have the hash the repository lists "
                    f"({file.digest[:12]}…): the server or the way to it changes bytes; try again later"
                )
            path.replace(self._blob(file))
        return start > 0

    def _fetch(self, part: partial.PartialFile) -> None:
        start = part.size
        try:
            partial.fetch(self._listing, part)
        finally:
            self._meter.count_received(max(part.size - start, 0))

    def _link(self, file: RemoteFile) -> None:
        link = self._snapshot / file.name
        if link.is_file() and not link.is_symlink():
            return
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(Path("../../blobs") / file.digest)
        except OSError:  # a disk without links: the file itself goes into the snapshot, as huggingface_hub does
            self._blob(file).replace(link)

    def _finish(self) -> None:
        """Record which commit the branch or tag means now; the snapshot becomes the newest of its repository."""
        with hub_errors(self._listing.repo, self._listing.revision, f"while writing to {self._directory}"):
            if self._listing.revision != self._listing.commit:
                reference = self._directory / "refs" / self._listing.revision
                reference.parent.mkdir(parents=True, exist_ok=True)
                reference.write_text(self._listing.commit, encoding="ascii")
            self._snapshot.touch()

    def _blob(self, file: RemoteFile) -> Path:
        return self._directory / "blobs" / file.digest

    def _partial(self, file: RemoteFile) -> Path:
        return self._directory / "blobs" / f"{file.digest}.localmoe.incomplete"
