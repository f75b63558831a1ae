from __future__ import annotations

import itertools

import pytest

from localmoe.text import Segment, ThinkingSplitter


def split(pieces: list[str], *, started: bool = False) -> list[tuple[str, str]]:
    """Push, finish, and join neighbours of one kind."""
    splitter = ThinkingSplitter(started=started)
    segments: list[Segment] = [s for piece in pieces for s in splitter.push(piece)] + splitter.finish()
    groups = itertools.groupby(segments, key=lambda segment: segment.kind)
    return [(kind, "".join(segment.text for segment in group)) for kind, group in groups]


CASES = [
    ("<think>why?</think>\n\nBecause.", False, [("thinking", "why?"), ("answer", "Because.")]),
    (" \n<think>\nwhy\n</think>so", False, [("thinking", "\nwhy\n"), ("answer", "so")]),
    ("because</think>\nyes\n\nno", True, [("thinking", "because"), ("answer", "yes\n\nno")]),
    ("never ends", True, [("thinking", "never ends")]),
    ("never ends</thi", True, [("thinking", "never ends</thi")]),
    ("<think></think>empty", False, [("answer", "empty")]),
    ("</think>\r\n\r\nempty", True, [("answer", "empty")]),
    ("the tag <think> opens</think> it", False, [("answer", "the tag <think> opens</think> it")]),
    ("<thin air", False, [("answer", "<thin air")]),
    ("<thin", False, [("answer", "<thin")]),
    ("  indented", False, [("answer", "  indented")]),
    ("<think>a < b </ c</think>d</think>", False, [("thinking", "a < b </ c"), ("answer", "d</think>")]),
    ("", False, []),
]


@pytest.mark.parametrize(("text", "started", "wanted"), CASES)
def test_every_way_to_cut_the_text_gives_the_same(text: str, started: bool, wanted: list[tuple[str, str]]) -> None:
    assert split([text], started=started) == wanted
    assert split(list(text), started=started) == wanted
    for cut in range(len(text)):
        assert split([text[:cut], "", text[cut:]], started=started) == wanted


def test_nothing_certain_is_held_back() -> None:
    splitter = ThinkingSplitter(started=True)
    assert splitter.push("some thought") == [Segment("thinking", "some thought")]
    assert splitter.push(" more</th") == [Segment("thinking", " more")]
    assert splitter.push("ink>\n") == []
    assert splitter.push("\n") == []
    assert splitter.push("answer") == [Segment("answer", "answer")]
    assert splitter.finish() == []


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [("<｜Assistant｜><think>\n", "thinking"), ("<｜Assistant｜>", "answer"), ("<think></think>", "answer")],
)
def test_the_prompt_says_where_the_answer_begins(prompt: str, kind: str) -> None:
    assert ThinkingSplitter.after(prompt).push("hm ")[0].kind == kind
