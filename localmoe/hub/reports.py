"""What a pull did, and what one would do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["present", "downloaded", "resumed", "repaired"]


@dataclass(frozen=True)
class PulledFile:
    """What became of one file: it was here and right, came whole, was taken up half-way, or was damaged."""

    name: str
    size_bytes: int
    state: State


@dataclass(frozen=True)
class PullReport:
    """A finished pull. Every file's hash has been checked; `path` is the checkpoint's directory."""

    name: str
    repo: str | None
    commit: str | None
    path: Path
    files: tuple[PulledFile, ...]
    received_bytes: int

    @property
    def repaired(self) -> tuple[str, ...]:
        return tuple(file.name for file in self.files if file.state == "repaired")

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class Survey:
    """What a pull would do: `missing_bytes` of `size_bytes` are to come into `directory`, the hub's cache. `begun`
    tells whether an earlier pull left some of the weights."""

    repo: str
    config: Path
    directory: Path
    size_bytes: int
    missing_bytes: int
    begun: bool
