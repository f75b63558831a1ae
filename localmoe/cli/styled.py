"""Styled text measured in terminal cells and broken into rows. Pure: nothing here writes.

A span is (style, text), the style being the numbers of an SGR sequence: "1" bold, "2" faint, "1;36" bold cyan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from prompt_toolkit.utils import get_cwidth

Span = tuple[str, str]

_JOINER, _EMOJI_STYLE = "\u200d", "\ufe0f"
_NO_ROW_BEGINS_WITH = frozenset("，。！？、；：）」』】》〉”’…")


@dataclass(frozen=True)
class Cell:
    """What is drawn together: a character with its accents, or a whole joined emoji. `width` is never less than what a
    terminal draws: some show the parts of a joined emoji side by side."""

    style: str
    text: str
    width: int

    @property
    def is_space(self) -> bool:
        return self.text == " "

    @property
    def is_wide(self) -> bool:
        return self.width >= 2


def cells(spans: Iterable[Span]) -> list[Cell]:
    """The spans cut into cells; a tab becomes a space."""
    found: list[Cell] = []
    for style, text in spans:
        start = len(found)
        for character in text:
            if len(found) > start and _joins(found[-1].text, character):
                before = found[-1]
                found[-1] = Cell(style, before.text + character, before.width + _width(character))
            else:
                shown = " " if character == "\t" else character
                found.append(Cell(style, shown, _width(shown)))
    return found


def width(text: str) -> int:
    """Terminal cells that `text` takes."""
    return sum(cell.width for cell in cells([("", text)]))


def cut(row: Sequence[Cell], columns: int) -> list[Cell]:
    """As many cells of the row as fit."""
    kept, used = [], 0
    for cell in row:
        used += cell.width
        if used > columns:
            break
        kept.append(cell)
    return kept


def to_ansi(row: Iterable[Cell]) -> str:
    """The text with its styles as escape sequences, each closed again."""
    parts = []
    for style, group in groupby(row, key=lambda cell: cell.style):
        text = "".join(cell.text for cell in group)
        parts.append(f"\x1b[{style}m{text}\x1b[0m" if style else text)
    return "".join(parts)


def wrap(line: Sequence[Cell], first: int, rest: int) -> list[tuple[int, int]]:
    """Where rows begin and end when the first row has `first` cells of room and the others `rest`.

    Rows break at spaces, which no row begins or ends with, and beside wide characters; a word longer than a row is
    broken where the row ends. Appending to `line` changes no row but the last, and moves at most its last word on.
    """
    rows: list[tuple[int, int]] = []
    start: int | None = None
    end = used = 0
    room = max(first, 1)
    for word_start, word_end in words(line):
        gap = 0 if start is None else sum(cell.width for cell in line[end:word_start])
        length = sum(cell.width for cell in line[word_start:word_end])
        if start is not None and used + gap + length > room:
            rows.append((start, end))
            start, used, gap, room = None, 0, 0, max(rest, 1)
        start = word_start if start is None else start
        used += gap
        for index in range(word_start, word_end):
            if used + line[index].width > room and index > start:
                rows.append((start, index))
                start, used, room = index, 0, max(rest, 1)
            used += line[index].width
        end = word_end
    rows.append((start or 0, end))
    return rows


def words(line: Sequence[Cell]) -> list[tuple[int, int]]:
    """Begin and end of every run of cells that stays on one row if it can."""
    found: list[tuple[int, int]] = []
    start: int | None = None
    for index, cell in enumerate(line):
        if cell.is_space:
            if start is not None:
                found.append((start, index))
            start = None
        elif start is None:
            start = index
        elif (cell.is_wide or line[index - 1].is_wide) and cell.text not in _NO_ROW_BEGINS_WITH:
            found.append((start, index))
            start = index
    if start is not None:
        found.append((start, len(line)))
    return found


def _width(character: str) -> int:
    return 1 if character == _EMOJI_STYLE else get_cwidth(character)


def _joins(before: str, character: str) -> bool:
    """Whether `character` belongs to the cell that ends in `before`."""
    if before.endswith(_JOINER) or character == _EMOJI_STYLE or "\U0001f3fb" <= character <= "\U0001f3ff":
        return before != " "
    if _is_regional(character) and len(before) == 1 and _is_regional(before):
        return True
    return get_cwidth(character) == 0 and character != "\t"


def _is_regional(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"
