"""The README is true: its commands run in the order they stand, its Python runs, what it names exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


QUIET = tuple(f"localmoe {name}" for name in ("quantize", "rm", "config set", "templates add"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A home of its own, and this interpreter's `localmoe` first on the path."""
    home = tmp_path_factory.mktemp("home")
    return os.environ | {
        "LOCALMOE_HOME": str(home / "localmoe"),
        "XDG_CONFIG_HOME": str(home / "config"),
        "HF_HOME": str(home / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def test_the_commands_run_as_they_stand(environment: dict[str, str]) -> None:
    commands = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert len(commands) >= 10
    for command in commands:
        # standard input is closed as in a script, unless the command pipes something in
        done = subprocess.run(
            command, shell=True, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout.strip() or command.startswith(QUIET), command
        assert "Traceback" not in done.stderr, command


def test_the_python_runs(environment: dict[str, str]) -> None:
    (code,) = blocks("python")
    subprocess.run(["localmoe", "quantize", "demo"], env=environment, check=True, capture_output=True)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 10


def test_every_subcommand_script_and_file_named_exists(environment: dict[str, str]) -> None:
    usage = subprocess.run(["localmoe", "--help"], env=environment, capture_output=True, text=True, check=True).stdout
    offered = set(re.findall(r"^  ([a-z]+) {2,}\S", usage, re.MULTILINE))
    named = set(re.findall(r"(?:^\$? ?|`|\| )localmoe ([a-z]+)", README, re.MULTILINE))
    assert {"pull", "quantize", "run", "chat", "eval"} <= named <= offered
    for path in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"\bscripts/[a-z_]+", README):
        assert (ROOT / path).exists(), path
