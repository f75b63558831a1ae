"""What every command of the program can do: take defaults from the config file and templates, show examples, and name
what was probably meant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand, TyperGroup

from localmoe.cli import config_file, prompt_template
from localmoe.cli.coercion import hastened
from localmoe.cli.examples import EXAMPLES
from localmoe.cli.sanitize import printable_line
from localmoe.cli.values import suggestion
from localmoe.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

HELP = ("-h", "--help")


class Command(TyperCommand):
    """A command whose options have the config file's values where they are not given."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if (
            info_name is not None and info_name in config_file.COMMANDS and not given(args, HELP)
        ):  # help comes whatever the file is like
            extra["default_map"] = config_file.read().defaults(info_name)
        return super().make_context(info_name, args, parent, **extra)

    def get_params(self, ctx: Any) -> Any:
        return hastened(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        name = ctx.params.get("template")
        if name is not None:  # its settings come after what was typed, before the config file's
            for key, value in prompt_template.load(name).settings.items():
                parameter = prompt_template.SETTINGS[key].parameter
                source = ctx.get_parameter_source(parameter)
                if key != "think" and (source is None or source.name != "COMMANDLINE"):
                    ctx.params[parameter] = str(value) if key == "mtp" else value
        return super().invoke(ctx)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_examples(ctx, formatter)


class Group(TyperGroup):
    """A command with commands of its own. One called `list` is what it does alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or (["list"] if "list" in self.commands else []))

    def get_params(self, ctx: Any) -> Any:
        return hastened(super().get_params(ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            near = suggestion(args[0], known, f"; {ctx.command_path} --help lists them")
            raise UsageError(f"no such command: {printable_line(args[0])}{near}")
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_examples(ctx, formatter)


def given(arguments: Sequence[str], flags: Sequence[str]) -> set[str]:
    """Those of the flags that are among the arguments, whether or not these can be parsed."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return set(flags).intersection(arguments[:end])


def _write_examples(ctx: Any, formatter: Any) -> None:
    """As they are to be typed: never wrapped."""
    examples = EXAMPLES.get(ctx.command_path.partition(" ")[2], ())
    if examples:
        with formatter.section("Examples"):
            for what, line in examples:
                formatter.write(f"{'':>{formatter.current_indent}}# {what}\n")
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
