"""Nothing but printable text, tabs and newlines reaches a terminal."""

from __future__ import annotations

import random
import unicodedata

from localmoe.cli.sanitize import printable, printable_line


def test_what_it_removes():
    assert printable("\x1b]52;c;AAAA\x07\x1b[2J\r\x08\x7f\x9bA\u202eB\u2066") == "]52;c;AAAA[2JAB"
    assert printable("\ud800") == "\N{REPLACEMENT CHARACTER}"


def test_what_it_keeps():
    kept = "tab\tnewline\nübung 龍 👩‍👩‍👧 \u200f\u05d0 e\u0301"
    assert printable(kept) == kept


def test_one_line():
    assert printable_line("a\nb\tc\x1b[1m\u2028d") == "a b c[1m d"


def test_any_text_cut_anywhere():
    chosen = random.Random(0)
    pool = [chr(code) for code in range(0x100)] + list("\u202a\u202e\u2066\u2069\ufff9\ud800") + ["龍", "👩\u200d"]
    text = "".join(chosen.choices(pool, k=200_000))
    pieces = []
    while text:
        length = chosen.randrange(1, 9)
        pieces.append(printable(text[:length]))
        text = text[length:]
    shown = "".join(pieces)
    assert not {c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"}
    assert not {c for c in shown if unicodedata.bidirectional(c) in ("RLO", "LRO", "RLE", "LRE", "LRI", "RLI", "FSI")}
