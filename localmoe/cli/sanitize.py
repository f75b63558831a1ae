"""What may reach a terminal. A model, a hub or a file name can hold bytes that move the cursor, set the clipboard
or reverse the reading direction; without their control characters such sequences are plain visible text.

The filter has no state, so a sequence cut in two by token boundaries cannot slip through, and an unfinished one
cannot swallow what follows it.
"""

from __future__ import annotations

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_KEPT = "\n\t"

_DROPPED = [
    *(code for code in range(0x20) if chr(code) not in _KEPT),  # C0: escape, carriage return, bell, backspace
    0x7F,
    *range(0x80, 0xA0),  # C1: the one-character forms of escape sequences
    *range(0x202A, 0x202F),  # bidi embeddings and overrides
    *range(0x2066, 0x206A),  # bidi isolates
    *range(0xFFF9, 0xFFFC),  # interlinear annotations, which hide text
]
_TABLE: dict[int, str | None] = dict.fromkeys(_DROPPED) | dict.fromkeys(range(0xD800, 0xE000), _REPLACEMENT)
_LINE_TABLE = _TABLE | {ord(character): " " for character in "\n\t\r\v\f\x85\u2028\u2029"}


def printable(text: str) -> str:
    """`text` with every control character but newline and tab removed; safe piece by piece, as it streams."""
    return text.translate(_TABLE)


def printable_line(text: object) -> str:
    """`text` on one line, for names, messages and table cells."""
    return str(text).translate(_LINE_TABLE)
