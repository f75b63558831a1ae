"""Groups of options: Typer sees their fields, the command its groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from localmoe.cli.option_groups import EngineOptions, grouped
from localmoe.cli.options import Machine


@dataclass(frozen=True)
class Pair:
    left: Annotated[int, typer.Option("--left", help="One side.")] = 1
    right: Annotated[str | None, typer.Option("--right")] = None


calls: list[tuple[object, ...]] = []


@grouped
def ask(
    word: Annotated[str, typer.Argument()],
    pair: Pair,
    first: Annotated[bool, typer.Option("--first")] = False,
    *,
    on: EngineOptions,
    last: Annotated[int, typer.Option("--last")] = 9,
) -> None:
    """Ask."""
    calls.append((word, pair, first, on.machine(), last))


def test_what_typer_sees_and_what_the_command_gets() -> None:
    app = typer.Typer(add_completion=False)
    app.command()(ask)
    made = typer.main.get_command(app)
    names = [parameter.name for parameter in made.params]
    assert names[:4] == ["word", "left", "right", "first"]
    assert names[-3:] == ["mtp", "deterministic", "last"]
    assert made.help == "Ask."
    calls.clear()
    assert CliRunner().invoke(app, ["w"]).exit_code == 0
    typed = [
        "w",
        "--right",
        "r",
        "--left",
        "5",
        "--first",
        "--ctx",
        "7",
        "--vram",
        "1GiB",
        "--mtp",
        "auto",
        "--last",
        "0",
    ]
    assert CliRunner().invoke(app, typed).exit_code == 0
    assert calls == [
        ("w", Pair(), False, Machine(), 9),
        ("w", Pair(5, "r"), True, Machine(context=7, vram=1 << 30, mtp=None), 0),
    ]
    assert CliRunner().invoke(app, []).exit_code == 2
    assert CliRunner().invoke(app, ["w", "--pair", "x"]).exit_code == 2
