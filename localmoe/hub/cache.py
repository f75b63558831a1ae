"""Where downloads lie: the hub's own cache, read without the network.

Its layout is huggingface_hub's documented one, and other tools find our downloads there (and we theirs):

    $HF_HOME/hub/models--OWNER--NAME/
        blobs/DIGEST              contents, named by their hash: SHA-256 (LFS) or git's SHA-1 (small files)
        snapshots/COMMIT/FILE     links into blobs
        refs/REVISION             holds the COMMIT that a branch or tag meant at the last download
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localmoe.errors import StorageError
from localmoe.hub.names import is_file_name, is_repo_id, printable

if TYPE_CHECKING:
    from hashlib import _Hash

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_READ = 1 << 22
_DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


@dataclass(frozen=True)
class Progress:
    """How far a download or a check is: bytes done of the total, and the file it is about."""

    done_bytes: int
    total_bytes: int
    item: str


OnProgress = Callable[[Progress], None]


def is_digest(text: str) -> bool:
    """Whether `text` is a content hash as the hub writes them: 64 (SHA-256) or 40 (git's SHA-1) hex digits."""
    return _DIGEST.fullmatch(text) is not None


def new_hash(digest: str, size: int) -> _Hash:
    """A hash of the kind that `digest` is, ready for the file's `size` bytes.

    A git blob id is the SHA-1 of "blob SIZE\\0" and the content.
    """
    if len(digest) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def matches(path: Path, digest: str, advance: Callable[[int], None]) -> bool:
    """Whether the file's content has this digest. `advance` is told the bytes read. Raises StorageError."""
    try:
        with path.open("rb") as file:
            content = new_hash(digest, path.stat().st_size)
            while chunk := file.read(_READ):
                content.update(chunk)
                advance(len(chunk))
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    return content.hexdigest() == digest


def root() -> Path:
    """The hub's cache, as huggingface_hub finds it (HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repo_directory(repo: str) -> Path:
    """The directory of one repository in the cache, whether or not it exists."""
    if not is_repo_id(repo):
        raise ValueError(f"not a repository id: {printable(repo)!r}")
    return root() / f"models--{repo.replace('/', '--')}"


def repositories() -> list[str]:
    """The ids of the model repositories in the cache."""
    try:
        names = sorted(entry.name for entry in root().iterdir() if entry.name.startswith("models--"))
    except OSError:  # no cache yet, or none that we may read
        return []
    return [repo for name in names if is_repo_id(repo := name.removeprefix("models--").replace("--", "/"))]


def find_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The complete checkpoint of `repo` that was pulled last, or the one of `revision`; None if there is none."""
    directory = repo_directory(repo)
    snapshots = directory / "snapshots"
    if revision is None:
        found = [path for path in snapshots.glob("*") if path.is_dir()]
        found.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    else:
        found = [snapshots / (_read_reference(directory / "refs" / revision) or revision)]
    return next((path for path in found if path.is_dir() and not missing_files(path)), None)


def find_config(repo: str) -> Path | None:
    """The newest config.json of `repo` here, whether or not its weights are."""
    complete = find_snapshot(repo)
    if complete is not None:
        return complete / "config.json"
    found = [path for path in (repo_directory(repo) / "snapshots").glob("*/config.json") if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _read_reference(path: Path) -> str | None:
    """The commit that a branch or tag stood for; the file is anybody's, so only a digest will do."""
    try:
        commit = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return commit if is_digest(commit) else None


def missing_files(checkpoint: Path) -> list[str]:
    """The files that a checkpoint needs and `checkpoint` does not hold: config, index, shards; [] if complete."""
    names = ["config.json"]
    index = checkpoint / INDEX
    names += shards_of(index) if index.is_file() else [SINGLE]
    return [name for name in names if not (checkpoint / name).is_file()]


def shards_of(index: Path) -> list[str]:
    """The shards that a safetensors index names. An index that cannot be read names itself, so that it counts
    as the missing piece; so does a name that is not a plain file name."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [f"{INDEX} (cannot be read)"]
    if not names:
        return [f"{INDEX} (names no shards)"]
    return [name if is_file_name(name) else f"{printable(name)} (not a file name)" for name in names]
