"""docs/commands says what the program says, and its examples are commands that the program takes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from localmoe.cli.app import COMMANDS, app
from localmoe.cli.examples import EXAMPLES

ROOT = Path(__file__).parents[1]


def test_the_pages_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_command_pages"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def leaves() -> list[str]:
    program = typer.main.get_command(app)
    found = []
    for name in COMMANDS:
        command = program.get_command(typer.Context(program), name)
        found += [name, *(f"{name} {inner}" for inner in getattr(command, "commands", {}))]
    return found


def test_every_command_has_examples_and_no_other() -> None:
    assert set(EXAMPLES) == {"", *leaves()}


def arguments(line: str) -> list[list[str]]:
    """The calls of localmoe in a line of a shell, redirections left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|>")
    lexer.whitespace_split = True
    calls: list[list[str]] = []
    words: list[str] = []
    for word in [*lexer, "|"]:
        if word == "|":
            calls += [words[words.index("localmoe") + 1 :]] if "localmoe" in words else []
            words = []
        else:
            words.append(word)
    return [call[: call.index(">")] if ">" in call else call for call in calls]


def troubleshooting() -> list[str]:
    """The commands that the page names, on one line each, with something to stand for its capitals."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").replace("\n", " ")
    found = [line.removesuffix(" </dev/null") for line in re.findall(r"`(localmoe [^`]*)`", text)]
    assert len(found) > 20
    found = [line for line in found if line != "localmoe --version"]
    return [line.replace("KEY", "run.seed").replace("MODEL", "demo").replace("RECIPE", "compact") for line in found]


@pytest.mark.parametrize(
    "line", [*(line for examples in EXAMPLES.values() for _, line in examples), *troubleshooting()]
)
def test_the_examples_are_taken(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    inside = line.partition("$(")[2].partition(")")[0]
    calls = arguments(inside or line)
    assert calls
    for words in calls:
        command, parent = typer.main.get_command(app), None
        while hasattr(command, "get_command"):
            parent = typer.Context(command, info_name="localmoe", parent=parent)
            command = command.get_command(parent, words.pop(0))
            assert command is not None, line
        command.make_context("x", words, parent=parent)  # raises for an option or a value that is not taken


@pytest.mark.parametrize("name", ["", "run", "config", "config set"])  # the others go the same way
def test_help_shows_the_examples(name: str) -> None:
    command = [sys.executable, "-m", "localmoe", *name.split(), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for what, line in EXAMPLES[name]:
        assert f"  # {what}\n  {line}\n" in shown
