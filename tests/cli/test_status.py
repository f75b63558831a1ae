"""The line under the prompt: what it says, and what it leaves out where there is no room."""

from __future__ import annotations

import sys

import pytest

from localmoe.cli import streams
from localmoe.cli.answer import Answer, Request
from localmoe.cli.conversation import Conversation
from localmoe.cli.kept import Kept
from localmoe.cli.settings import GREEDY
from localmoe.cli.status import fitting, folded, status
from localmoe.cli.talk import COMMANDS, Asking, Chat
from localmoe.offload.plan import Placement
from localmoe.offload.predict import Residence
from localmoe.offload.shares import Share

FakeEngine = sys.modules["fake_localmoe"].FakeEngine  # conftest.py puts it there
LAST = Answer(decode_tokens_per_second=12.345)


@pytest.fixture
def columns(monkeypatch):
    return lambda count: monkeypatch.setattr(streams, "columns", lambda: count)


def test_what_it_says(columns) -> None:
    columns(100)
    engine = FakeEngine(max_context=4096)
    assert status(engine, "demo:balanced", None, 0) == "demo:balanced · 0 of 4,096 tokens"
    assert status(engine, "demo:balanced", LAST, 1024) == "demo:balanced · 1,024 of 4,096 tokens · 12.3 tokens/s"
    assert status(engine, "a\x1b[31m\nb", None, 0).startswith("a[31m b · ")


def test_the_context_count_follows_the_conversation(home, tmp_path, monkeypatch) -> None:
    """An answer's own count where there is one; else the template's of what is left. A token is a word."""
    engine = FakeEngine()
    interrupted = iter([False, False, True])

    def steps(used, max_tokens, plain=engine._steps):
        if next(interrupted, False):
            raise KeyboardInterrupt
        return plain(used, max_tokens)

    engine._steps = steps
    script = [
        ("Tell me a story", 8),
        ("And then?", 14),
        ("/regen", 14),  # stopped before its first word: the old answer stays
        ("/undo", 8),
        (f"/save {tmp_path}/kept", 8),
        ("More please", 14),
        ("/edit", 8),
        ("/reset", 0),
        (f"/load {tmp_path}/kept", 8),  # as the template counts it
        ("/undo", 0),
    ]
    used: list[int] = []

    def read(_: str) -> str | None:
        line = chat.status()
        used.append(int(line.split(" of ")[0].split()[-1]))
        assert f"context   {used[-1]} of 64 tokens" in chat._statistics()
        return next(lines, None)

    lines = iter(line for line, _ in script)
    chat = Chat(engine, "demo", Request(dict(GREEDY)), Conversation(), Kept(None, None))
    chat.talk(Asking(read, lambda _: False))
    assert used == [0, *(count for _, count in script)]


def test_what_the_card_does(columns) -> None:
    columns(100)
    engine = FakeEngine(max_context=4096)
    layers = (Residence(True), Residence(True, 32, 0.75), Residence(True, 16, 0.25))
    engine.placement = Placement(4096, 4096, layers, True, (Share("layers", "gpu", 3 << 30, "", ""),))
    engine.hit_rates = lambda: [0.6, 0.4]
    assert status(engine, "m", LAST, 1024).endswith(" · 12.3 tokens/s · 50% of expert uses on the card · VRAM 3 GiB")


def test_what_matters_least_goes_first(columns) -> None:
    columns(40)
    assert status(FakeEngine(), "demo:balanced", LAST, 1024) == "demo:balanced · 1,024 of 64 tokens"
    assert fitting(["龍龍", "b"], 8) == "龍龍 · b"
    assert fitting(["龍龍", "b"], 7) == "龍龍"
    assert fitting(["龍龍", "b"], 3) == ""


def test_a_line_of_facts_is_broken_between_them() -> None:
    text = "17 tokens · 32.0 tokens/s · context 18/64\n"
    assert folded(text, 40) == text.replace(" · context", "\ncontext")
    assert folded(text, 41) == text
    assert folded("a · b · c", 1) == "a\nb\nc"


def test_a_line_without_facts_is_broken_between_words() -> None:
    assert folded("one two  three\n  龍龍 four", 8) == "one two\nthree\n  龍龍\nfour"
    assert folded("a /path/that/is/longer b", 10) == "a\n/path/that/is/longer\nb"


@pytest.mark.parametrize("columns", [80, 40])
def test_the_list_of_commands_fits_the_terminal(columns) -> None:
    first = max(map(len, COMMANDS)) + 2
    rows = folded("\n".join(f"{name:<{first}}{what}" for name, what in COMMANDS.items()), columns).split("\n")
    assert max(map(len, rows)) <= columns
    assert [row[:first].rstrip() for row in rows if not row.startswith(" ")] == list(COMMANDS)
    assert columns < 80 or len(rows) == len(COMMANDS)
