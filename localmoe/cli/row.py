"""The row of the terminal that the cursor is in: added to where it can be, else drawn afresh; what is above stays as
it is. So nothing flickers, and a terminal that was scrolled or resized shows no wreck."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from localmoe.cli.styled import Cell, to_ansi

AFRESH = "\r\x1b[K"


class Row:
    """Draws one row after another through `write`; `columns` tells the terminal's width at the moment."""

    def __init__(self, write: Callable[[str], None], columns: Callable[[], int]) -> None:
        self._write = write
        self._columns = columns
        self._shown: list[Cell] = []

    @property
    def room(self) -> int:
        """Cells to draw in: one less than there are, since some terminals wrap as soon as a row is full."""
        return max(self._columns() - 1, 1)

    @property
    def is_empty(self) -> bool:
        return not self._shown

    def show(self, row: Sequence[Cell]) -> None:
        """Make the current row look like this; it must fit `room`."""
        text = self._change(row)
        if text:
            self._write(text)

    def end(self, row: Sequence[Cell]) -> None:
        """The same, and go on to the next row. Here `row` may be longer than the terminal is wide."""
        self._write(self._change(row) + "\n")
        self._shown = []

    def add(self, row: Sequence[Cell]) -> None:
        """Write on after what is there, however long that gets; to be ended with `end_added`."""
        self._write(to_ansi(row))

    def end_added(self) -> None:
        """End a row that was added to."""
        self._write("\n")
        self._shown = []

    def _change(self, row: Sequence[Cell]) -> str:
        """What to write to turn what is shown into `row`."""
        shown, self._shown = self._shown, list(row)
        if self._shown[: len(shown)] == shown:
            return to_ansi(self._shown[len(shown) :])
        if sum(cell.width for cell in shown) > self._columns():
            return "\n" + to_ansi(row)  # the terminal got narrower and has broken the row: leave it
        return AFRESH + to_ansi(row)
