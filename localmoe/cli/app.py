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
from typer.core import TyperCommand, TyperGroup

from localmoe.cli import config_file, prompt_template, streams
from localmoe.cli.failure import INTERRUPTED, READER_GONE, Failure, describe, hint
from localmoe.cli.sanitize import printable_line
from localmoe.cli.values import suggestion
from localmoe.errors import LocalMoeError, UsageError

COMMANDS = {  # name: its module in localmoe.cli, its function there, what the list of commands says
    "run": ("run", "run", "Ask one thing; the answer alone on stdout."),
    "chat": ("chat", "chat", "Talk with a model."),
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
_HELP = ("-h", "--help")


class Command(TyperCommand):
    """A command whose options have the config file's values where they are not given."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if not given(args, _HELP):  # help comes whatever the file is like
            extra["default_map"] = config_file.read().defaults(info_name or "")
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        name = ctx.params.get("template")
        if name is not None:  # its settings come after what was typed, before the config file's
            for key, value in prompt_template.load(name).settings.items():
                parameter = prompt_template.SETTINGS[key].parameter
                source = ctx.get_parameter_source(parameter)
                if key != "think" and (source is None or source.name != "COMMANDLINE"):
                    ctx.params[parameter] = str(value) if key == "mtp" else value
        return super().invoke(ctx)


class _Commands(TyperGroup):
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

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = suggestion(args[0], list(COMMANDS), "; localmoe --help lists them")
            raise UsageError(f"no such command: {printable_line(args[0])}{near}")
        return super().resolve_command(ctx, args)

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
    context_settings={"help_option_names": list(_HELP), "max_content_width": 100},
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


def given(arguments: Sequence[str], flags: Sequence[str]) -> set[str]:
    """Those of the flags that are among the arguments, whether or not these can be parsed."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return set(flags).intersection(arguments[:end])


def _fail(error: BaseException, arguments: Sequence[str]) -> int:
    # Looked for among the arguments, since parsing may be what failed.
    failure, flags = describe(error), given(arguments, ("--json", "--debug"))
    failure = replace(failure, message=failure.message + _set_elsewhere(failure, arguments))
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
