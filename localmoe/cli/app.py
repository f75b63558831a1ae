"""The program: its commands, and the one place where everything that can go wrong ends.

Exit statuses: 0 done; 1 the work failed; 2 wrong usage; 130 interrupted; 141 the reader of stdout went away.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from localmoe.cli import streams
from localmoe.cli.failure import READER_GONE, describe, hint

COMMANDS = {  # name: its module in localmoe.cli, its function there, what the list of commands says
    "run": ("run", "run", "Ask one thing; the answer alone on stdout."),
    "chat": ("chat", "chat", "Talk with a model."),
    "sessions": ("sessions", "sessions", "The conversations that --session keeps."),
    "pull": ("models", "pull", "Download a model, every file checked."),
    "quantize": ("quantize", "quantize", "Make a 4-bit model of a source."),
    "eval": ("evaluate", "evaluate", "Perplexity, and the distance to the source."),
    "bench": ("bench", "bench", "Tokens/s, and where the time goes."),
    "plan": ("plan", "plan", "Where every part goes, and the speed to expect."),
    "doctor": ("doctor", "doctor", "This machine: how fast, and what would help."),
    "list": ("models", "list_models", "The models here, and those to pull."),
    "show": ("show", "show", "What a model is, and what 4 bits cost it."),
    "verify": ("models", "verify", "Check every file's hash."),
    "rm": ("models", "remove", "Delete a quantized model."),
}


class _Commands(TyperGroup):
    """The commands, each imported when it is called: --help and a command wait for no other command's code."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, function, summary = COMMANDS[cmd_name]
        alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        alone.command(cmd_name, short_help=summary)(
            getattr(importlib.import_module(f"localmoe.cli.{module}"), function)
        )
        return typer.main.get_command(alone)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, _, summary) in COMMANDS.items()])


app = typer.Typer(
    name="localmoe",
    cls=_Commands,
    help="Run DeepSeek-style Mixture-of-Experts models, at 4 bits, on one PC.",
    epilog="To begin: localmoe run demo 'Tell me a story about a dragon'",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        from localmoe import __version__

        streams.write(f"localmoe {__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _localmoe(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        streams.tell(context.get_help())
        raise typer.Exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program on `arguments` (the process's own by default); returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        streams.prepare()
        status = _dispatch(given)
        streams.write("")  # flushes: a full disk shows up here at the latest
        return status
    except BrokenPipeError:
        streams.silence_output()
        return READER_GONE
    except BaseException as error:
        return _fail(error, _flags(given))


def _dispatch(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        with command.make_context("localmoe", arguments) as context:
            command.invoke(context)
    except typer.Exit as leaving:
        return leaving.exit_code
    return 0


def _flags(arguments: list[str]) -> set[str]:
    """The flags among the arguments, however far parsing came: they decide how a failure looks."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return {"--json", "--debug"}.intersection(arguments[:end])


def _fail(error: BaseException, flags: set[str]) -> int:
    failure = describe(error)
    streams.passing_remark("")
    if "--debug" in flags:
        streams.tell("".join(traceback.format_exception(error)), end="")
    streams.tell(f"localmoe: {failure.message}{hint(failure)}")
    try:
        streams.write_json(
            {"error": {"kind": failure.kind, "message": failure.message}}
        ) if "--json" in flags else streams.write("")
    except BaseException:  # the error may well be that nothing can be written there
        streams.silence_output()
    return failure.exit_code
