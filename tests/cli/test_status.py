"""The line under the prompt: what it says, and what it leaves out where there is no room."""

from __future__ import annotations

import sys

import pytest

from localmoe.cli import streams
from localmoe.cli.answer import Answer
from localmoe.cli.status import fitting, folded, status
from localmoe.offload.plan import Placement, Share
from localmoe.offload.predict import Residence

FakeEngine = sys.modules["fake_localmoe"].FakeEngine  # conftest.py puts it there
LAST = Answer(prompt_tokens=1000, completion_tokens=24, decode_tokens_per_second=12.345)


@pytest.fixture
def columns(monkeypatch):
    return lambda count: monkeypatch.setattr(streams, "columns", lambda: count)


def test_what_it_says(columns) -> None:
    columns(100)
    engine = FakeEngine(max_context=4096)
    assert status(engine, "demo:balanced", None) == "demo:balanced · 0 of 4,096 tokens"
    assert status(engine, "demo:balanced", LAST) == "demo:balanced · 1,024 of 4,096 tokens · 12.3 tokens/s"
    assert status(engine, "a\x1b[31m\nb", None).startswith("a[31m b · ")


def test_what_the_card_does(columns) -> None:
    columns(100)
    engine = FakeEngine(max_context=4096)
    layers = (Residence(True), Residence(True, 32, 0.75), Residence(True, 16, 0.25))
    engine.placement = Placement(4096, 4096, layers, True, (Share("layers", "gpu", 3 << 30, "", ""),))
    engine.hit_rates = lambda: [0.6, 0.4]
    assert status(engine, "m", LAST).endswith(" · 12.3 tokens/s · 50% of expert uses on the card · VRAM 3 GiB")


def test_what_matters_least_goes_first(columns) -> None:
    columns(40)
    assert status(FakeEngine(), "demo:balanced", LAST) == "demo:balanced · 1,024 of 64 tokens"
    assert fitting(["龍龍", "b"], 8) == "龍龍 · b"
    assert fitting(["龍龍", "b"], 7) == "龍龍"
    assert fitting(["龍龍", "b"], 3) == ""


def test_a_line_of_facts_is_broken_between_them() -> None:
    text = "17 tokens · 32.0 tokens/s · context 18/64\nno facts here, and longer than the terminal is wide\n"
    assert folded(text, 40) == text.replace(" · context", "\ncontext").replace(" terminal", "\nterminal")
    assert folded(text, 60) == text
    assert folded("  the space before is kept", 12) == "  the space\nbefore is\nkept"
    assert folded("alongwordthatfitsnowhere here", 10) == "alongwordthatfitsnowhere here"  # the terminal breaks it
    assert folded("龍龍 龍龍", 8) == "龍龍\n龍龍"
    assert folded("a · b · c", 1) == "a\nb\nc"
