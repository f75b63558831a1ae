"""One place that turns whatever went wrong into a line, a kind and an exit status."""

from __future__ import annotations

import errno
from dataclasses import dataclass

import typer

from localmoe.cli.sanitize import printable_line
from localmoe.cli.values import near_miss
from localmoe.errors import LocalMoeError

INTERRUPTED = 130
READER_GONE = 141


@dataclass(frozen=True)
class Failure:
    """What a failed command reports: `kind` is stable, `message` is one line."""

    kind: str
    message: str
    exit_code: int


def describe(error: BaseException) -> Failure:
    """The report for `error`, whatever it is."""
    if isinstance(error, LocalMoeError):
        return Failure(error.kind, _line(error), error.exit_code)
    if isinstance(error, typer.TyperException):
        return _wrong_usage(error)
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):  # a command that can go on later says so in it
        return Failure("interrupted", _line(error) or "interrupted", INTERRUPTED)
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch raises RuntimeError
        return Failure("memory", "not enough memory; close other programs, or try a smaller model or --ctx", 1)
    if isinstance(error, OSError):
        return Failure("storage", _storage(error), 1)
    name = type(error).__name__
    detail = _line(error)
    return Failure("internal", f"{name}: {detail}" if detail else name, 1)


def hint(failure: Failure) -> str:
    """What to add for the person at the terminal: an internal failure is ours to explain."""
    return " (not a failure we foresaw; --debug shows where it happened)" if failure.kind == "internal" else ""


def _wrong_usage(error: typer.TyperException) -> Failure:
    message = printable_line(error.format_message()).rstrip(".")
    context = getattr(error, "ctx", None)
    option = getattr(error, "option_name", None)
    if hasattr(error, "possibilities") and isinstance(option, str) and context is not None:
        message = f"No such option: {printable_line(option)}"
        known = [o for each in context.command.params for o in (*each.opts, *each.secondary_opts)]
        near = near_miss(option, [*known, "--help"])
        message += f". Did you mean {near}?" if near else ""
    if context is not None and "unexpected extra argument" in message and "prompt_text" in context.params:
        message += "; put a PROMPT of several words in quotation marks"
    where = context.command_path if context is not None else "localmoe"
    stop = "" if message.endswith("?") else "."
    return Failure("usage", f"{message}{stop} See {where} --help", error.exit_code)


def _storage(error: OSError) -> str:
    reason = error.strerror or str(error)
    place = f"{error.filename}: " if error.filename is not None else ""
    advice = {
        errno.ENOSPC: "; free some space, then run the same command again",
        errno.EDQUOT: "; your disk quota is used up",
        errno.EACCES: "; check who owns it",
        errno.EROFS: "; choose a place that can be written",
    }.get(error.errno or 0, "")
    return printable_line(f"{place}{reason}{advice}")


def _line(error: BaseException) -> str:
    return printable_line(str(error)).strip()
