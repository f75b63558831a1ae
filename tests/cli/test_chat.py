"""`chat` on a pseudo-terminal, typed at as a person would."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator

import pytest

from localmoe.cli.conversation import Conversation

ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|[=>78]|\([A-Z])")
PROMPT = ">>>"


class Typist:
    """A person at a terminal: reads what the program shows, types keys."""

    def __init__(self, program, *arguments: str, columns: int = 100) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        self.process = program.start(
            *arguments,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            # This terminal answers no question about where its cursor is.
            environment={"PROMPT_TOOLKIT_NO_CPR": "1"},
        )
        os.close(slave)
        self.raw = ""

    @property
    def seen(self) -> str:
        """Everything shown so far, without the escape sequences of the line editor."""
        return ESCAPES.sub("", self.raw).replace("\r", "")

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def expect(self, text: str, *, after: int = 0, timeout: float = 8) -> int:
        """Wait until `text` shows up after position `after` of `seen`; returns where it ends."""
        deadline = time.monotonic() + timeout
        while (found := self.seen.find(text, after)) < 0:
            remaining = deadline - time.monotonic()
            assert remaining > 0, f"no {text!r} in:\n{self.seen[after:]}"
            assert self._read(remaining), f"the program ended (no {text!r}):\n{self.seen[after:]}"
        return found + len(text)

    def wait(self) -> int:
        while self._read(15):
            pass
        return self.process.wait(timeout=15)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def _read(self, timeout: float) -> bool:
        if select.select([self._master], [], [], timeout)[0]:
            with contextlib.suppress(OSError):  # EIO: the program has closed the terminal
                data = os.read(self._master, 65536)
                self.raw += data.decode(errors="replace")
                return bool(data)
            return False
        return self.process.poll() is None


@pytest.fixture
def sit_down(program) -> Iterator:
    typists: list[Typist] = []

    def start(*arguments: str, **environment: str) -> Typist:
        program.environment |= environment
        typists.append(Typist(program, "chat", "demo", *arguments))
        return typists[-1]

    yield start
    for typist in typists:
        typist.close()


def test_a_conversation(sit_down, home):
    typist = sit_down("--system", "Be brief")
    at = typist.expect("demo:balanced · context 64 tokens · /help")
    at = typist.expect(PROMPT, after=at)
    typist.type("Tell me a story\r")
    at = typist.expect("Once upon a time.\n", after=at)
    at = typist.expect("4 tokens · 6.0 tokens/s · context 10/64", after=at)  # 2 words of system, 4, 4
    at = typist.expect(PROMPT, after=at)
    typist.type("And then?\r")
    at = typist.expect("context 16/64", after=at)
    typist.type("/regen\r")
    at = typist.expect("context 16/64", after=at)  # the last answer was replaced, not added
    typist.type("/stats\r")
    at = typist.expect("turns     2", after=at)
    at = typist.expect("context   16 of 64 tokens (25%)", after=at)
    typist.type("/reset\r")
    at = typist.expect("forgotten", after=at)
    typist.type("/system\r")
    at = typist.expect("Be brief", after=at)
    typist.type("/system Be very verbose\r")
    at = typist.expect("set;", after=at)
    typist.type("Hello\r")
    at = typist.expect("context 8/64", after=at)
    typist.type("/help\r")
    at = typist.expect("/regen", after=at)
    typist.type("/stat\r")
    at = typist.expect("did you mean /stats?", after=at)
    typist.type("/exit\r")
    assert typist.wait() == 0
    history = home / "chat_history"
    assert "+Tell me a story" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(sit_down):
    typist = sit_down(FAKE_ANSWER="one two three " + "more " * 50, FAKE_DELAY="0.1")
    at = typist.expect(PROMPT)
    typist.type("Count\r")
    at = typist.expect("one two", after=at)
    typist.type("\x03")
    at = typist.expect("stopped", after=at)
    at = typist.expect(PROMPT, after=at)
    typist.type("/stats\r")
    at = typist.expect("turns     1", after=at)
    typist.type("\x04")
    assert typist.wait() == 0


def test_stopped_before_the_first_word(sit_down):
    typist = sit_down(FAKE_ANSWER="slow", FAKE_DELAY="1.5")
    at = typist.expect(PROMPT)
    typist.type("Hello there\r")
    time.sleep(0.3)
    typist.type("\x03")
    at = typist.expect("stopped before the first word; /regen asks again", after=at)
    typist.type("/regen\r")
    at = typist.expect("slow\n", after=at)
    at = typist.expect("context 3/64", after=at)
    typist.type("/stats\r")
    typist.expect("turns     1", after=at)


def test_ctrl_c_at_the_prompt_hints_then_leaves(sit_down):
    typist = sit_down()
    at = typist.expect(PROMPT)
    typist.type("half a line\x03")
    at = typist.expect(PROMPT, after=at)
    typist.type("\x03")
    at = typist.expect("Ctrl-C again, Ctrl-D or /exit leaves", after=at)
    at = typist.expect(PROMPT, after=at)
    typist.type("\x03")
    assert typist.wait() == 0


def test_a_full_context_is_said_and_the_conversation_kept(sit_down):
    typist = sit_down(FAKE_CONTEXT="12")
    at = typist.expect(PROMPT)
    typist.type("one two\r")
    at = typist.expect("context 6/12", after=at)
    typist.type("one two three four five six\r")
    at = typist.expect("no longer fits the context of 12 tokens", after=at)
    typist.type("one two three\r")
    at = typist.expect("the context is full; /reset", after=at)  # cut off by the context, and remembered
    typist.type("/reset\r")
    at = typist.expect("forgotten", after=at)
    typist.type("one\r")
    typist.expect("context 5/12", after=at)


def test_thinking_is_dim_and_control_characters_are_gone(sit_down):
    typist = sit_down(FAKE_TEMPLATE="think", FAKE_ANSWER="hm\x07 </think>\n\nred \x1b[31m \u202ealert")
    typist.expect(PROMPT)
    typist.type("Go\r")
    typist.expect("tokens/s")
    assert "\x1b[2mhm\x1b[0m" in typist.raw
    assert "red [31m alert" in typist.seen
    assert "\x1b[31m" not in typist.raw
    assert "\x07" not in typist.raw
    assert "\u202e" not in typist.raw


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_no_colour_where_none_is_wanted(sit_down, environment):
    typist = sit_down(**environment)
    at = typist.expect(PROMPT)
    typist.type("Hello\r")
    typist.expect("context 5/64", after=at)
    assert not re.search(r"\x1b\[[0-9;]*[1-9][0-9;]*m", typist.raw)


def test_alt_enter_and_paste_keep_lines(sit_down):
    typist = sit_down()
    at = typist.expect(PROMPT)
    typist.type("one\x1b\rtwo\r")
    at = typist.expect("context 6/64", after=at)
    typist.type("\x1b[200~three\nfour\x1b[201~\r")
    typist.expect("context 12/64", after=at)


def test_a_model_that_cannot_chat_says_so_at_once(program):
    program.environment["FAKE_TEMPLATE"] = "none"
    typist = Typist(program, "chat", "demo")
    assert typist.wait() == 1
    assert "has no chat template" in typist.seen
    typist.close()


def test_chat_ends_with_the_terminal(sit_down):
    typist = sit_down()
    typist.expect(PROMPT)
    typist.process.send_signal(1)  # SIGHUP: the window was closed
    with contextlib.suppress(subprocess.TimeoutExpired):
        typist.process.wait(timeout=10)
    assert typist.process.poll() is not None


def test_conversation_alternates_roles():
    conversation = Conversation(system="s")
    conversation.add("q1", "a1")
    asked = conversation.asking("q2")
    assert [message["role"] for message in asked] == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in asked] == ["s", "q1", "a1", "q2"]
    assert conversation.take_back() is not None
    assert conversation.take_back() is None
