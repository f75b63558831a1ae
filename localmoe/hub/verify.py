"""`verify`: are the files on this disk, bit for bit, the ones that were downloaded or written?

An artifact's hashes are in its manifest, localmoe.json; a download's are the names of its blobs in the hub's
cache; the demo's are in models.toml. A source directory of the user's own has none, and the report says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from localmoe.errors import CheckpointError, ModelNotFoundError, VerificationError
from localmoe.hub import cache
from localmoe.hub.cache import OnProgress, Progress
from localmoe.hub.names import is_file_name, printable, registry

MANIFEST = "localmoe.json"


@dataclass(frozen=True)
class Problem:
    """One file that is not what it should be, and in which way."""

    file: str
    reason: str


@dataclass(frozen=True)
class VerifyReport:
    """What a check of a directory found. `unrecorded` files have no hash to be held against."""

    path: Path
    checked: int
    checked_bytes: int
    problems: tuple[Problem, ...]
    unrecorded: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def raise_if_bad(self) -> None:
        """Raises VerificationError naming every bad file."""
        if self.problems:
            named = "; ".join(f"{problem.file}: {problem.reason}" for problem in self.problems)
            raise VerificationError(f"{self.path} is damaged: {named}")


@dataclass(frozen=True)
class _Expected:
    name: str
    digest: str
    size: int | None


def demo_directory() -> Path:
    """The demo model's source, which ships with the package."""
    return Path(__file__).parents[1] / "data" / "demo"


def verify_artifact(path: Path, *, progress: OnProgress | None = None) -> VerifyReport:
    """Hash every file that the artifact's manifest lists; a shard that it does not list is a problem too.

    Raises ModelNotFoundError when `path` holds no manifest, CheckpointError when it cannot be read.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise ModelNotFoundError(f"{path} holds no {MANIFEST}: it is not a model that localmoe quantized")
    expected = _manifest_files(manifest)
    names = {entry.name for entry in expected}
    extra = [
        Problem(file.name, "not in the manifest")
        for file in sorted(path.glob("*.safetensors"))
        if file.name not in names
    ]
    return _check(path, expected, extra, progress)


def verify_source(path: Path, *, progress: OnProgress | None = None) -> VerifyReport:
    """Hash every file of a downloaded checkpoint, and see that no shard is missing. Works without the network.

    Raises ModelNotFoundError when `path` is not a directory with a config.json.
    """
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(f"{path} is not a model: it has no config.json")
    if path.resolve() == demo_directory().resolve():
        recorded: Mapping[str, str] = registry()["demo"].files
        expected = [_Expected(name, digest, None) for name, digest in recorded.items()]
        return _check(path, expected, [], progress)
    expected, unrecorded = [], []
    for file in sorted(path.iterdir()):
        digest = file.readlink().name if file.is_symlink() else ""
        if cache.is_digest(digest):
            expected.append(_Expected(file.name, digest, None))
        elif file.is_file():
            unrecorded.append(file.name)
    here = {entry.name for entry in expected}  # a dangling link among these is reported by the check itself
    missing = [Problem(name, "missing") for name in cache.missing_files(path) if name not in here]
    return _check(path, expected, missing, progress, tuple(unrecorded))


def _manifest_files(manifest: Path) -> list[_Expected]:
    try:
        files = json.loads(manifest.read_bytes())["files"]
        entries = [_Expected(str(name), entry["sha256"], entry["bytes"]) for name, entry in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{manifest} cannot be read ({printable(error)}): quantize the model again") from error
    for entry in entries:
        right = isinstance(entry.digest, str) and len(entry.digest) == 64 and cache.is_digest(entry.digest)
        if not (is_file_name(entry.name) and right and isinstance(entry.size, int)):
            raise CheckpointError(f"{manifest} has a malformed entry {printable(entry.name)!r}: quantize it again")
    return entries


def _check(
    path: Path,
    expected: list[_Expected],
    problems: list[Problem],
    progress: OnProgress | None,
    unrecorded: tuple[str, ...] = (),
) -> VerifyReport:
    found = {entry.name: (path / entry.name).stat().st_size for entry in expected if (path / entry.name).is_file()}
    total, done = sum(found.values()), 0
    bad = list(problems)
    for entry in expected:
        if entry.name not in found:
            bad.append(Problem(entry.name, "missing"))
            continue
        size = found[entry.name]
        if entry.size is not None and entry.size != size:
            bad.append(Problem(entry.name, f"{size} bytes, not {entry.size}"))
            continue

        def advance(count: int, name: str = entry.name) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(Progress(done, total, name))

        if not cache.matches(path / entry.name, entry.digest, advance):
            bad.append(Problem(entry.name, "its SHA-256 differs" if len(entry.digest) == 64 else "its hash differs"))
    return VerifyReport(path, len(found), sum(found.values()), tuple(bad), unrecorded)
