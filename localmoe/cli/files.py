"""Files of the user's, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
import subprocess
import tempfile
from typing import TYPE_CHECKING

from localmoe.errors import StorageError, UsageError

if TYPE_CHECKING:
    from pathlib import Path


def open_in_editor(path: Path) -> None:
    """Let the user edit a file. Raises UsageError where there is no editor, StorageError where it fails."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor:
        raise UsageError(f"neither VISUAL nor EDITOR is set; the file is {path}")
    try:
        status = subprocess.run([*shlex.split(editor), str(path)], check=False).returncode
    except (OSError, ValueError) as error:
        raise UsageError(f"{editor!r} cannot be started: {getattr(error, 'strerror', None) or error}") from error
    if status:
        raise StorageError(f"{editor} ended with status {status}")


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step; a new one is readable by its owner alone, an old one keeps its mode.

    A symbolic link stays one: what it points to is replaced. Raises StorageError naming the file.
    """
    try:
        target = path.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=".localmoe-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
                with contextlib.suppress(FileNotFoundError):
                    os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))
                file.write(text)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, target)  # noqa: PTH105
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # noqa: PTH108
            raise
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
        raise StorageError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
