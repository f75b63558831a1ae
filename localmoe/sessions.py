"""Sessions on disk, from the outside: their names and places, what a file says of itself, and who has it open.

    home()/sessions/NAME.safetensors    one conversation: `localmoe.session_file` says what is in it

Importing this module does not import torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from localmoe import store
from localmoe.errors import SessionError, StorageError, UsageError

FORMAT = 1
"""Version of the file's layout; a reader refuses what it does not know."""

CACHE_DTYPES = ("float32", "bf16", "int8")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SUFFIX = ".safetensors"
_LONGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Facts:
    """What a session is, beside its tensors.

    `messages` are the chat's ({"role", "content"}), `sampling` the settings that the answers were drawn with, `seed`
    the one that the next answer takes (None: a new one each time). `model` is the name the user typed, `model_hash`
    (`localmoe.formats.fingerprint`) the weights, without which the latents mean nothing.
    """

    messages: Sequence[Mapping[str, str]]
    sampling: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    model: str = ""
    model_hash: str = ""
    cache_dtype: str = "bf16"
    tokens: int = 0
    draft_tokens: int = 0  # rows of the MTP layer's own cache; 0 where none was kept

    def to_metadata(self) -> dict[str, str]:
        """As safetensors' `__metadata__`, whose values are texts."""
        conversation = {
            "messages": [dict(message) for message in self.messages],
            "sampling": dict(self.sampling),
            "seed": self.seed,
            "logit_bias": {str(token_id): str(bias) for token_id, bias in self.logit_bias.items()},  # may be -inf
        }
        return {
            "localmoe_session": str(FORMAT),
            "model": self.model,
            "model_sha256": self.model_hash,
            "cache_dtype": self.cache_dtype,
            "tokens": str(self.tokens),
            "draft_tokens": str(self.draft_tokens),
            "conversation": json.dumps(conversation, allow_nan=False),
        }

    @classmethod
    def from_metadata(cls, metadata: object, name: str) -> Facts:
        """What `to_metadata` gave, from a file that nobody vouches for. Raises SessionError calling it `name`."""
        if not isinstance(metadata, dict) or "localmoe_session" not in metadata:
            raise SessionError(f"session {name}: its file is not a session of localmoe's")
        version = str(metadata["localmoe_session"])
        if version != str(FORMAT):
            newer = version.isascii() and version.isdecimal() and len(version) < 9 and int(version) > FORMAT
            who = "a newer localmoe: update localmoe" if newer else "another version of localmoe"
            raise SessionError(
                f"session {name}: was written by {who} (format {version[:9]!a}; this one reads {FORMAT})"
            )
        try:
            facts = _parse(metadata)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError, RecursionError) as error:
            raise damaged(name) from error
        return facts


def _parse(metadata: Mapping[str, Any]) -> Facts:
    said = json.loads(metadata["conversation"])
    messages = [{"role": message["role"], "content": message["content"]} for message in said["messages"]]
    sampling = {str(name): _number(value) for name, value in said["sampling"].items()}
    seed = said["seed"]
    counts = [int(metadata[name]) for name in ("tokens", "draft_tokens")]
    valid = (
        all(message["role"] in _ROLES and isinstance(message["content"], str) for message in messages)
        and (seed is None or (type(seed) is int and 0 <= seed < 1 << 63))
        and isinstance(metadata["model"], str)
        and _SHA256.fullmatch(metadata["model_sha256"]) is not None
        and metadata["cache_dtype"] in CACHE_DTYPES
        and all(0 <= count < 1 << 31 for count in counts)
    )
    if not valid:
        raise ValueError
    return Facts(
        messages=messages,
        sampling=sampling,
        seed=seed,
        logit_bias={int(token_id): float(bias) for token_id, bias in said["logit_bias"].items()},
        model=metadata["model"],
        model_hash=metadata["model_sha256"],
        cache_dtype=metadata["cache_dtype"],
        tokens=counts[0],
        draft_tokens=counts[1],
    )


def _number(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError
    return value


def damaged(name: str) -> SessionError:
    """The error for a file that is not as it was written."""
    return SessionError(f"session {name}: its file is cut short or damaged; `localmoe sessions rm {name}` deletes it")


@dataclass(frozen=True)
class Entry:
    """A session in the store. `facts` is None and `problem` set where the file cannot be used."""

    name: str
    path: Path
    size_bytes: int
    modified: float  # seconds since 1970
    facts: Facts | None
    problem: str | None = None


def path_of(name: str) -> Path:
    """Where the session called `name` lies, whether or not it is there. Raises UsageError for what is no name."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise UsageError(
            f"--session: {name[:80]!a} is not a name: letters, digits, '.', '_' and '-', up to 64, and no path"
        )
    return store.home() / "sessions" / (name + _SUFFIX)


def name_of(path: Path) -> str:
    """The session's name in messages."""
    return path.name.removesuffix(_SUFFIX)


def read_facts(path: Path) -> Facts:
    """What the header says; the rest of the file is neither read nor checked. Raises SessionError."""
    name = name_of(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(path.stat().st_size - 8, _LONGEST_HEADER):
                raise damaged(name)
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise SessionError(f"there is no session {name}: `localmoe sessions list` shows them") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise damaged(name) from error
    return Facts.from_metadata(header.get("__metadata__") if isinstance(header, dict) else None, name)


def list_sessions() -> list[Entry]:
    """Every session of this user, by name. Raises StorageError."""
    directory = store.home() / "sessions"
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix == _SUFFIX)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{directory}: cannot be read: {error.strerror}") from error
    named = [path for path in paths if _NAME.fullmatch(name_of(path)) and path.is_file()]  # temporary ones have a dot
    return [find(name_of(path)) for path in named]


def find(name: str) -> Entry:
    """One session. Raises SessionError where there is none of this name, UsageError for what is no name."""
    path = path_of(name)
    try:
        status = path.stat()
    except FileNotFoundError:
        raise SessionError(f"there is no session {name}: `localmoe sessions list` shows them") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        facts, problem = read_facts(path), None
    except SessionError as error:
        facts, problem = None, str(error)
    return Entry(name, path, status.st_size, status.st_mtime, facts, problem)


def remove(name: str) -> Path:
    """Delete a session that no other program has open. Returns where it was. Raises as `find` and `Claim.take` do."""
    entry = find(name)
    with Claim.take(name):
        try:
            entry.path.unlink()
        except OSError as error:
            raise StorageError(f"{entry.path}: cannot be deleted: {error.strerror}") from error
    return entry.path


class Claim:
    """A session's name, taken: no two programs write one session. A context manager, which gives it back."""

    def __init__(self, name: str, path: Path, lock: Path, descriptor: int) -> None:
        self.name = name
        self.path = path
        self._lock = lock
        self._descriptor = descriptor

    @classmethod
    def take(cls, name: str) -> Claim:
        """Raises UsageError for what is no name, SessionError where another program has it, StorageError."""
        path = path_of(name)
        lock = path.with_name(f".{name}.lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    os.close(descriptor)
                    raise
                if os.fstat(descriptor).st_nlink:  # else its holder has just given it back and removed it
                    _sweep(path.parent, name)
                    return cls(name, path, lock, descriptor)
                os.close(descriptor)
        except BlockingIOError as error:
            raise SessionError(f"session {name} is open in another localmoe; leave it there first") from error
        except OSError as error:
            raise StorageError(f"{lock}: cannot be written: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the name back. May be called twice."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                self._lock.unlink()
            os.close(self._descriptor)
            self._descriptor = -1


def _sweep(directory: Path, name: str) -> None:
    """Delete what a program that was killed while it wrote this session left: only the claim's holder writes it."""
    left = re.compile(rf"\.{re.escape(name)}-[a-z0-9_]{{8}}")  # as `tempfile.mkstemp` names them
    for path in directory.iterdir():
        if left.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()
