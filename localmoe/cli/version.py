"""What `localmoe --version` says: the version, the commit it was built from, and the kernels that run here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from localmoe.cli.values import TIERS

_PACKAGE = Path(__file__).parents[1]
_COMMIT = re.compile(r"([0-9a-f]{7,40})(-dirty)?")


def describe() -> dict[str, Any]:
    """Everything `--version --json` prints. What cannot be found out is None; nothing here fails."""
    commit, modified = commit_of(_PACKAGE)
    tiers = _tiers()
    return {
        "version": _version("localmoe"),
        "commit": commit,
        "modified": modified,
        "kernels": tiers[-1] if tiers else None,
        "tiers": tiers,
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": _version("torch"),
    }


def as_text(facts: dict[str, Any]) -> str:
    """The same for people."""
    commit = facts["commit"]
    built = f" (commit {commit}{', with changes' if facts['modified'] else ''})" if commit else ""
    kernels = ", ".join(reversed(facts["tiers"])) or "not built: install localmoe again"
    return (
        f"localmoe {facts['version']}{built}\n"
        f"kernels  {kernels}\n"
        f"python   {facts['python']}, torch {facts['torch'] or 'missing'}\n"
    )


def commit_of(package: Path) -> tuple[str | None, bool | None]:
    """The commit, and whether anything was changed after it: asked of git in a checkout, else as CMake wrote it down
    when the package was built."""
    if (package.parent / ".git").exists():
        # GIT_DIR and its like would name another repository, as in a hook.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        command = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            asked = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=5,
                check=False,
            )
        except (OSError, ValueError, subprocess.SubprocessError):
            return None, None
        text = asked.stdout
    else:
        try:
            text = (package / "commit").read_text(encoding="ascii")
        except (OSError, ValueError):
            return None, None
    found = _COMMIT.fullmatch(text.strip())
    return (found[1], found[2] is not None) if found else (None, None)


def _tiers() -> list[str]:
    """The kernel tiers that run here, the one that is chosen last; without waiting for torch."""
    try:
        from localmoe.kernels import _cpu
    except ImportError:
        return []
    supported = _cpu.supported_tiers()
    return [tier for tier in TIERS if tier in supported]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
