"""The program: its commands, and the one place where everything that can go wrong ends.

Exit statuses: 0 done; 1 the work failed; 2 wrong usage; 130 interrupted; 141 the reader of stdout went away.
"""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer

from localmoe.cli import config_file, streams, whole_imports
from localmoe.cli.command import HELP, Command, Group, given
from localmoe.cli.failure import INTERRUPTED, READER_GONE, Failure, describe, hint
from localmoe.errors import LocalMoeError, UsageError

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
    "templates": ("templates", "app", "Saved prompts, for run --template."),
    "rm": ("models", "remove", "Delete a quantized model."),
    "completion": ("completion", "completion", "Make your shell complete commands and models."),
    "config": ("config", "app", "Defaults and aliases of your own."),
}


class _Commands(Group):
    """The commands, each imported when it is called: --help and a command wait for no other command's code."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, function, summary = COMMANDS[cmd_name]
        found = getattr(importlib.import_module(f"localmoe.cli.{module}"), function)
        if isinstance(found, typer.Typer):  # a command with commands of its own
            return typer.main.get_command(found)
        alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        alone.command(cmd_name, cls=Command, short_help=summary)(found)
        return typer.main.get_command(alone)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, _, summary) in COMMANDS.items()])


app = typer.Typer(
    name="localmoe",
    cls=_Commands,
    help="Run DeepSeek-style Mixture-of-Experts models, at 4 bits, on one PC.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": list(HELP), "max_content_width": 100},
)


@app.callback(invoke_without_command=True)
def _localmoe(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version, its commit and kernels.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --version: print one JSON object.")] = False,
) -> None:
    if version:
        from localmoe.cli.version import as_text, describe

        facts = describe()
        streams.write_json(facts) if as_json else streams.write(as_text(facts))
        raise typer.Exit
    if as_json:
        raise UsageError("--json goes behind the command, or with --version")
    if context.invoked_subcommand is None:
        streams.tell(context.get_help())
        raise typer.Exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program on `arguments` (the process's own by default); returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        streams.prepare()
        whole_imports.install()
        if arguments[:1] == ["__complete"]:  # a shell asks; hidden, and without the wait for Typer's parsing
            streams.write(_candidates(arguments[1:]))
            return 0
        status = _dispatch(list(arguments))  # parsing empties the list
        streams.write("")  # flushes: a full disk shows up here at the latest
        return status
    except BrokenPipeError:
        streams.silence_output()
        return READER_GONE
    except BaseException as error:
        return _fail(error, arguments)


def _candidates(arguments: Sequence[str]) -> str:
    from localmoe.cli.completion import answer

    commands = {name: summary for name, (_, _, summary) in COMMANDS.items()}
    return answer(arguments or ["bash", ""], commands, lambda name: _Commands().get_command(None, name))


def _dispatch(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        with command.make_context("localmoe", arguments) as context:
            command.invoke(context)
    except typer.Exit as leaving:
        return leaving.exit_code
    return 0


def _fail(error: BaseException, arguments: Sequence[str]) -> int:
    # Looked for among the arguments, since parsing may be what failed.
    failure, flags = describe(error), given(arguments, ("--json", "--debug"))
    failure = replace(failure, message=failure.message + _set_elsewhere(failure, arguments))
    streams.passing_remark("")
    if "--debug" in flags:
        streams.tell("".join(traceback.format_exception(error)), end="")
    streams.tell(streams.in_words(f"localmoe: {failure.message}{hint(failure)}"))
    try:
        streams.write_json(
            {"error": {"kind": failure.kind, "message": failure.message}}
        ) if "--json" in flags else streams.write("")
    except BaseException:  # the error may well be that nothing can be written there
        streams.silence_output()
    return failure.exit_code


def _set_elsewhere(failure: Failure, arguments: Sequence[str]) -> str:
    """Where an option that the message names was set, when nobody typed it."""
    named = re.findall(r"--[a-z][a-z-]*", failure.message)
    if failure.exit_code == INTERRUPTED or not named or not arguments or any(n in arguments for n in named):
        return ""
    try:
        config = config_file.read()
    except LocalMoeError:
        return ""
    parameter = named[0].removeprefix("--").replace("-", "_")
    return f" ({named[0]} is set in {config.path})" if parameter in config.defaults(arguments[0]) else ""
