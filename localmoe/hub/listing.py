"""What a repository on the hub holds: asked once, checked, and cut down to what localmoe reads.

Everything in the answer is the server's word. Names and hashes become paths, so each is checked against the
alphabet it may have, and a repository with a name that could leave its directory is refused as a whole.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from localmoe.errors import HubError, StorageError, UnsupportedModelError, UsageError
from localmoe.hub.cache import INDEX, is_digest
from localmoe.hub.names import is_file_name, printable, registry
from localmoe.text.tiktoken import FILE as RANKS
from localmoe.text.tokenizer import FILE as TOKENIZER

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

ALLOWED = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    RANKS,
    "chat_template*",
    "special_tokens_map.json",
    "*.safetensors",
    INDEX,
    "LICENSE*",
    "README.md",
)
NEVER = (".py", ".bin", ".pt", ".pth", ".pkl")  # remote code and pickles
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,127}")


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it. `digest` is its SHA-256 if it is stored with LFS, else its git blob id (SHA-1);
    either way it is also the file's ETag and its name among the cache's blobs."""

    name: str
    size: int
    digest: str

    @property
    def is_weights(self) -> bool:
        return self.name.endswith(".safetensors")


@dataclass(frozen=True)
class Listing:
    """A repository at one commit: the files that localmoe reads, weights last."""

    repo: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]


def check_revision(revision: str) -> None:
    """Raises UsageError unless `revision` can be a branch, tag or commit (it becomes part of a path)."""
    if _REVISION.fullmatch(revision) is None or ".." in revision:
        raise UsageError(f"{printable(revision)!r} is not a branch, tag or commit")


def ask_hub(repo: str, revision: str) -> Listing:
    """List `repo` at `revision` with one request. Raises HubError, UnsupportedModelError."""
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=constants.ENDPOINT, library_name="localmoe")
    try:
        with hub_errors(repo, revision):
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=30)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # whatever answered, it is not a hub
        raise HubError(f"cannot understand what {constants.ENDPOINT} says about {repo}: {printable(error)}") from error
    commit = info.sha or ""
    if not (is_digest(commit) and len(commit) == 40):
        raise HubError(f"{constants.ENDPOINT} answered without a commit for {repo}: is it a Hugging Face hub?")
    files = [_remote_file(repo, sibling) for sibling in info.siblings or [] if _is_wanted(repo, sibling.rfilename)]
    files.sort(key=lambda file: (file.is_weights, file.name != "config.json", file.name))
    listing = Listing(repo, revision, commit, tuple(files))
    _check_usable(listing)
    return listing


def _is_wanted(repo: str, name: str) -> bool:
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise HubError(f"{repo} lists a file named {printable(name)!r}, which is not safe; nothing was downloaded")
    # Subdirectories hold figures, code and other formats of the same weights.
    return len(parts) == 1 and is_file_name(name) and _is_allowed(name)


def _is_allowed(name: str) -> bool:
    return not name.endswith(NEVER) and any(fnmatchcase(name, pattern) for pattern in ALLOWED)


def _remote_file(repo: str, sibling: RepoSibling) -> RemoteFile:
    size, digest = sibling.size, sibling.blob_id
    if sibling.lfs is not None:
        size, digest = sibling.lfs.size, sibling.lfs.sha256
    if not isinstance(size, int) or size < 0 or not isinstance(digest, str) or not is_digest(digest):
        raise HubError(f"{repo} lists {sibling.rfilename} without a usable size and hash; nothing was downloaded")
    return RemoteFile(sibling.rfilename, size, digest)


def _check_usable(listing: Listing) -> None:
    """Refuse before the download what could not be used after it."""
    names = {file.name for file in listing.files}
    repo = listing.repo
    if "config.json" not in names:
        raise HubError(f"{repo} has no config.json: it is not a Transformers checkpoint")
    if not any(file.is_weights for file in listing.files):
        raise HubError(f"{repo} has no safetensors files; localmoe reads no other format (never pickles)")
    if TOKENIZER not in names and RANKS not in names:
        raise UnsupportedModelError(f"{repo} has no {TOKENIZER} and no {RANKS}; localmoe reads no other tokenizer")


@contextmanager
def hub_errors(repo: str, revision: str, doing: str = "") -> Iterator[None]:
    """Turn what huggingface_hub and the operating system raise into one line of ours.

    `doing` is what was under way, for errors that come in the middle of a download.
    """
    from huggingface_hub import constants, errors

    transport_error = errors.HTTPError  # type: ignore[attr-defined]  # httpx's, whichever the hub's client uses
    endpoint = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repo} is gated: accept its terms at {endpoint}/{repo} and set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        near = difflib.get_close_matches(repo, [known.repo for known in registry().values() if known.repo], 1)
        meant = f"; did you mean {near[0]}?" if near and near[0].lower() != repo.lower() else ""
        raise HubError(f"{endpoint} has no model {repo} (or it is private: then set HF_TOKEN){meant}") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo} has no revision {revision}") from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError(f"HF_HUB_OFFLINE is set and {repo} is not complete here: unset it to download") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = " (is HF_TOKEN right?)" if status in (401, 403) else ""
        raise HubError(f"{endpoint} refused {doing or repo}: HTTP {status}{hint}") from error
    except transport_error as error:
        where = f"the connection broke {doing}; run the same command again, it goes on" if doing else ""
        raise HubError(f"{where or f'cannot reach {endpoint}'} ({printable(error) or type(error).__name__})") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"the disk is full {doing}: free some space and run the same command again") from error
        raise StorageError(f"cannot write {doing}: {error.strerror or printable(error)}") from error
