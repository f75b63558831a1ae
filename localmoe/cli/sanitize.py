"""What may reach a terminal: printable text, tabs and newlines. A model, a hub or a file name can hold bytes that move
the cursor, set the clipboard (OSC 52), disguise a link (OSC 8) or reverse the reading direction; without their control
characters such sequences are plain visible text.

The filter has no state, so a sequence cut in two by token boundaries cannot slip through, and an unfinished one
cannot swallow what follows it.
"""

from __future__ import annotations

import unicodedata

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_KEPT = frozenset("\n\t")
# Format characters that a script or an emoji needs: joiners, the marks of right-to-left scripts, the soft hyphen.
_KEPT_FORMATS = frozenset("\u00ad\u061c\u200c\u200d\u200e\u200f\u2060")
_ALSO_DROPPED = range(0xE0000, 0xE0200)  # tags and their variation selectors: whole sentences nobody sees
_DRAWN = ("AN", "AL", "L")  # bidi classes of those format characters that have a shape, as the Arabic number sign
_SEPARATORS = "\u2028\u2029"
_LINE_BREAKS = "\n\t\r\v\f\x85" + _SEPARATORS


class _Table(dict[int, str | None]):
    """For `str.translate`: what becomes of a character, decided when it is first met."""

    def __missing__(self, code: int) -> str | None:
        self[code] = made = self._decide(chr(code))
        return made

    def _decide(self, character: str) -> str | None:
        category = unicodedata.category(character)
        if character in _KEPT or character in _KEPT_FORMATS:
            return character
        if character in _SEPARATORS:
            return "\n"
        if category == "Cc" or ord(character) in _ALSO_DROPPED:
            return None
        if category == "Cf":
            return character if unicodedata.bidirectional(character) in _DRAWN else None
        if category == "Cs" or ord(character) & 0xFFFE == 0xFFFE or 0xFDD0 <= ord(character) <= 0xFDEF:
            return _REPLACEMENT  # half a character, or none
        return character


class _LineTable(_Table):
    def _decide(self, character: str) -> str | None:
        return " " if character in _LINE_BREAKS else super()._decide(character)


_TABLE, _LINE_TABLE = _Table(), _LineTable()


def printable(text: str) -> str:
    """`text` with every control and every hidden character but newline and tab removed; safe piece by piece, as it
    streams. Joined emoji and the marks that scripts need stay."""
    return text.translate(_TABLE)


def printable_line(text: object) -> str:
    """`text` on one line, for names, messages and table cells."""
    return str(text).translate(_LINE_TABLE)
