"""Progress bars and tables. The only module that imports rich, so commands import it when they need one."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.color import ColorSystem
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from localmoe.cli import streams, units
from localmoe.cli.sanitize import printable_line


class Advance(Protocol):
    """Told how much is done, how much there is in total, the name of what is being worked on and, where a bar has
    several stages, the title of the one that it is in."""

    def __call__(self, done: int, total: int, item: str, title: str = "") -> None: ...


class _RateColumn(ProgressColumn):
    """Bytes a second, in the units of the amounts beside them."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed or (task.elapsed or 0.0) < 1:  # at first it is that of what was here already
            return Text("")
        return Text(f"{units.size(int(speed))}/s", style="progress.data.speed")


_PIPE_WIDTH = 10_000  # nothing is cut or wrapped for a program that reads the table
_SHORTEST_ITEM = 12
_FIXED = len("quantize  123.4/567.8 GiB 1:23:45")  # what stands beside the bar ...
_FIXED_WIDE = _FIXED + len(" 1.23 GiB/s ")  # ... and the item
_WIDE = 60  # columns; in fewer there are no rate and no item
_LONGEST_CODE = 400  # lines of a block that are coloured; each is coloured in the light of all before it
_LONGEST_LINE = 500


@contextmanager
def progress_bar(title: str, *, counts: Literal["bytes", "tokens", "lines"] = "bytes") -> Iterator[Advance]:
    """What is done and the time left, for bytes the rate too, on standard error while the block runs; nothing when
    that is not a terminal."""
    if not streams.is_terminal(sys.stderr):
        yield lambda done, total, item, title="": None
        return
    console = Console(file=sys.stderr, highlight=False)
    console.width -= 4  # for the ^C that a terminal adds; in a full line it would begin another, which stays there
    one_line = Column(no_wrap=True)
    wide = console.width >= _WIDE
    rest = console.width - (_FIXED_WIDE + _SHORTEST_ITEM + 2 if wide else _FIXED)
    bar_width = max(3, min(24, rest))
    item_width = console.width - bar_width - _FIXED_WIDE
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False, table_column=one_line),
        BarColumn(bar_width, table_column=Column(min_width=bar_width, no_wrap=True)),
    ]
    if counts == "bytes":
        columns.append(DownloadColumn(binary_units=True, table_column=one_line))
        if wide:
            columns.append(_RateColumn(Column(min_width=len("1.23 GiB/s"), no_wrap=True, justify="right")))
    else:
        columns.append(MofNCompleteColumn(table_column=one_line))
    columns.append(TimeRemainingColumn(table_column=one_line))
    if wide:
        columns.append(TextColumn("{task.fields[item]}", markup=False, table_column=one_line))
    bar = Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=False,  # which may be a pipe, and no business of the bar's
    )
    with bar:
        task = bar.add_task(printable_line(title), total=None, item="")

        def advance(done: int, total: int, item: str, title: str = title) -> None:
            shown = _tail(printable_line(item), item_width)
            bar.update(task, description=printable_line(title), completed=done, total=total or None, item=shown)

        yield advance


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: Sequence[Literal["left", "right"]]) -> str:
    """Rows under a header, as text. On a terminal the last column wraps to fit, so that lines can be copied whole."""
    file = io.StringIO()
    console = Console(
        file=file, width=_table_width([header, *rows]), color_system=None, highlight=False, markup=False, emoji=False
    )
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, (name, justify) in enumerate(zip(header, align, strict=True), start=1):
        grid.add_column(name, justify=justify, overflow="fold", no_wrap=number < len(header))
    for row in rows:
        grid.add_row(*(Text(printable_line(cell)) for cell in row))
    console.print(grid)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def markdown_table(rows: Sequence[Sequence[str]], align: Sequence[str], columns: int) -> list[str]:
    """Rows of sanitized cells, which may hold escape sequences of ours, drawn as a table of at most `columns`."""
    file = io.StringIO()
    console = Console(file=file, width=columns, force_terminal=True, color_system="standard", highlight=False)
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, name in enumerate(rows[0]):
        justify = {"right": "right", "center": "center"}.get(align[number] if number < len(align) else "", "left")
        grid.add_column(Text.from_ansi(name), justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows[1:]:
        grid.add_row(*map(Text.from_ansi, row[: len(rows[0])]))
    console.print(grid)
    return file.getvalue().rstrip("\n").split("\n")


def highlight(lines: Sequence[str], language: str) -> list[tuple[str, str]]:
    """The last of these lines of code, as (SGR numbers, text); plain where the language is not known."""
    from rich.syntax import Syntax

    if not language or len(lines) > _LONGEST_CODE or max(map(len, lines)) > _LONGEST_LINE or not lines[-1].strip():
        return [("", lines[-1])]
    coloured = Syntax("", language, theme="ansi_dark").highlight("\n".join(lines))
    last = coloured.split("\n", allow_blank=True)[len(lines) - 1]
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    spans = []
    for text, style, _ in last.render(console):
        code = style.render("x", color_system=ColorSystem.STANDARD) if style else "x"
        spans.append((code[2 : code.index("m")] if code.startswith("\x1b[") else "", text))
    return spans


def _table_width(rows: Sequence[Sequence[str]]) -> int:
    """The terminal's width, or what it takes to cut no number and leave the last column room for some words."""
    if not streams.is_terminal(sys.stdout):
        return _PIPE_WIDTH
    widths = [max(map(cell_len, column)) + 2 for column in zip(*rows, strict=True)]
    return max(shutil.get_terminal_size().columns, sum(widths[:-1]) + min(widths[-1], 24))


def _tail(name: str, width: int) -> str:
    """The end of a name, which tells tensors apart; nothing where there is no room to tell."""
    if len(name) <= width:
        return name
    return "…" + name[-width + 1 :] if width >= _SHORTEST_ITEM else ""
