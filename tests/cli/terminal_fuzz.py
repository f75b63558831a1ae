"""Random byte streams for whatever draws on a terminal, and a judge of what came out. Used by test_sanitize.py and
scripts/fuzz_terminal."""

from __future__ import annotations

import codecs
import random
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator

from localmoe.cli.markdown import MarkdownView
from localmoe.cli.render import markdown_table
from localmoe.cli.row import Row
from localmoe.cli.sanitize import printable, printable_line

# The judge's own definition: letters, marks, numbers, punctuation, symbols, spaces, private and unassigned characters,
# and of the invisible ones those that join emoji and letters or belong to right-to-left scripts.
_GOOD_FORMATS = {0xAD, 0x200C, 0x200D, 0x200E, 0x200F, 0x2060, *range(0x600, 0x606), 0x61C, 0x6DD, 0x70F, 0x890, 0x891}
_GOOD_FORMATS |= {0x8E2, 0x110BD, 0x110CD, *range(0x13430, 0x13439)}


def _is_good(code: int) -> bool:
    category = unicodedata.category(chr(code))
    if category == "Cf":
        return code in _GOOD_FORMATS
    nonsense = 0xFDD0 <= code <= 0xFDEF or code & 0xFFFF >= 0xFFFE or 0xE0000 <= code < 0xE0200
    return category not in ("Cc", "Cs", "Zl", "Zp") and not nonsense


def _outside(good: set[int]) -> re.Pattern[str]:
    """Matches any character that is not good."""
    ranges, start = [], None
    for code in range(sys.maxunicode + 2):
        bad = code <= sys.maxunicode and code not in good
        if bad and start is None:
            start = code
        elif not bad and start is not None:
            ranges.append(f"\\U{start:08x}-\\U{code - 1:08x}")
            start = None
    return re.compile(f"[{''.join(ranges)}]")


_ALL_GOOD = {code for code in range(sys.maxunicode + 1) if _is_good(code)}
BAD = _outside(_ALL_GOOD | {0x09, 0x0A})
BAD_IN_A_LINE = _outside(_ALL_GOOD)
OURS = re.compile(r"\x1b\[[0-9;]*m|\r\x1b\[K")  # what the drawing itself may send: a style, the row afresh

_PIECES = [
    b"\x1b[2J", b"\x1b[31m", b"\x1b]52;c;QUFB\x07", b"\x1b]8;;http://x\x1b\\", b"\x1bP+q\x1b\\", b"\x1b", b"\x9b1m",
    b"\r", b"\r\n", b"\n", b"\n\n", b"\t", b"\x08", b"\x00", b"\x7f", b" ", b"word ", "\u202e".encode(),
    "\u2066".encode(), "\u2028".encode(), "\U000e0041".encode(), "\ufeff".encode(), b"\xed\xa0\x80", b"\xff\xfe",
    "龍".encode(), "👩\u200d👩\u200d👧".encode(), "é".encode(), b"`", b"```", b"```python\n", b"**", b"*", b"_", b"~~",
    b"# ", b"- ", b"1. ", b"> ", b"| a | b |\n", b"|---|---|\n", b"[x](http://y)", b"\\", b"<think>", b"def f():\n",
]  # fmt: skip


def stream(chosen: random.Random) -> bytes:
    """Some bytes: half of them from what terminals and Markdown care about, half at random."""
    parts = []
    for _ in range(chosen.randrange(1, 12)):
        parts.append(chosen.choice(_PIECES) if chosen.random() < 0.7 else chosen.randbytes(chosen.randrange(1, 6)))
    return b"".join(parts)


def pieces(data: bytes, chosen: random.Random) -> Iterator[str]:
    """The stream as text, cut at random places of its bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape" if chosen.random() < 0.1 else "replace")
    at = 0
    while at < len(data):
        length = chosen.randrange(1, 9)
        yield decoder.decode(data[at : at + length], final=at + length >= len(data))
        at += length


def check(shown: str, bad: re.Pattern[str] = BAD) -> None:
    """Fails when something reached the terminal that must not."""
    found = bad.search(shown)
    assert found is None, f"{found[0]!r} in {shown!r}"


Drawing = Callable[[Iterator[str], random.Random], str]
"""Shows a stream's pieces; returns everything that was written to the terminal."""


def plain(parts: Iterator[str], chosen: random.Random) -> str:
    return "".join(map(printable, parts))


def markdown(parts: Iterator[str], chosen: random.Random) -> str:
    shown: list[str] = []
    columns = chosen.choice((1, 5, 20, 40, 100))
    row = Row(shown.append, lambda: columns)
    view = MarkdownView(row, lambda lines, _: [("36", lines[-1])], markdown_table)
    for part in parts:
        view.push(part)
    view.finish()
    return "".join(shown)


DRAWINGS: list[Drawing] = [plain, markdown]


def check_streams(count: int, seed: int) -> int:
    """Run `count` streams; returns how many characters were looked at."""
    chosen = random.Random(seed)
    seen = 0
    for _ in range(count):
        data = stream(chosen)
        for draw in DRAWINGS:
            shown = draw(pieces(data, chosen), chosen)
            check(OURS.sub("", shown))
            seen += len(shown)
        check(printable_line(data.decode("utf-8", "replace")), BAD_IN_A_LINE)
    return seen
