"""What a chat remembers: questions, answers, and the system prompt. No terminal, no engine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from localmoe.text import Message


@dataclass(frozen=True)
class Turn:
    """A question and its answer, without the thinking: templates drop it from earlier turns.

    `used` is how many tokens of the context were in use after it; None where nobody has counted."""

    question: str
    answer: str
    used: int | None = field(default=None, compare=False)


@dataclass
class Conversation:
    """The turns so far. A question joins them only with an answer, so the roles always alternate."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def asking(self, question: str) -> list[Message]:
        """The messages that ask `question` after everything before it."""
        messages: list[Message] = [] if not self.system else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        return [*messages, {"role": "user", "content": question}]

    @property
    def messages(self) -> list[Message]:
        """Everything said so far."""
        return self.asking("")[:-1]

    @classmethod
    def of(cls, messages: Sequence[Message]) -> Conversation:
        """What `messages` gave. Raises ValueError where the roles do not alternate."""
        rest = list(messages)
        system = rest.pop(0)["content"] if rest and rest[0]["role"] == "system" else None
        roles = [message["role"] for message in rest]
        if len(rest) % 2 or roles != ["user", "assistant"] * (len(rest) // 2):
            raise ValueError("questions and answers do not alternate")
        pairs = zip(rest[::2], rest[1::2], strict=True)
        return cls(system, [Turn(question["content"], answer["content"]) for question, answer in pairs])

    @property
    def used(self) -> int | None:
        """Tokens of the context in use; None where nobody has counted since something changed."""
        return self.turns[-1].used if self.turns else 0

    def count(self, used: int | None) -> None:
        """So many tokens are in use now. None: what was counted before the last turn no longer holds either."""
        if used is None:
            self.turns[:] = [replace(turn, used=None) for turn in self.turns]
        elif self.turns:
            self.turns[-1] = replace(self.turns[-1], used=used)

    def add(self, turn: Turn) -> None:
        """Remember a turn."""
        self.turns.append(turn)

    def take_back(self) -> Turn | None:
        """Forget the last turn and return it."""
        return self.turns.pop() if self.turns else None

    def drop_oldest(self, count: int) -> None:
        """Forget the first `count` turns; the system prompt stays."""
        del self.turns[:count]
        self.count(None)

    def reset(self) -> None:
        """Forget every turn; the system prompt stays."""
        self.turns.clear()
