"""`localmoe templates`: saved prompts listed, shown, made and deleted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from localmoe.cli import config_file, options, prompt, prompt_template, streams
from localmoe.cli.command import Command, Group
from localmoe.cli.files import open_in_editor, write_whole
from localmoe.cli.prompt_template import SETTINGS, PromptTemplate
from localmoe.cli.sanitize import printable_line
from localmoe.cli.toml_edit import block, literal
from localmoe.cli.values import suggestion
from localmoe.errors import StorageError, UsageError

app = typer.Typer(
    cls=Group,
    help="Saved prompts for `localmoe run MODEL --template NAME`. Alone it lists them.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
Name = Annotated[str, typer.Argument(metavar="TEMPLATE", show_default=False, help="A template's name; never a path.")]
_KEYS = "name, prompt, system, description, fields [name], params {name: value}, settings"


@app.command("list", cls=Command)
def list_templates(
    as_json: Annotated[
        bool,
        typer.Option("--json", help=options.json_help(f"directory, templates [{{{_KEYS}, or name and error}}]")),
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Show the templates that are here."""
    found: list[tuple[str, PromptTemplate | UsageError]] = []
    for name in prompt_template.names():
        try:
            found.append((name, prompt_template.load(name)))
        except UsageError as error:
            found.append((name, error))
    directory = prompt_template.directory()
    if as_json:
        records = [
            {"name": name, "error": str(each)} if isinstance(each, UsageError) else _record(each)
            for name, each in found
        ]
        streams.write_json({"directory": str(directory), "templates": records})
        return
    if not found:
        streams.tell(f"no templates in {directory}; localmoe templates add NAME 'Summarize: {{input}}' makes one")
        return

    from localmoe.cli.render import table

    rows = [
        (name, "", f"cannot be used: {each}")
        if isinstance(each, UsageError)
        else (name, " ".join(each.fields), each.description or each.prompt.strip().partition("\n")[0])
        for name, each in found
    ]
    streams.write(table(("TEMPLATE", "TAKES", ""), rows, ("left", "left", "left")) + "\n")


@app.command("show", cls=Command)
def show(
    name: Name,
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help(_KEYS))] = False,
    debug: options.Debug = False,
) -> None:
    """Print one template, as its file has it."""
    template = prompt_template.load(name)
    if as_json:
        streams.write_json(_record(template))
    else:
        text = config_file.text(prompt_template.path_of(name))
        streams.write(text if text.endswith("\n") else text + "\n")


@app.command("add", cls=Command)
def add(
    name: Name,
    prompt_text: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", show_default=False, help="The text, {input} in it for what run is given."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", metavar="FILE", help="Take the text from a file.")
    ] = None,
    system: options.System = None,
    description: Annotated[
        str | None, typer.Option("--description", metavar="TEXT", help="What it is for, for the list.")
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", metavar="NAME=VALUE", show_default=False, help="What {NAME} is by default."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", show_default=False, help="How to answer, as temperature=0.2 or max_tokens=99."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a template of this name.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help(_KEYS))] = False,
    debug: options.Debug = False,
) -> None:
    """Save a prompt: PROMPT, a file, or standard input.

    In it {input} stands for what run is given, {NAME} for its --param NAME=VALUE; {{NAME}} is a plain {NAME}.
    """
    path = prompt_template.path_of(name)
    if path.exists() and not force:
        raise UsageError(f"there is a template {name} already; --force replaces it")
    content: dict[str, Any] = {"prompt": _text(prompt_text, file)}
    content |= {key: value for key, value in (("system", system), ("description", description)) if value}
    content |= _settings(setting)
    params = prompt_template.parse_params(param)
    if params:
        content["params"] = params
    template = prompt_template.read(name, content, f"template {name}")
    write_whole(path, _as_toml(content))
    if as_json:
        streams.write_json(_record(template))
    else:
        takes = ", ".join(f"{{{each}}}" for each in template.fields)
        streams.tell(f"saved to {path}" + (f"; it takes {takes}" if takes else ""))


@app.command("edit", cls=Command)
def edit(name: Name, debug: options.Debug = False) -> None:
    """Open a template in $VISUAL or $EDITOR, then check it."""
    path = prompt_template.path_of(name)
    if not path.is_file():
        prompt_template.load(name)  # says what is near
    open_in_editor(path)
    prompt_template.load(name)


@app.command("rm", cls=Command)
def remove(
    name: Name,
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help("removed"))] = False,
    debug: options.Debug = False,
) -> None:
    """Delete a template."""
    path = prompt_template.path_of(name)
    if not path.is_file():
        prompt_template.load(name)  # says what is near
    try:
        path.unlink()
    except OSError as error:
        raise StorageError(f"{path}: cannot be deleted: {error.strerror}") from error
    if as_json:
        streams.write_json({"removed": str(path)})
    else:
        streams.write(f"removed {printable_line(path)}\n")


def _text(argument: str | None, file: Path | None) -> str:
    if argument is not None and file is not None:
        raise UsageError("give PROMPT or -f, not both")
    if file is not None:
        return prompt.read_file(file)
    if argument is not None:
        return prompt.argument(argument)
    if streams.is_terminal(sys.stdin):
        raise UsageError("nothing to save: give a PROMPT, a file with -f, or text on standard input")
    return prompt.decode(streams.read_input(), "standard input")


def _settings(entries: list[str] | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in entries or ():
        key, equals, value = entry.partition("=")
        if not equals or key not in SETTINGS:
            raise UsageError(f"--set: no setting {printable_line(key)!r}{suggestion(key, list(SETTINGS))}")
        known = SETTINGS[key]
        found[key] = [*found.get(key, []), value] if known.kind == "texts" else config_file.scalar(known, value)
        config_file.check_value(known, key, found[key], f"--set {key}")
    return found


def _as_toml(content: dict[str, Any]) -> str:
    lines = [f"{key} = {block(value)}" for key, value in content.items() if key != "params"]
    if "params" in content:
        lines += ["", "[params]", *(f"{key} = {literal(value)}" for key, value in content["params"].items())]
    return "\n".join(lines) + "\n"


def _record(template: PromptTemplate) -> dict[str, Any]:
    return {
        "name": template.name,
        "prompt": template.prompt,
        "system": template.system,
        "description": template.description or None,
        "fields": template.fields,
        "params": dict(template.params),
        "settings": dict(template.settings),
    }
