"""Values written the usual way, taken at once.

Typer builds a pydantic validator for each option, given or not, and pydantic's import is a quarter of what a command
waits for besides torch. So what is plainly text, a number or a path becomes here what Typer would make of it; all else,
and every mistake, is left to Typer and its words.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, get_args, get_origin

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_DECIMAL = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,15})?")


class _NotPlainError(Exception):
    """Typer's business."""


class _Plain:
    """In the place of Typer's own conversion of one option, which it calls where it has to."""

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """The value of `param` as its type says. Raises Typer's errors."""
        if value is None:
            return () if param.multiple or param.nargs == -1 else None
        kind = param.type_descriptor
        try:
            return _converted(value, kind.annotation, kind.parameter_info)
        except _NotPlainError:
            param._runtime_param = None  # then Typer makes its own
            return param.get_runtime_param().coerce(value, param=param, ctx=ctx)


def hastened(parameters: Any) -> Any:
    """The same parameters of a Typer command, which convert what is plain without pydantic from here on (in a Typer
    that works that way)."""
    for parameter in parameters:
        if getattr(parameter, "_runtime_param", False) is None and hasattr(parameter, "type_descriptor"):
            parameter._runtime_param = _Plain()
    return parameters


def _converted(value: Any, annotation: Any, info: Any) -> Any:
    """Raises _NotPlainError."""
    if info.parser is not None or info.clamp:
        raise _NotPlainError
    if get_origin(annotation) is list and isinstance(value, list | tuple):
        return [_converted(item, get_args(annotation)[0], info) for item in value]
    if annotation is str and isinstance(value, str):
        return value
    if annotation is int and type(value) is str and _INTEGER.fullmatch(value):
        return _within(int(value), info)
    if annotation is float and type(value) is str and _DECIMAL.fullmatch(value):
        return _within(float(value), info)
    if annotation in (int, float) and type(value) is annotation:
        return _within(value, info)
    if annotation is Path and isinstance(value, str | Path) and _takes_any_path(info) and _is_readable(value):
        return Path(value)
    raise _NotPlainError


def _within(value: float, info: Any) -> float:
    """As it is, when the option's bounds allow it (infinity and what is no number are Typer's)."""
    least = float("-inf") if info.min is None else info.min
    most = float("inf") if info.max is None else info.max
    if least <= value <= most and abs(value) != float("inf"):
        return value
    raise _NotPlainError


def _takes_any_path(info: Any) -> bool:
    checks = (info.exists, info.writable, info.resolve_path, info.allow_dash, info.path_type)
    return info.file_okay and info.dir_okay and not any(checks)


def _is_readable(path: str | Path) -> bool:
    """Whether nothing is there, or what may be read."""
    try:
        os.stat(path)  # noqa: PTH116  (a NUL in it is a ValueError here)
    except OSError:
        return True
    except ValueError:
        return False
    return os.access(path, os.R_OK)
