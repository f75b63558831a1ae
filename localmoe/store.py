"""The local store: what MODEL means, where artifacts lie, what is here, and how it is removed.

    home()/models/NAME/RECIPE/    one quantized model ("/" of a repository id is "--" in NAME)

Sources are not copied here: downloads stay in the hub's cache, the demo's source ships with the package.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from localmoe.errors import ModelNotFoundError, StorageError, UsageError
from localmoe.formats.journal import JOURNAL_NAME
from localmoe.formats.manifest import CONVERTED
from localmoe.hub import cache
from localmoe.hub.names import (
    ModelRef,
    is_plain_name,
    is_repo_id,
    known_name,
    printable,
    refuse_unsupported,
    registry,
    repo_of,
)
from localmoe.hub.verify import MANIFEST, demo_directory

__all__ = [
    "ARTIFACTS",
    "CONVERTED",
    "RECIPES",
    "Artifact",
    "ModelRef",
    "Resolved",
    "artifact_dir",
    "find_source",
    "home",
    "list_artifacts",
    "list_sources",
    "parse_ref",
    "remove",
    "resolve",
    "unfinished_bytes",
]

RECIPES: tuple[str, ...] = ("balanced", "experts-only", "local", "compact", "smallest", "int8", "nf4")
ARTIFACTS = (*RECIPES, CONVERTED)
"""What an artifact can be: of a recipe, or what others packed in our layout."""
ENDINGS = (*ARTIFACTS, "source")
# The hub's cache holds other programs' models too; `list` shows those we can run.
_OUR_MODEL_TYPES = frozenset({"deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite"})


@dataclass(frozen=True)
class Resolved:
    """A model that is here. `kind` is "artifact" for what localmoe quantized (then `recipe` is set), else
    "source": the checkpoint as its makers ship it, or any directory without our manifest."""

    ref: ModelRef
    name: str
    path: Path
    kind: Literal["artifact", "source"]
    recipe: str | None


@dataclass(frozen=True)
class Artifact:
    """One line of `localmoe list`. The figures come from the manifest and are None where it has none; an
    artifact that is not `complete` is a quantization that was interrupted, or is running."""

    name: str
    recipe: str
    path: Path
    size_bytes: int
    complete: bool
    group_size: int | None = None
    version: str | None = None
    mean_relative_error: float | None = None


def home() -> Path:
    """$LOCALMOE_HOME, else $XDG_DATA_HOME/localmoe, else ~/.local/share/localmoe."""
    own = os.environ.get("LOCALMOE_HOME")
    if own:
        return Path(own).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data).expanduser().absolute() if data else Path.home() / ".local" / "share") / "localmoe"


def artifact_dir(name: str, recipe: str) -> Path:
    """Where the artifact of `name` made by `recipe` lies, whether or not it exists. Raises UsageError."""
    if recipe not in ARTIFACTS:
        near = difflib.get_close_matches(recipe.lower(), RECIPES, 1)
        hint = f"did you mean {near[0]}?" if near else f"the recipes are {', '.join(RECIPES)}"
        raise UsageError(f"unknown recipe {printable(recipe)!r}: {hint}")
    return _name_dir(name) / recipe


def _name_dir(name: str) -> Path:
    if not (is_plain_name(name) or is_repo_id(name)):
        raise UsageError(f"{printable(name)!r} cannot be a model's name: give the output directory with -o")
    return home() / "models" / name.replace("/", "--")


def parse_ref(text: str) -> ModelRef:
    """Take MODEL apart: a name of models.toml, a repository id (each may end in :RECIPE or :source), a directory.

    What begins with "/", "." or "~" is a directory; so is any directory that holds a config.json, unless
    models.toml has the name. Raises UsageError for an unknown ending, ModelNotFoundError for an unknown name.
    """
    if text in registry():
        return ModelRef(text, None, None)
    path = Path(text)
    if text.startswith(("/", "~", "./", "../")) or text in (".", "..") or (path / "config.json").is_file():
        path = _expand(path)
        return ModelRef(path.absolute().resolve().name, None, path)
    name, colon, ending = text.partition(":")
    if colon and ending not in ENDINGS:
        raise UsageError(f"unknown ending {printable(':' + ending)!r} of {printable(name)}: {_ending_hint(ending)}")
    return ModelRef(_canonical(name), ending or None, None)


def _expand(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:  # "~nobody"
        raise UsageError(f"no such user: {printable(path)}") from error


def _ending_hint(ending: str) -> str:
    near = difflib.get_close_matches(ending.lower(), ENDINGS, 1)
    return f"did you mean :{near[0]}?" if near else "it can be " + ", ".join(f":{known}" for known in ENDINGS)


def _canonical(name: str) -> str:
    """The one name that a model goes by, so that `pull OWNER/NAME` and `run name` mean the same artifact."""
    if name in registry() or (is_plain_name(name) and _name_dir(name).is_dir()):
        return name
    if is_repo_id(name):
        return known_name(name) or name
    known = dict.fromkeys([*registry(), *(path.name.replace("--", "/") for path in _subdirectories(home() / "models"))])
    near = difflib.get_close_matches(name.lower(), known, 3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`localmoe list` shows the names"
    raise ModelNotFoundError(f"no model is called {printable(name)!r}: {hint} (or give OWNER/NAME, or a directory)")


def resolve(text: str) -> Resolved:
    """Find the model that `text` names on this machine. Nothing is downloaded or made.

    A bare name means its newest artifact, `balanced` before the others, or else its source. Raises UsageError,
    UnsupportedModelError for one that models.toml refuses, and ModelNotFoundError with the commands to type.
    """
    ref = parse_ref(text)
    if ref.directory is not None:
        return _resolve_directory(ref, ref.directory)
    refuse_unsupported(ref.name)
    if ref.ending != "source":
        recipes = [ref.ending] if ref.ending else _by_preference(ref.name)
        for recipe in recipes:
            path = artifact_dir(ref.name, recipe)
            if (path / MANIFEST).is_file():
                return Resolved(ref, ref.name, path, "artifact", recipe)
    source = find_source(ref.name)
    if source is not None and ref.ending in (None, "source"):
        return Resolved(ref, ref.name, source, "source", None)
    raise ModelNotFoundError(_what_to_type(ref, source))


def _resolve_directory(ref: ModelRef, path: Path) -> Resolved:
    if not path.is_dir():
        raise ModelNotFoundError(f"{printable(path)} is not a directory")
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(f"{printable(path)} is not a model: it has no config.json")
    if not (path / MANIFEST).is_file():
        return Resolved(ref, ref.name, path, "source", None)
    recipe = _read_manifest(path).get("recipe")
    return Resolved(ref, ref.name, path, "artifact", recipe if isinstance(recipe, str) else None)


def _by_preference(name: str) -> list[str]:
    def made(recipe: str) -> float:
        manifest = artifact_dir(name, recipe) / MANIFEST
        return manifest.stat().st_mtime if manifest.is_file() else 0.0

    return sorted(ARTIFACTS, key=lambda recipe: (recipe != "balanced", -made(recipe)))


def _what_to_type(ref: ModelRef, source: Path | None) -> str:
    pull = f"`localmoe pull {ref.name}`"
    if ref.ending == "source":
        return f"the source of {ref.name} is not on this machine: type {pull}"
    quantize = f"`localmoe quantize {ref.name}{f' --recipe {ref.ending}' if ref.ending else ''}`"
    if source is not None:
        return f"{ref.name}:{ref.ending} is not made yet: type {quantize}"
    if repo_of(ref.name) is None:  # the name of a quantized directory, not of anything to download
        ending = f":{ref.ending}" if ref.ending else ""
        return f"{ref.name}{ending} is not on this machine: `localmoe list` shows what is"
    return f"{ref.name} is not on this machine: type {pull} and then {quantize}"


def find_source(name: str) -> Path | None:
    """The complete source checkpoint of `name`: in the package (demo), or in the hub's cache. No network."""
    if name == "demo":
        return demo_directory()
    repo = repo_of(name)
    return cache.find_snapshot(repo) if repo is not None else None


def list_artifacts() -> list[Artifact]:
    """Every quantized model in the store, by name and recipe."""
    models = home() / "models"
    found = []
    for directory in _subdirectories(models):
        name = directory.name.replace("--", "/")
        if is_plain_name(name) or is_repo_id(name):
            found += [_artifact(name, path) for path in _subdirectories(directory) if path.name in ARTIFACTS]
    return found


def list_sources() -> list[Artifact]:
    """The sources that are here and complete: the demo's, and those of our architectures in the hub's cache."""
    paths = {"demo": demo_directory()}
    for repo in cache.repositories():
        path = cache.find_snapshot(repo)
        if path is not None and _read_json(path / "config.json").get("model_type") in _OUR_MODEL_TYPES:
            paths[known_name(repo) or repo] = path
    return [Artifact(name, "source", path, _size(path), complete=True) for name, path in paths.items()]


def unfinished_bytes(artifact: Path) -> int:
    """What a quantization that was interrupted has on the disk in `artifact` (its output is allocated whole at the
    start); 0 where none was."""
    if not (artifact / JOURNAL_NAME).is_file():
        return 0
    return sum(status.st_blocks * 512 for status in _statuses(artifact.glob("*.partial")))


def _subdirectories(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.is_symlink())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


def _artifact(name: str, path: Path) -> Artifact:
    manifest = _read_manifest(path)
    group_size, version = manifest.get("group_size"), manifest.get("localmoe")
    return Artifact(
        name,
        path.name,
        path,
        _size(path),
        complete=(path / MANIFEST).is_file(),
        group_size=group_size if isinstance(group_size, int) else None,
        version=printable(version, 40) if isinstance(version, str) else None,
        mean_relative_error=_mean_error(manifest.get("tensors")),
    )


def _mean_error(tensors: Any) -> float | None:
    entries = tensors.values() if isinstance(tensors, dict) else ()
    errors = [entry.get("relative_error") for entry in entries if isinstance(entry, dict)]
    numbers = [float(error) for error in errors if isinstance(error, int | float)]
    return sum(numbers) / len(numbers) if numbers else None


def _read_manifest(path: Path) -> dict[str, Any]:
    return _read_json(path / MANIFEST)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that may be missing or damaged: then {} (only `verify` complains)."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _size(path: Path) -> int:
    return sum(status.st_size for status in _statuses(path.iterdir()) if stat.S_ISREG(status.st_mode))


def _statuses(paths: Iterable[Path]) -> Iterator[os.stat_result]:
    """Of those that are there still: `quantize` renames its files and `rm` deletes them while others look."""
    with suppress(FileNotFoundError):  # the directory
        for path in paths:
            with suppress(FileNotFoundError):
                yield path.stat()


def remove(ref: ModelRef, all: bool = False) -> list[Path]:
    """Delete one artifact, or with `all` every artifact of a name. Returns the directories that are gone.

    Nothing outside home()/models is touched: not sources, not directories of the user's own, and nothing behind
    a symbolic link. Raises UsageError, ModelNotFoundError, StorageError.
    """
    if ref.directory is not None:
        raise UsageError(f"{ref.directory} is not in the store: delete it yourself")
    if ref.ending == "source":
        repo = repo_of(ref.name)
        hint = f"`hf cache rm model/{repo}` deletes it" if repo else "it is a part of localmoe"
        raise UsageError(f"rm deletes what localmoe quantized; the source of {ref.name} is not that: {hint}")
    directory = _name_dir(ref.name)
    recipes = [recipe for recipe in ARTIFACTS if os.path.lexists(directory / recipe)]
    if all:
        if ref.ending is not None:
            raise UsageError(f"rm --all takes a name without an ending: {ref.name}")
        targets = [directory] if os.path.lexists(directory) else []
    elif ref.ending is not None:
        targets = [directory / ref.ending] if ref.ending in recipes else []
    elif len(recipes) > 1:
        choices = ", ".join(f"{ref.name}:{recipe}" for recipe in recipes)
        raise UsageError(f"{ref.name} has {len(recipes)} artifacts ({choices}): name one, or use --all")
    else:
        targets = [directory / recipe for recipe in recipes]
    if not targets:
        ending = f":{ref.ending}" if ref.ending else ""
        raise ModelNotFoundError(f"there is no artifact of {ref.name}{ending}: `localmoe list` shows what is here")
    for target in targets:
        _delete(target)
    if not all and not any(directory.iterdir()):
        directory.rmdir()
    return targets


def _delete(target: Path) -> None:
    """Delete a directory of the store: out of sight in one step, then gone, whatever interrupts it."""
    models = home() / "models"
    inside = target.relative_to(models).parts
    for depth in range(1, len(inside) + 1):
        part = models.joinpath(*inside[:depth])
        if part.is_symlink() or not part.is_dir():
            raise StorageError(f"{part} is not a directory of localmoe's own (a link?): remove it yourself")
    trash = models / ".removing"  # no model's name begins with a dot
    try:
        if os.path.lexists(trash):  # an earlier removal was interrupted
            shutil.rmtree(trash)
        target.rename(trash)
        shutil.rmtree(trash)  # which follows no link
    except OSError as error:
        raise StorageError(f"cannot delete {target}: {error.strerror or error}") from error
