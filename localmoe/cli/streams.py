"""Standard input, output and error: who is at the other end, and what to do when they go away."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import signal
import sys
import termios
from typing import TYPE_CHECKING, Any

from localmoe.cli.sanitize import printable
from localmoe.errors import InputError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

_JOINED = "\ufdd0"  # a noncharacter: it stands for a space that is no place to break a line


def prepare() -> None:
    """Make the three streams safe to use. Raises StorageError when standard output is closed.

    A closed descriptor 0, 1 or 2 would be given to the next file that anything opens, so each gets /dev/null.
    Text that a stream's encoding cannot hold is replaced, never a UnicodeEncodeError half-way through an answer.
    """
    for descriptor, stream in ((0, sys.stdin), (1, sys.stdout), (2, sys.stderr)):
        if stream is None:
            try:
                os.fstat(descriptor)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, which is this one
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(encoding=None if output.isatty() else "utf-8", errors="replace")
    if sys.stdout is None:
        raise StorageError("standard output is closed; send it to /dev/null when the answer is not wanted")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person sees `stream` (or types into it)."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed from Python
        return False


def can_style(stream: TextIO | None) -> bool:
    """Whether `stream` is a terminal that understands escape sequences and wants colour (NO_COLOR, TERM=dumb)."""
    return is_terminal(stream) and os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")


def columns(stream: TextIO | None = None) -> int:
    """The width of the terminal at `stream`, by default standard output, as it is now."""
    try:
        return os.get_terminal_size((sys.stdout if stream is None else stream).fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def write(text: str, *, faint: bool = False) -> None:
    """Write to standard output at once: sanitized for a terminal, unchanged for a pipe.

    Raises BrokenPipeError when the reader is gone, StorageError for every other failure (a full disk).
    """
    if is_terminal(sys.stdout):
        text = dim(printable(text), sys.stdout) if faint else printable(text)
    draw(text)


def draw(text: str) -> None:
    """Write to standard output as it is: for text that was sanitized before escape sequences were put around it.

    Raises as `write` does.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError(
            f"standard output cannot be written: {error.strerror}; free space or send it elsewhere"
        ) from error


def write_json(value: dict[str, Any]) -> None:
    """Write one JSON object and a newline. What JSON lacks (infinity, not a number) becomes null."""
    text = json.dumps(_finite(value), ensure_ascii=is_terminal(sys.stdout), allow_nan=False)
    write(text + "\n")


def tell(text: str, *, end: str = "\n", faint: bool = False) -> None:
    """Write to standard error. Nobody there to read it is no failure."""
    if is_terminal(sys.stderr):
        text = dim(printable(text), sys.stderr) if faint else printable(text)
    _raw(text + end)


def in_words(line: str, *, indent: int = 0) -> str:
    """A line for `tell`: where a terminal would break it, broken between words, what follows `indent` columns in.
    Paths and `commands in backquotes` stay whole, to be copied."""
    if not is_terminal(sys.stderr) or len(line) <= columns(sys.stderr):
        return line
    import textwrap

    whole = re.sub("`[^`]*`", lambda found: found[0].replace(" ", _JOINED), line)
    lines = textwrap.wrap(
        whole,
        columns(sys.stderr),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines).replace(_JOINED, " ")


def remark(text: str) -> None:
    """Write a line to standard error if a person is watching it: progress and statistics."""
    if is_terminal(sys.stderr):
        tell(text, faint=True)


def passing_remark(text: str) -> None:
    """Show `text` on the last line of the terminal until the next one; an empty `text` removes it."""
    if can_style(sys.stderr):  # without wrapping at the margin: of two lines the first would stay
        _raw(f"\r\x1b[K\x1b[?7l{dim(printable(text), sys.stderr)}\x1b[?7h" if text else "\r\x1b[K")


def dim(text: str, stream: TextIO | None) -> str:
    """`text` in faint print where `stream` can show it."""
    return f"\x1b[2m{text}\x1b[0m" if text and can_style(stream) else text


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
    """Let SIGHUP (the terminal was closed) and SIGTERM raise SystemExit, with the status a shell would see, so that
    what is not yet on disk can be put there. For the main thread."""

    def leave(number: int, _: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # a second one must not interrupt what the first one began
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, leave)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def no_echo() -> Iterator[None]:
    """Keep what is typed, Ctrl-C's ^C too, from being drawn into what is being shown; it waits for the next prompt."""
    try:
        before = termios.tcgetattr(sys.stdin)
    except (termios.error, OSError, ValueError, TypeError):  # no terminal
        yield
        return
    changed = [*before]
    changed[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def silence_output() -> None:
    """Point standard output at /dev/null: what is still buffered must not fail again when Python exits."""
    _silence(sys.stdout)


def read_input() -> bytes:
    """All of standard input, empty when it is closed. Raises InputError when it cannot be read."""
    if sys.stdin is None:
        return b""
    try:
        data = sys.stdin.buffer.read()
    except (OSError, ValueError) as error:
        raise InputError(f"standard input cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return data or b""


def _raw(text: str) -> None:
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        _silence(sys.stderr)


def _silence(stream: TextIO | None) -> None:
    if stream is None:
        return
    try:
        descriptor = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
    except (OSError, ValueError):
        return
    os.dup2(null, descriptor)
    os.close(null)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
