"""`localmoe config`: the config file read, changed and checked."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from localmoe.cli import config_file, options, streams
from localmoe.cli.command import Command, Group
from localmoe.cli.config_file import ALIAS, MODEL, TABLES, Key
from localmoe.cli.files import open_in_editor, write_whole
from localmoe.cli.sanitize import printable_line
from localmoe.cli.toml_edit import Value, literal, with_setting, without_setting
from localmoe.cli.values import near_miss, suggestion
from localmoe.errors import StorageError, UsageError

_HELP = """\
Defaults and aliases of your own, in one TOML file. Alone it lists them.

It holds `model` (where MODEL is left out) and the tables [alias] (names for models), [sampling], [options] (for every
command that has the option) and [run], [chat], [bench], [eval], [plan], [doctor] (for one). A setting comes from the
first of: a flag, a prompt template, the command's table, [options] or [sampling], and then for sampling the model's
makers, its generation_config.json, greedy. What is not known, or of the wrong type, is refused by name.
"""
_NEGATIVE = re.compile(r"-\.?\d")
app = typer.Typer(
    cls=Group,
    help=_HELP,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
Name = Annotated[
    str,
    typer.Argument(
        metavar="KEY", show_default=False, help="model, alias.NAME, sampling.temperature, options.ctx, chat.system ..."
    ),
]


@app.command("list", cls=Command)
def list_settings(
    every: Annotated[bool, typer.Option("--all", help="Also what is not set, and what it does.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help=options.json_help("path, settings {KEY: value}, with --all also known {KEY}"))
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Show what is set."""
    config = config_file.read()
    settings = dict(_flat(config.content))
    known = {name: key.what for name, key in _known()}
    if as_json:
        extra = {"known": known} if every else {}
        streams.write_json({"path": str(config.path), "settings": settings, **extra})
        return
    for name, value in settings.items():
        streams.write(printable_line(f"{name} = {literal(value)}") + "\n")
    if not settings and not every:
        streams.tell(f"nothing is set in {config.path}; localmoe config list --all shows what can be")
    if every:
        unset = {name: what for name, what in known.items() if name not in settings}
        width = max(map(len, unset))
        streams.write("".join(f"# {name:<{width}}  {what}\n" for name, what in unset.items()))


@app.command("get", cls=Command)
def get(
    name: Name,
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help("key, value"))] = False,
    debug: options.Debug = False,
) -> None:
    """Print one setting. Exit status 1 when it is not set."""
    table, key = _parts(name)
    _key(table, key)
    value = _inner(dict(config_file.read().content), table).get(key)
    if as_json:
        streams.write_json({"key": name, "value": value})
    elif value is not None:
        streams.write((value if isinstance(value, str) else literal(value)) + "\n")
    if value is None:
        raise _not_set(name)


class _TakesNumbers(Command):
    """A negative number among its words is a value, not an option. It has no options that take a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        before = args[: args.index("--")] if "--" in args else args
        given = [word for word in before if word.startswith("-") and not _NEGATIVE.match(word)]
        words = [word for word in before if word not in given] + args[len(before) + 1 :]
        return super().parse_args(ctx, [*given, "--", *words])


@app.command("set", cls=_TakesNumbers, short_help="Set one setting.")
def set_value(
    name: Name,
    value: Annotated[list[str], typer.Argument(metavar="VALUE", show_default=False, help="A list takes several.")],
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help("key, value, path"))] = False,
    debug: options.Debug = False,
) -> None:
    """Set one setting; the file's other lines and its comments stay as they are."""
    table, key = _parts(name)
    path = config_file.path()
    made = _read_value(_key(table, key), name, value)
    with _locked(path):
        new = with_setting(_settled(path), table, key, made)
        config_file.check(config_file.parse(new, path), path)
        write_whole(path, new)
    if as_json:
        streams.write_json({"key": name, "value": made, "path": str(path)})


@app.command("unset", cls=Command, short_help="Remove one setting.")
def unset(
    name: Name,
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help("key, path"))] = False,
    debug: options.Debug = False,
) -> None:
    """Remove one setting, one that is not known included. Exit status 1 when it is not set."""
    table, key = _parts(name)
    path = config_file.path()
    with _locked(path):
        text = config_file.text(path)
        is_set = key in _inner(config_file.parse(text, path), table)
        if is_set:
            write_whole(path, without_setting(text, table, key))
    if as_json:
        streams.write_json({"key": name, "path": str(path)})
    if not is_set:
        known = (table is None and key == "model") or key in TABLES.get(table or "", ())
        raise _not_set(name, "" if known or table == "alias" else _meant(table, key))


@app.command("path", cls=Command)
def path(
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help("path, exists"))] = False,
    debug: options.Debug = False,
) -> None:
    """Print where the file is, whether or not it is there."""
    where = config_file.path()
    if as_json:
        streams.write_json({"path": str(where), "exists": where.is_file()})
    else:
        streams.write(f"{where}\n")


@app.command("edit", cls=Command)
def edit(debug: options.Debug = False) -> None:
    """Open the file in $VISUAL or $EDITOR, then check it."""
    where = config_file.path()
    if not where.exists():
        write_whole(where, _FIRST)
    open_in_editor(where)
    config_file.read()


_FIRST = """\
# Defaults of localmoe; `localmoe config list --all` shows what can stand here.
# A flag on the command line comes before them.
"""


def _not_set(name: str, meant: str = "") -> typer.Exit:
    streams.tell(f"localmoe: {printable_line(name)} is not set in {config_file.path()}{meant}")
    return typer.Exit(1)


def _parts(name: str) -> tuple[str | None, str]:
    """The table and the key of a dotted name; no table for `model`."""
    table, dot, key = name.partition(".")
    return (table, key) if dot else (None, name)


def _inner(content: dict[str, Any], table: str | None) -> dict[str, Any]:
    found = content if table is None else content.get(table, {})
    return found if isinstance(found, dict) else {}


def _key(table: str | None, key: str) -> Key:
    """Raises UsageError for a name that no setting has, with what was probably meant."""
    if table is None and key == "model":
        return MODEL
    if table == "alias" and key:
        return ALIAS
    if table is not None and table in TABLES:
        return config_file.known_key(table, key, "config")
    if table is None and key in TABLES:
        raise UsageError(f"config: {key} is a table; its settings are {', '.join(_of_table(key))}")
    name = key if table is None else f"{table}.{key}"
    raise UsageError(f"config: no setting {name!r}{_meant(table, key) or '; localmoe config list --all shows them'}")


def _of_table(table: str) -> list[str]:
    return [f"{table}.{name}" for name in TABLES[table]]


def _meant(table: str | None, key: str) -> str:
    """`; did you mean NAME?` for a name that no setting has; empty where nothing is near."""
    near = None if table is None else near_miss(table, TABLES)
    named = config_file.homes(key)
    if near is not None:  # run.seed for RUN.seed
        named = [each for each in named if each.startswith(f"{near}.")] or named
    if not named and table is None:
        known = {
            spelling for keys in TABLES.values() for name, each in keys.items() for spelling in (name, each.parameter)
        }
        word = near_miss(key.replace("-", "_"), {"model", *known})
        named = [] if word is None else ["model"] if word == "model" else config_file.homes(word)
    if not named:
        return suggestion(key if table is None else f"{table}.{key}", [each for each, _ in _known()], " ").rstrip()
    return f"; did you mean {config_file.in_words(named)}?"


def _known() -> Iterator[tuple[str, Key]]:
    yield "model", MODEL
    yield "alias.NAME", ALIAS
    for table, keys in TABLES.items():
        for name, key in keys.items():
            yield f"{table}.{name}", key


def _flat(content: Any) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", each) for inner, each in value.items())
        else:
            yield name, value


def _read_value(key: Key, name: str, words: list[str]) -> Value:
    """What was typed, as the setting's own type. Raises UsageError."""
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise UsageError(f"{name}: the value is not valid UTF-8")
    if key.kind == "texts":
        made: Value = words
    elif len(words) > 1:
        raise UsageError(f"{name}: one value is needed, not {len(words)}; put one with spaces in quotation marks")
    else:
        made = config_file.scalar(key, words[0])
    config_file.check_value(key, name.rpartition(".")[2], made, name)
    return made


def _settled(path: Path) -> str:
    """The file's text; a file that is wrong is not written to, so that the first message is about what is wrong."""
    text = config_file.text(path)
    config_file.check(config_file.parse(text, path), path)
    return text


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Nobody else changes the file meanwhile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
