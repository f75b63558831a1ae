"""What models are called: the names of models.toml, the hub's repository ids, and which of them are safe.

Every name here may become a part of a path, and a message may carry it to a terminal, so names are checked
against a short alphabet before anything is done with them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from localmoe.errors import StorageError, UnsupportedModelError

_PACKAGE = Path(__file__).parents[1]
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,254}")


@dataclass(frozen=True)
class ModelRef:
    """What the user typed as MODEL, taken apart.

    `name` is a name of models.toml, a repository id, or a directory's own name; `ending` is a recipe, "source"
    or None; `directory` is set when MODEL is a directory.
    """

    name: str
    ending: str | None
    directory: Path | None


@dataclass(frozen=True)
class KnownModel:
    """One entry of models.toml. `repo` is None for the demo, which ships with the package; `refused` says why
    localmoe cannot run the model; `files` maps the demo's files to their SHA-256."""

    name: str
    repo: str | None
    what: str
    parameters: str
    size_bytes: int
    licence: str
    sampling: Mapping[str, float]
    refused: str | None
    files: Mapping[str, str]


@cache
def registry() -> Mapping[str, KnownModel]:
    """The models known by name, in the order of models.toml. Raises StorageError when the file is missing."""
    for path in (_PACKAGE / "models.toml", _PACKAGE.parent / "models.toml"):
        if path.is_file():
            with path.open("rb") as file:
                entries = tomllib.load(file)["model"]
            return MappingProxyType({entry["name"]: _known_model(entry) for entry in entries})
    raise StorageError(f"{_PACKAGE / 'models.toml'} is missing: install localmoe again")


def _known_model(entry: dict[str, Any]) -> KnownModel:
    return KnownModel(
        name=entry["name"],
        repo=entry.get("repo"),
        what=entry["what"],
        parameters=entry["parameters"],
        size_bytes=entry["size_bytes"],
        licence=entry["licence"],
        sampling=MappingProxyType(dict(entry.get("sampling", {}))),
        refused=entry.get("refused"),
        files=MappingProxyType(dict(entry.get("files", {}))),
    )


def repo_of(name: str) -> str | None:
    """The repository that holds `name`'s source, or None: for the demo, and for the name of a directory."""
    known = registry().get(name)
    if known is not None:
        return known.repo
    return name if is_repo_id(name) else None


def known_name(repo: str) -> str | None:
    """The name that models.toml has for a repository id (the hub does not tell capitals apart)."""
    for known in registry().values():
        if known.repo is not None and known.repo.lower() == repo.lower():
            return known.name
    return None


def refuse_unsupported(name: str) -> None:
    """Raises UnsupportedModelError for a model that models.toml lists as one localmoe cannot run."""
    known = registry().get(name)
    if known is not None and known.refused is not None:
        raise UnsupportedModelError(f"{name} is not supported: {known.refused}")


def is_plain_name(text: str) -> bool:
    """Whether `text` can be a directory's name in the store ("--" stands for the "/" of a repository id)."""
    return _PART.fullmatch(text) is not None and ".." not in text and "--" not in text


def is_repo_id(text: str) -> bool:
    """Whether `text` is OWNER/NAME as the hub allows it: [A-Za-z0-9._-], no "..", no "--"."""
    parts = text.split("/")
    return len(parts) == 2 and all(is_plain_name(part) for part in parts)


def is_file_name(text: str) -> bool:
    """Whether `text` is a plain file name: no directory, nothing hidden, nothing that a terminal acts on."""
    return _FILE.fullmatch(text) is not None


def printable(text: object, limit: int = 200) -> str:
    """Text from outside, safe to print: one line, no control or invisible characters, cut to `limit`."""
    line = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(text))
    return line if len(line) <= limit else line[: limit - 1] + "…"
