"""An answer on the terminal of a chat: its thinking folded to one line, then the answer drawn as Markdown.

In a terminal that cannot draw (TERM=dumb), or with NO_COLOR, everything is plain text as it comes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from localmoe.cli import streams
from localmoe.cli.markdown import MarkdownView
from localmoe.cli.row import Row
from localmoe.cli.sanitize import printable, printable_line
from localmoe.cli.styled import cells, cut, width

if TYPE_CHECKING:
    from localmoe.cli.answer import Answer
    from localmoe.text import Segment

_FAINT = "2"


class AnswerView:
    """Shows the pieces of one answer; `answer` is the one being filled, for its counts."""

    def __init__(self, answer: Answer, *, show_thinking: bool) -> None:
        self._answer = answer
        self._show_thinking = show_thinking
        self._draws = streams.can_style(sys.stdout)
        self._row = Row(streams.draw, streams.columns)
        self._markdown = MarkdownView(self._row, _highlight, _table)
        self._thinks = False  # thinking is what was shown last
        self._thoughts = ""
        self._ends_line = True

    def show(self, segment: Segment) -> None:
        """Show a piece."""
        if segment.kind == "thinking":
            self._think(segment.text)
            return
        self._end_thinking()
        if self._draws:
            self._markdown.push(segment.text)
        else:
            self._write(segment.text.lstrip("\n") if self._answer.text == segment.text else segment.text)

    def finish(self) -> None:
        """The answer is over, or was stopped; the cursor stands at the beginning of a row."""
        self._end_thinking()
        if self._draws:
            self._markdown.finish()
        elif not self._ends_line:
            self._write("\n")

    def _think(self, text: str) -> None:
        first, self._thinks = not self._thinks, True
        self._thoughts += text
        if self._show_thinking:
            shown = text.lstrip("\n") if first else text
            if shown:
                streams.write(shown, faint=True)
                self._ends_line = shown.endswith("\n")
        elif self._draws:
            self._show_folded()
        elif first:
            self._write("thinking ...\n")

    def _show_folded(self) -> None:
        """One row: how long it has been thinking, and its last words."""
        head = f"thinking {self._measure()}  "
        room = self._row.room - width(head)
        last = cells([(_FAINT, printable_line(self._thoughts[-200:]))])
        while sum(cell.width for cell in last) > max(room, 0):
            del last[0]
        self._row.show(cut([*cells([(_FAINT, head)]), *last], self._row.room))

    def _end_thinking(self) -> None:
        if not self._thinks:
            return
        self._thinks = False
        summary = f"thought {self._measure()}"
        if self._draws and not self._show_thinking:
            self._row.end(cut(cells([(_FAINT, summary)]), self._row.room))
            self._row.end([])
        else:
            self._write("" if self._ends_line else "\n")
            streams.write(summary, faint=True)
            self._write("\n\n")

    def _measure(self) -> str:
        return f"{self._answer.thinking_seconds:.0f} s · {self._answer.thinking_tokens} tokens"

    def _write(self, text: str) -> None:
        if text:
            streams.write(printable(text))
            self._ends_line = text.endswith("\n")


def _highlight(lines: Sequence[str], language: str) -> list[tuple[str, str]]:
    from localmoe.cli.render import highlight

    return highlight(lines, language)


def _table(rows: Sequence[Sequence[str]], align: Sequence[str], columns: int) -> list[str]:
    from localmoe.cli.render import markdown_table

    return markdown_table(rows, align, columns)
