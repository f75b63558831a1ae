"""Progress bars and tables. The only module that imports rich, so commands import it when they need one."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from localmoe.cli import streams
from localmoe.cli.sanitize import printable_line

Advance = Callable[[int, int, str], None]
"""Told the bytes done, the bytes in total, and the name of what is being worked on."""

_PIPE_WIDTH = 10_000  # nothing is cut or wrapped for a program that reads the table
_ITEM_WIDTH = 32


@contextmanager
def progress_bar(title: str) -> Iterator[Advance]:
    """Bytes, rate and time left on standard error while the block runs; nothing when that is not a terminal."""
    if not streams.is_terminal(sys.stderr):
        yield lambda done, total, item: None
        return
    bar = Progress(
        TextColumn(printable_line(title), markup=False),
        BarColumn(bar_width=None),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[item]}", markup=False),
        console=Console(file=sys.stderr, highlight=False),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None, item="")

        def advance(done: int, total: int, item: str) -> None:
            bar.update(task, completed=done, total=total, item=_tail(printable_line(item)))

        yield advance


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: Sequence[Literal["left", "right"]]) -> str:
    """Rows under a header, as text; fitted to the terminal when standard output is one."""
    terminal = streams.is_terminal(sys.stdout)
    file = io.StringIO()
    console = Console(
        file=file,
        width=None if terminal else _PIPE_WIDTH,
        force_terminal=terminal,
        highlight=False,
        markup=False,
        emoji=False,
    )
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name, justify in zip(header, align, strict=True):
        grid.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(printable_line(cell)) for cell in row))
    console.print(grid)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _tail(name: str) -> str:
    return name if len(name) <= _ITEM_WIDTH else "…" + name[-_ITEM_WIDTH + 1 :]
