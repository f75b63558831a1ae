"""The command line with a fake engine, so that tests of flags, pipes and terminals need neither torch nor weights.

Run as a program it takes localmoe's own arguments. FAKE_ANSWER is what every answer says, FAKE_DELAY the seconds
before each token, FAKE_TEMPLATE what the chat template does: "plain", "think" (ends in <think>), "switch", "none".
FAKE_FAILS is a part of the path of a model that cannot be opened. FAKE_GUESSES makes it speak of guessed tokens,
FAKE_TTY makes stdin its controlling terminal.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

from localmoe.errors import CheckpointError, ContextOverflowError, StorageError
from localmoe.sessions import read_facts


@dataclass(frozen=True)
class FakeSpeculation:
    drafter: str = "mtp"
    passes: int = 9
    drafted_tokens: int = 8
    accepted_tokens: int = 6
    drafts: int = 1
    acceptance_rate: float | None = 0.75


@dataclass(frozen=True)
class FakeStats:
    prompt_tokens: int
    completion_tokens: int
    prefill_seconds: float = 0.25
    decode_seconds: float = 0.5
    reused_tokens: int = 0
    speculation: FakeSpeculation | None = None
    sampling_seconds: float = 0.0

    @property
    def fulfils_grammar(self) -> bool | None:
        return None

    @property
    def decode_tokens_per_second(self) -> float:
        return (self.completion_tokens - 1) / self.decode_seconds


@dataclass(frozen=True)
class FakeStep:
    token_id: int
    text: str
    logprob: float = -0.5
    finish_reason: str | None = None
    stats: FakeStats | None = None
    top: tuple = ()


class FakeTemplate:
    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.switches_thinking = kind == "switch"

    def render(self, messages, *, add_generation_prompt=True, thinking=None) -> str:
        body = "".join(f"[{message['role']}]{message['content']}" for message in messages)
        return body + ("<think>\n" if self.kind == "think" or thinking else "")


@dataclass
class FakeEngine:
    """Says `answer`, a token a word with the white space before it; tokens are words everywhere."""

    answer: str = "Once upon a time."
    delay: float = 0.0
    template: str = "plain"
    max_context: int = 64
    path: Path = Path("fake-model")
    kernels: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(tier="fake"))
    generation_defaults: dict = field(default_factory=dict)
    calls: list[dict] = field(default_factory=list)
    speculation: FakeSpeculation | None = None
    placement: None = None
    reads_the_disk: bool = False
    expert_hits = hit_rates = staticmethod(lambda since=None: None)
    closed: bool = False
    opened: tuple | None = None
    cache_dtype: str = "bf16"

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.closed = True

    @property
    def chat_template(self) -> FakeTemplate | None:
        return None if self.template == "none" else FakeTemplate(self.template)

    @property
    def cache_bytes(self) -> int:
        return 2048 * len(self.calls)

    def save_session(self, path, facts):
        if os.environ.get("FAKE_DISK") == "full" or (path.parent / "full").exists():
            raise StorageError(f"{path}: the session cannot be written (9 bytes): No space left on device")
        used = len(self.prompt_ids(facts.messages))
        facts = replace(facts, model_hash="0" * 64, tokens=used)
        header = json.dumps({"__metadata__": facts.to_metadata()}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        return facts

    def open_session(self, path, *, model="this model"):
        self.opened = (path, model)
        return read_facts(path)

    def prompt_ids(self, prompt, *, thinking=None, add_bos=True) -> list[int]:
        text = prompt if isinstance(prompt, str) else " ".join(message["content"] for message in prompt)
        return list(range(len(text.split())))

    def generate(self, prompt, *, max_tokens=None, **settings):
        used = len(self.prompt_ids(prompt))
        self.calls.append({"prompt": prompt, "max_tokens": max_tokens, **settings})
        if used >= self.max_context:
            raise ContextOverflowError(f"the prompt has {used} tokens and the context holds {self.max_context}")
        return self._steps(used, max_tokens)

    def _steps(self, used: int, max_tokens: int | None):
        words = self.answer.split(" ")
        pieces = [words[0], *(" " + word for word in words[1:])]
        limit = min(self.max_context - used, max_tokens or self.max_context)
        for number, piece in enumerate(pieces[:limit], start=1):
            time.sleep(self.delay)
            if number == len(pieces):
                yield FakeStep(
                    number, piece, finish_reason="stop", stats=FakeStats(used, number, speculation=self.speculation)
                )
            elif number == limit:
                yield FakeStep(
                    number, piece, finish_reason="length", stats=FakeStats(used, number, speculation=self.speculation)
                )
            else:
                yield FakeStep(number, piece)


def from_environment(path: Path) -> FakeEngine:
    if os.environ.get("FAKE_FAILS", "\0") in str(path):
        raise CheckpointError(f"{path.name}: damaged")
    return FakeEngine(
        path=path,
        answer=os.environ.get("FAKE_ANSWER", FakeEngine.answer),
        delay=float(os.environ.get("FAKE_DELAY", "0")),
        template=os.environ.get("FAKE_TEMPLATE", "plain"),
        max_context=int(os.environ.get("FAKE_CONTEXT", "64")),
        speculation=FakeSpeculation() if "FAKE_GUESSES" in os.environ else None,
    )


if __name__ == "__main__":
    if "FAKE_TTY" in os.environ:  # a session's leader that opens a terminal gets it as its controlling one
        os.close(os.open(os.ttyname(0), os.O_RDWR))
    from localmoe.cli import opening
    from localmoe.cli.app import main

    opening.load_engine = lambda path, machine: from_environment(path)
    sys.exit(main())
