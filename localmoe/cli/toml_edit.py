"""One setting of a TOML file changed, everything else in it left as its owner wrote it, comments included.

Python reads TOML and does not write it. So this edits the setting's own lines, then reads the result: unless that
differs from the old content by exactly this setting, nothing is changed and the owner is told to do it.
"""

from __future__ import annotations

import io
import json
import re
import tomllib
from typing import Any

from localmoe.errors import UsageError

Value = str | int | float | bool | list[str]
_HEADER = re.compile(r"\s*\[")
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def with_setting(text: str, table: str | None, key: str, value: Value) -> str:
    """`text` with `key` of `table` (None: above all tables) set. Raises UsageError where that takes a person."""
    expected: dict[str, Any] = tomllib.loads(text)
    (expected if table is None else expected.setdefault(table, {}))[key] = value
    end = "\r\n" if "\r\n" in text else "\n"
    lines = _lines(text)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += end
    line = f"{_key(key)} = {literal(value)}"
    start, stop = _section(lines, table)
    found = _setting(lines, start, stop, key)
    if found is not None:
        first, last, indent, comment = found
        lines[first:last] = [f"{indent}{line}{comment}{end}"]
    elif start is None:
        lines += [end] if lines and lines[-1].strip() else []
        lines += [f"[{table}]{end}", f"{line}{end}"]
    else:
        place = _after_settings(lines, start, stop)
        gap = [end] if table is None and place < len(lines) and lines[place].strip() else []
        lines[place:place] = [f"{line}{end}", *gap]
    return _checked("".join(lines), expected, table, key)


def without_setting(text: str, table: str | None, key: str) -> str:
    """`text` without `key` of `table`, which is there. Raises UsageError where that takes a person."""
    expected: dict[str, Any] = tomllib.loads(text)
    inner: dict[str, Any] = expected if table is None else expected[table]
    del inner[key]
    lines = _lines(text)
    found = _setting(lines, *_section(lines, table), key)
    if found is not None:
        del lines[found[0] : found[1]]
    return _checked("".join(lines), expected, table, key)


def literal(value: Value) -> str:
    """`value` as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    # A JSON string is a TOML string, but for DEL, which JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)


def block(value: Value) -> str:
    """The same, a text of several lines as people write it where that reads back as it was."""
    if isinstance(value, str) and "\n" in value:
        escaped = value.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
        made = f'"""\n{escaped}"""'
        if _parses(f"x = {made}\n") and tomllib.loads(f"x = {made}\n")["x"] == value:
            return made
    return literal(value)


def _lines(text: str) -> list[str]:
    """The lines with their ends; TOML knows no other line break than the newline."""
    return io.StringIO(text, newline="\n").readlines()


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else literal(name)


def _pattern(name: str) -> str:
    """A key as it may be written: bare, or in either kind of quotation marks."""
    return rf"""(?:{re.escape(name)}|"{re.escape(name)}"|'{re.escape(name)}')"""


def _section(lines: list[str], table: str | None) -> tuple[int | None, int]:
    """The lines of a table, its header left out; (None, ...) where it has none of its own."""
    start: int | None = 0
    if table is not None:
        header = re.compile(rf"\s*\[\s*{_pattern(table)}\s*\]\s*(?:#.*)?")
        start = next((number + 1 for number, line in enumerate(lines) if header.fullmatch(line.rstrip("\r\n"))), None)
    if start is None:
        return None, len(lines)
    return start, next((n for n in range(start, len(lines)) if _HEADER.match(lines[n])), len(lines))


def _setting(lines: list[str], start: int | None, stop: int, key: str) -> tuple[int, int, str, str] | None:
    """The lines of a setting (first, after the last), what it is indented by, and the comment that ends it."""
    begins = re.compile(rf"(\s*){_pattern(key)}\s*=")
    for first in range(start or 0, stop if start is not None else 0):
        match = begins.match(lines[first])
        if match is None:
            continue
        for last in range(first + 1, len(lines) + 1):  # a list or a text may go over several lines
            if _parses("".join(lines[first:last])):
                return first, last, match[1], _comment(lines[first:last])
    return None


def _comment(lines: list[str]) -> str:
    """The comment behind a setting's value, with the white space before it."""
    text = "".join(lines).rstrip("\r\n")
    for place in [match.start() for match in re.finditer(r"\s*#", text)]:
        if "\n" not in text[place:] and _parses(text[:place]):
            return text[place:]
    return ""


def _parses(text: str) -> bool:
    try:
        tomllib.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _after_settings(lines: list[str], start: int, stop: int) -> int:
    """Where a table's next setting goes: behind the last one, before blank lines and what may be said of the next."""
    return max(
        (n + 1 for n in range(start, stop) if lines[n].strip() and not lines[n].lstrip().startswith("#")), default=start
    )


def _checked(text: str, expected: dict[str, Any], table: str | None, key: str) -> str:
    name = key if table is None else f"{table}.{key}"
    try:
        if tomllib.loads(text) == expected:
            return text
    except ValueError:
        pass
    raise UsageError(f"{name} stands in the file in a form that only a person can edit; localmoe config edit opens it")
