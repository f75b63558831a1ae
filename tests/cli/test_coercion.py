"""What is taken without Typer's validators is what those make of it, word for word."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer

from localmoe.cli.app import _Commands
from localmoe.cli.coercion import hastened

WRITTEN = [
    "", "0", "1", "-1", "+1", " 1", "1 ", "1.0", "1.5", "-0.5", ".5", "5.", "1e3", "1_000", "nan", "inf", "-inf", "٣",
    "10", "11", "007", "12345678901234567890", "0x10", "true", "a word", "ü", "/", "/nowhere/at/all", "-", "a\0b", "2",
]  # fmt: skip


def command(quick: bool):
    """A command with an option of each kind; with Typer's own conversion or with ours."""

    def ask(
        text: Annotated[str, typer.Option()] = "",
        path: Annotated[Path | None, typer.Option()] = None,
        there: Annotated[Path | None, typer.Option(exists=True)] = None,
        number: Annotated[int, typer.Option()] = 0,
        few: Annotated[int | None, typer.Option(min=1, max=10)] = None,
        share: Annotated[float, typer.Option(min=0, max=1)] = 0,  # type: ignore[assignment]
        free: Annotated[float | None, typer.Option()] = None,
        texts: Annotated[list[str] | None, typer.Option()] = None,
        numbers: Annotated[list[int] | None, typer.Option(min=1)] = None,
        yes: Annotated[bool, typer.Option("--yes/--no")] = False,
        word: Annotated[str, typer.Argument()] = "w",
    ) -> None: ...

    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(ask)
    made = typer.main.get_command(app)
    if quick:
        hastened(made.params)
    return made


def outcome(made, arguments: list[str]) -> object:
    try:
        with made.make_context("ask", list(arguments)) as context:
            return {name: (value, type(value)) for name, value in context.params.items()}
    except Exception as error:  # Typer's usage errors have no public name
        return type(error).__name__, getattr(error, "message", str(error))


@pytest.mark.parametrize("option", ["text", "path", "there", "number", "few", "share", "free", "texts", "numbers"])
def test_as_typer_converts_it(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2").mkdir()
    quick, own = command(True), command(False)
    assert any(type(parameter._runtime_param).__name__ == "_Plain" for parameter in quick.params), "Typer has changed"
    for written in WRITTEN:
        arguments = [f"--{option}={written}"]
        if option in ("texts", "numbers"):
            arguments.append(f"--{option}=3")
        assert repr(outcome(quick, arguments)) == repr(outcome(own, arguments)), arguments


def test_nothing_given():
    assert outcome(command(True), []) == outcome(command(False), [])
    assert outcome(command(True), ["--yes", "x"]) == outcome(command(False), ["--yes", "x"])


def test_every_option_of_the_program_as_its_default_says():
    group = _Commands()
    for name in ("run", "chat", "bench", "quantize", "eval", "plan", "pull", "doctor"):
        arguments = ["demo"] if name != "doctor" else []
        quick, own = group.get_command(None, name), group.get_command(None, name)
        own.get_params = super(type(own), own).get_params  # without ours
        assert outcome(quick, arguments) == outcome(own, arguments)


def test_an_ordinary_command_does_without_pydantic():
    program = (
        "import sys; from localmoe.cli.app import main; main(['plan', 'demo:source', '--ram', '8GiB', '--ctx', '64']);"
        "print([name for name in ('pydantic', 'torch') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "pydantic" not in done.stderr, done.stderr
