"""What the model is asked: the PROMPT argument, files, and standard input, joined in that order."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from localmoe.cli import streams
from localmoe.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def assemble(
    prompt: str | None,
    files: Sequence[Path],
    *,
    may_be_empty: bool = False,
    needed: bool = True,
    reads_input: bool = True,
) -> str:
    """The whole prompt: `prompt`, a newline, each file under its name, then standard input less one final newline.

    Standard input is read only when it is not a terminal, so nothing waits for typing that nobody announced.
    Raises UsageError when there is nothing to ask and nobody to ask for it, InputError naming the place of the
    first byte that is not UTF-8, or when everything given is empty (unless `may_be_empty`). Where no
    text is `needed`, none is missed; unless it `reads_input`, standard input is left to others.
    """
    if any(str(path) == "-" for path in files):
        raise UsageError("-f -: what is piped in is read without it; leave it out")
    interactive = not reads_input or streams.is_terminal(sys.stdin)
    if needed and prompt is None and not files and interactive:
        raise UsageError("nothing to ask: give a PROMPT, a file with -f, or text on standard input")
    parts = [] if prompt is None else [argument(prompt)]
    parts += [fenced(path) for path in files]
    if not interactive:
        piped = decode(streams.read_input(), "standard input")
        if piped:
            parts.append(piped.removesuffix("\n"))
    text = "\n".join(parts)
    if needed and not text and not (may_be_empty and prompt is not None):
        raise InputError("the prompt is empty: give a PROMPT, a file with -f, or text on standard input")
    return text


def decode(data: bytes, source: str) -> str:
    """`data` as UTF-8. Raises InputError saying where in `source` it stops being that."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} is not valid UTF-8 at byte {error.start} (0x{data[error.start]:02x}); convert it, as with iconv"
        ) from error


def read_file(path: Path) -> str:
    """The text of a file the user named. Raises InputError naming it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return decode(data, str(path))


def argument(text: str) -> str:
    """A text given as an argument. Raises InputError where it is not UTF-8."""
    # Python hides bytes that are not UTF-8 in an argument behind lone surrogates, which no tokenizer takes.
    return decode(text.encode("utf-8", "surrogateescape"), "PROMPT")


def fenced(path: Path) -> str:
    """A file's text under its name, as a code block. Raises InputError naming it."""
    text = read_file(path).removesuffix("\n")
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{path}:\n{fence}\n{text}\n{fence}"
