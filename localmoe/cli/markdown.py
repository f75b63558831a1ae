"""Markdown drawn while it streams. A row is final once it is full: nothing that was printed moves or wraps again.

Only the current row changes. It shows what is certain, then as much of the rest as fits: the unfinished word, an
emphasis whose end is to come, the line of code before it is coloured, the last line of a table that is drawn when it
is whole. A newline is a newline, as models mean it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from localmoe.cli.inline import inline
from localmoe.cli.row import Row
from localmoe.cli.sanitize import printable
from localmoe.cli.styled import Cell, Span, cells, cut, to_ansi, width, words, wrap

Highlight = Callable[[Sequence[str], str], list[Span]]
"""Lines of code and their language -> the spans of the last line."""
DrawTable = Callable[[Sequence[Sequence[str]], Sequence[str], int], list[str]]
"""Rows of cells (with escape sequences), alignments, columns -> the rows to print."""

_FAINT = "2"
_LONGEST_LINE = 2000  # characters of prose before a row is broken for good; no line is laid out twice at this length
_LONGEST_CODE = 500  # of a line of code that waits for its colours
_LONGEST_PREFIX = 12
_FENCE = re.compile(r"(\s*)(`{3,}|~{3,})\s*([^`]*)$")
_HEADING = re.compile(r"\s{0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$")
_RULE = re.compile(r"\s*(?:(?:-\s*){3,}|(?:\*\s*){3,}|(?:_\s*){3,})$")
_QUOTE = re.compile(r"\s*((?:>\s?)+)")
_ITEM = re.compile(r"(\s*)([-*+]|\d{1,9}[.)])(\s+)(?=\S)")
_DELIMITERS = re.compile(r"\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$")
_UNDECIDED = re.compile(
    r"\s*(#{1,6}\s*|[-*+_]{1,2}\s*|[-*_](\s*[-*_])*\s*|\d{1,9}[.)]?\s*|`{1,2}|~{1,2}|(`{3}|~{3}).*|>)?"
)


@dataclass
class _Fence:
    """A code block that is open."""

    mark: str
    indent: int
    language: str
    lines: list[str] = field(default_factory=list)
    running: bool = False  # the current line is too long to wait for its end

    def closes(self, line: str) -> bool:
        text = line.strip()
        return len(text) >= len(self.mark) and set(text) == {self.mark[0]}


class MarkdownView:
    """Draws an answer, a piece at a time."""

    def __init__(self, row: Row, highlight: Highlight, draw_table: DrawTable) -> None:
        self._row = row
        self._highlight = highlight
        self._draw_table = draw_table
        self._line = ""  # the line of the source that is not finished
        self._drawn = 0  # cells of it that stand in finished rows
        self._continues = ""  # the indent of a line that was too long to keep
        self._fence: _Fence | None = None
        self._table: list[str] = []
        self._blank = True  # nothing but white space came so far

    def push(self, text: str) -> None:
        """Draw more of the answer."""
        *whole, rest = printable(text).split("\n")
        for part in whole:
            self._line += part
            self._end_line()
        self._line += rest
        self._show_open_line()

    def finish(self) -> None:
        """No more text comes: what waited is drawn as it is, and the cursor stands at the beginning of a row."""
        if self._line or self._drawn:
            self._end_line()
        self._end_table()
        self._fence = None
        self._blank = True

    def _end_line(self) -> None:
        line, self._line = self._line, ""
        if self._fence is not None:
            self._end_code_line(self._fence, line)
        elif self._is_table_line(line):
            self._table.append(line)
        else:
            self._end_table()
            self._end_plain_line(line)
        self._drawn, self._continues = 0, ""

    def _end_plain_line(self, line: str) -> None:
        fence = _FENCE.match(line)
        if fence and not self._continues:
            self._fence = _Fence(fence[2], len(fence[1]), (fence[3].split() or [""])[0])
            self._row.end(cells([(_FAINT, line.rstrip())]))
        elif line.strip():
            self._draw_prose(line, final=True)
        elif not self._blank:
            self._row.end([])
        self._blank = self._blank and not line.strip()

    def _show_open_line(self) -> None:
        if self._fence is not None:
            self._show_code(self._fence)
        elif self._is_table_line(self._line):
            self._show_raw(self._line)
        elif self._table and _UNDECIDED.fullmatch(self._line):
            return  # the table's last line stays in view until it is known that the table is over
        elif self._line.strip():
            self._end_table()
            if not self._continues and _UNDECIDED.fullmatch(self._line):
                self._show_raw(self._line)
            else:
                self._draw_prose(self._line, final=False)

    def _show_raw(self, line: str) -> None:
        self._row.show(cut(cells([(_FAINT, line)]), self._row.room))

    # Prose: a paragraph's line, a heading, an item of a list, a quotation

    def _draw_prose(self, line: str, *, final: bool) -> None:
        if final and not self._continues and _RULE.match(line):
            self._row.end(cells([(_FAINT, "─" * min(self._row.room, 40))]))
            return
        first, rest, style, text = self._parts(line)
        spans, waiting = inline(text, final=final, style=style)
        settled = cells(spans)
        content = settled + cells([(style, waiting)])
        lead = cells(rest if self._drawn else first)
        hang = cells(rest)
        room = self._row.room
        if sum(cell.width for cell in hang) > room - 8:
            lead, hang = ([] if self._drawn else cut(lead, room - 1)), []
        rows = wrap(
            content[self._drawn :], room - sum(cell.width for cell in lead), room - sum(cell.width for cell in hang)
        )
        rows = [(start + self._drawn, end + self._drawn) for start, end in rows]
        certain = len(content) if final else self._certain(content, len(settled), bool(waiting))
        for (start, end), (next_start, _) in pairwise(rows):
            if next_start > certain or (waiting and next_start == certain):  # what waits may get shorter
                break
            self._row.end([*lead, *content[start:end]])
            lead, self._drawn = hang, next_start
        start, end = next(row for row in rows if row[0] >= self._drawn or row == rows[-1])
        if final:
            self._row.end([*lead, *content[start:end]])
        else:
            self._row.show([*lead, *content[start:end]])
            self._keep_short(rest, end)

    def _certain(self, content: Sequence[Cell], settled: int, waits: bool) -> int:
        """The first cell that may still move to another row: the unfinished word's, or that before the held text."""
        found = words(content)
        at = settled if waits else settled - 1
        begin = next((start for start, end in found if start <= at < end), settled)
        length = sum(cell.width for cell in content[begin:settled])
        return begin if length <= self._row.room // 2 else max(settled - 1, 0)

    def _keep_short(self, rest: Sequence[Span], end: int) -> None:
        """Break a line that has grown too long for laying it out again and again."""
        space = self._line.rfind(" ") if len(self._line) > _LONGEST_LINE else -1
        if space <= 0:
            return
        indent = "".join(text for _, text in rest)
        line, self._line = self._line[:space], self._line[space + 1 :]
        self._draw_prose(line, final=True)
        self._drawn, self._continues = 0, indent or " "

    def _parts(self, line: str) -> tuple[list[Span], list[Span], str, str]:
        """What stands before the first row and before the others, the style, and the text itself."""
        if self._continues:
            lead = [(_FAINT, self._continues)] if self._continues.strip() else [("", self._continues.rstrip("\n"))]
            lead = [] if self._continues == " " else lead
            return lead, lead, "", line.rstrip()
        before: list[Span] = []
        if quote := _QUOTE.match(line):
            before = [(_FAINT, "│ " * quote[1].count(">"))]
            line = line[quote.end() :]
        if heading := _HEADING.match(line):
            return before, before, "1;4" if len(heading[1]) == 1 else "1", heading[2]
        if item := _ITEM.match(line):
            sign = "•" if item[2] in "-*+" else item[2]
            indent = item[1].expandtabs(4)[:_LONGEST_PREFIX]
            first = f"{indent}{sign} "
            return [*before, ("", first)], [*before, ("", " " * width(first))], "", line[item.end() :].rstrip()
        text = line.lstrip()
        indent = line[: len(line) - len(text)].expandtabs(4)[:_LONGEST_PREFIX]
        lead = [*before, ("", indent)] if indent else before
        return lead, lead, "", text.rstrip() if text.endswith("  ") else text

    # Code

    def _show_code(self, fence: _Fence) -> None:
        if fence.running:
            self._row.add(cells([("", self._line)]))
            self._line = ""
        elif len(self._line) > _LONGEST_CODE:
            self._row.show([])
            self._row.add(cells([("", self._line)]))
            fence.lines.append(self._line)
            fence.running, self._line = True, ""
        elif self._line:
            self._row.show(cut(cells([("", self._line.expandtabs(8))]), self._row.room))

    def _end_code_line(self, fence: _Fence, line: str) -> None:
        if fence.running:
            self._row.add(cells([("", line)]))
            self._row.end_added()
            fence.running = False
        elif fence.closes(line):
            self._row.end(cells([(_FAINT, line.rstrip())]))
            self._fence = None
        else:
            blank = len(line) - len(line.lstrip(" "))
            fence.lines.append(line[min(blank, fence.indent) :])
            spans = [("", line[: min(blank, fence.indent)]), *self._highlight(fence.lines, fence.language)]
            self._row.end(cells((style, text.expandtabs(8)) for style, text in spans))

    # Tables

    def _is_table_line(self, line: str) -> bool:
        """Whether this goes on with a table, or may begin one."""
        if not line.lstrip().startswith("|") or self._continues:
            return False
        return len(self._table) != 1 or _UNDECIDED_DELIMITERS.fullmatch(line) is not None

    def _end_table(self) -> None:
        """Draw the table that was gathered, or its lines where it was none."""
        lines, self._table = self._table, []
        if not lines:
            return
        self._blank = False
        open_line, self._line, self._drawn = self._line, "", 0
        if len(lines) > 1 and _DELIMITERS.match(lines[1]):
            aligns = [_alignment(cell) for cell in _split(lines[1])]
            rows = [[to_ansi(cells(inline(text, final=True)[0])) for text in _split(line)] for line in lines]
            self._row.show([])
            for text in self._draw_table([rows[0], *rows[2:]], aligns, self._row.room):
                self._row.end([Cell("", text, 0)])
        else:
            for line in lines:
                self._draw_prose(line, final=True)
                self._drawn = 0
        self._line = open_line


_UNDECIDED_DELIMITERS = re.compile(r"[\s|:-]*")


def _split(line: str) -> list[str]:
    """The cells of a table's line."""
    inner = line.strip().removeprefix("|")
    inner = inner.removesuffix("|") if not inner.endswith("\\|") else inner
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", inner)]


def _alignment(cell: str) -> str:
    if cell.endswith(":"):
        return "center" if cell.startswith(":") else "right"
    return "left"
