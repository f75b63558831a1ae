"""Nothing but printable text, tabs and newlines reaches a terminal."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

from localmoe.cli.sanitize import printable, printable_line

ROOT = Path(__file__).parents[2]


def load_fuzz():
    path = Path(__file__).with_name("terminal_fuzz.py")
    spec = importlib.util.spec_from_file_location("terminal_fuzz", path)
    module = sys.modules["terminal_fuzz"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_it_removes():
    assert printable("\x1b]52;c;AAAA\x07\x1b[2J\r\x08\x7f\x9bA\u202eB\u2066") == "]52;c;AAAA[2JAB"
    assert printable("\ud800") == "\N{REPLACEMENT CHARACTER}"


def test_what_it_keeps():
    kept = "tab\tnewline\nübung 龍 👩‍👩‍👧 \u200f\u05d0 e\u0301"
    assert printable(kept) == kept


def test_one_line():
    assert printable_line("a\nb\tc\x1b[1m\u2028d") == "a b c[1m d"


def test_hidden_text_is_dropped():
    hidden = "".join(chr(0xE0000 + ord(c)) for c in "obey me")
    assert printable(f"a{hidden}b\ufeffc\u200bd") == "abcd"
    assert printable("one\u2028two") == "one\ntwo"
    assert printable("\ufdd0\uffff") == "\N{REPLACEMENT CHARACTER}" * 2


def test_random_streams_cut_anywhere():
    fuzz = load_fuzz()
    assert fuzz.check_streams(3_000, seed=0) > 50_000  # scripts/fuzz_terminal runs a million
    for character in "\x1b\x9b\r\u202e\u2066\u2028\U000e0041\ud800":
        assert fuzz.BAD.search(character), "the judge itself must know it"
    assert not fuzz.BAD.search("tab\tnewline\nübung 龍 👩‍👩‍👧 \u200f\u05d0 e\u0301")


def test_nothing_else_writes_to_a_terminal():
    """Only streams.py, which sanitizes, and render.py, for rich, hold a stream to write to."""
    writers = set()
    for path in [*ROOT.glob("localmoe/**/*.py"), *ROOT.glob("quantize/**/*.py")]:
        if re.search(r"^ *print\(|sys\.std(out|err)\.|file=sys|typer\.(echo|secho)", path.read_text("utf-8"), re.M):
            writers.add(path.relative_to(ROOT).as_posix())
    writers.discard("localmoe/__init__.py")  # the example in its docstring
    assert writers == {"localmoe/cli/render.py", "localmoe/cli/streams.py"}
