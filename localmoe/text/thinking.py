"""Tells a model's thinking from its answer while both stream by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

THINKING_TAGS = _OPEN, THINKING_END = "<think>", "</think>"


@dataclass(frozen=True)
class Segment:
    """A piece of text and what it is part of."""

    kind: Literal["thinking", "answer"]
    text: str


class ThinkingSplitter:
    """Splits streamed text at `<think>` and `</think>`.

    Only an opening tag at the very beginning (white space aside) opens thinking: later on it is something the
    answer talks about. The newlines right after `</think>` belong to neither part and are dropped.
    """

    def __init__(self, *, started: bool = False) -> None:
        """`started`: the prompt itself ended in `<think>`, so the first text is thinking already."""
        self._state: Literal["start", "thinking", "closed", "answer"] = "thinking" if started else "start"
        self._held = ""

    @classmethod
    def after(cls, prompt: str) -> ThinkingSplitter:
        """The splitter for an answer to the rendered `prompt`."""
        return cls(started=prompt.rstrip().endswith(_OPEN))

    @property
    def is_thinking(self) -> bool:
        """Whether what came last is thinking."""
        return self._state == "thinking"

    def push(self, text: str) -> list[Segment]:
        """What is now certain. A tag that may still be spelled out is held back."""
        self._held += text
        segments: list[Segment] = []
        if self._state == "start":
            self._start()
        if self._state == "thinking":
            self._think(segments)
        if self._state == "closed":
            self._held = self._held.lstrip("\r\n")
            if self._held:
                self._state = "answer"
        if self._state == "answer":
            self._give(segments, "answer", len(self._held))
        return segments

    def finish(self) -> list[Segment]:
        """What was held back, when no more text comes."""
        segments: list[Segment] = []
        self._give(segments, "thinking" if self._state == "thinking" else "answer", len(self._held))
        return segments

    def _start(self) -> None:
        text = self._held.lstrip()
        if text.startswith(_OPEN):
            self._held = text[len(_OPEN) :]
            self._state = "thinking"
        elif not _OPEN.startswith(text):
            self._state = "answer"

    def _think(self, segments: list[Segment]) -> None:
        end = self._held.find(THINKING_END)
        if end < 0:
            self._give(segments, "thinking", len(self._held) - overlap(self._held, THINKING_END))
            return
        self._give(segments, "thinking", end)
        self._held = self._held[len(THINKING_END) :]
        self._state = "closed"

    def _give(self, segments: list[Segment], kind: Literal["thinking", "answer"], length: int) -> None:
        if length:
            segments.append(Segment(kind, self._held[:length]))
            self._held = self._held[length:]


def overlap(text: str, word: str) -> int:
    """How many characters at the end of `text` may be the beginning of `word` (never all of `word`)."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)
