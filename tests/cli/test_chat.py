"""`chat` on a pseudo-terminal, typed at as a person would."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from localmoe import sessions
from localmoe.cli.conversation import Conversation, Turn

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
            # FAKE_TTY: the program makes stdin its controlling terminal, so that Ctrl-C reaches it (a preexec_fn may
            # deadlock in a process with threads). And this terminal answers no question about where its cursor is.
            environment={"FAKE_TTY": "1", "PROMPT_TOOLKIT_NO_CPR": "1"},
        )
        os.close(slave)
        self.raw = ""
        self._at = 0

    @property
    def seen(self) -> str:
        """Everything shown so far, without the escape sequences of the line editor."""
        return ESCAPES.sub("", self.raw).replace("\r", "")

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def say(self, line: str) -> None:
        """Wait for the prompt, then type a line: keys typed before it belong to the terminal, not to the editor."""
        self.expect(PROMPT)
        self.type(line + "\r")

    def expect(self, text: str, *, timeout: float = 15) -> None:
        """Wait until `text` shows up after what was expected before."""
        deadline = time.monotonic() + timeout
        while (found := self.seen.find(text, self._at)) < 0:
            remaining = deadline - time.monotonic()
            assert remaining > 0, f"no {text!r} in:\n{self.seen[self._at :]}"
            assert self._read(remaining), f"the program ended (no {text!r}):\n{self.seen[self._at :]}"
        self._at = found + len(text)

    def wait(self, timeout: float = 15) -> int:
        """Read until the program ends; returns its exit status."""
        deadline = time.monotonic() + timeout
        while self._read(0.2):
            assert time.monotonic() < deadline, f"still running:\n{self.seen[self._at :]}"
        return self.process.wait(timeout=timeout)

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

    def start(*arguments: str, columns: int = 100, **environment: str) -> Typist:
        program.environment |= environment
        typists.append(Typist(program, "chat", "demo", *arguments, columns=columns))
        return typists[-1]

    yield start
    for typist in typists:
        typist.close()


def test_a_conversation(sit_down, home):
    typist = sit_down("--system", "Be brief")
    typist.expect("demo:balanced · context 64 tokens · /help")
    typist.say("Tell me a story")
    typist.expect("Once upon a time.\n")
    typist.expect("4 tokens · 6.0 tokens/s · context 10/64")  # 2 words of system, 4 asked, 4 answered
    typist.say("And then?")
    typist.expect("context 16/64")
    typist.say("/regen")
    typist.expect("context 16/64")  # the last answer was replaced, not added
    typist.say("/stats")
    typist.expect("turns     2")
    typist.expect("context   16 of 64 tokens (25%)")
    typist.say("/reset")
    typist.expect("forgotten")
    typist.say("/system")
    typist.expect("Be brief")
    typist.say("/system Be very verbose")
    typist.expect("set;")
    typist.say("Hello")
    typist.expect("context 8/64")
    typist.say("/help")
    typist.expect("/regen")
    for typed, meant in (("/stat", "/stats"), ("/HELP", "/help"), ("/exti", "/exit"), ("/quit", "/exit")):
        typist.say(typed)
        typist.expect(f"no such command: {typed}; did you mean {meant}?")
    typist.say("/undo 2")
    typist.expect("/undo takes nothing after it")
    typist.say("/exit")
    assert typist.wait() == 0
    history = home / "chat_history"
    assert "+Tell me a story" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_stats_say_what_guessing_did_and_set_knows_the_penalties(sit_down):
    typist = sit_down(FAKE_GUESSES="1")
    typist.say("Tell me a story")
    typist.expect("context 8/64")
    typist.say("/stats")
    typist.expect("guesses   mtp: 6 of 8 guesses right (75%), 1 at a time")
    typist.say("/set frequency-penalty 0.5")
    typist.expect("frequency_penalty 0.5")
    typist.say("/set width 3")
    typist.expect("there are temp, top_p, top_k, min_p, repetition_penalty, presence_penalty,\nfrequency_penalty, seed")


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(sit_down):
    typist = sit_down(FAKE_ANSWER="one two three " + "more " * 50, FAKE_DELAY="0.1")
    typist.say("Count")
    typist.expect("one two")
    typist.type("\x03")
    typist.expect("stopped")
    typist.say("/stats")
    typist.expect("turns     1")
    typist.expect(PROMPT)
    typist.type("\x04")
    assert typist.wait() == 0


def test_stopped_before_the_first_word(sit_down):
    typist = sit_down(FAKE_ANSWER="slow", FAKE_DELAY="1.5")
    typist.say("Hello there")
    time.sleep(0.5)
    typist.type("\x03")
    typist.expect("stopped before the first word; /regen asks again")
    typist.say("/regen")
    typist.expect("slow\n")
    typist.expect("context 3/64")
    typist.say("/stats")
    typist.expect("turns     1")


def test_ctrl_c_at_the_prompt_hints_then_leaves(sit_down):
    typist = sit_down()
    typist.expect(PROMPT)
    typist.type("half a line\x03")
    typist.expect(PROMPT)
    typist.type("\x03")
    typist.expect("Ctrl-C again, Ctrl-D or /exit leaves")
    typist.expect(PROMPT)
    typist.type("\x03")
    assert typist.wait() == 0


def test_files_of_a_question_that_was_not_added_go_with_the_next(sit_down, tmp_path):
    (tmp_path / "a.txt").write_text("three more words\n")
    typist = sit_down(FAKE_CONTEXT="12", columns=300)
    typist.say("one two")
    typist.expect("context 6/12")
    typist.say(f"/file {tmp_path}/a.txt")
    typist.expect("goes with the next question")
    typist.say("go")
    typist.expect("Drop the oldest 1 of 1 turn and go on? [y/N]")
    typist.type("\r")
    typist.expect("the last message was not added; its files go with the next question. ")
    typist.say("/undo")
    typist.expect("no turn is left")
    typist.say("go")
    typist.expect("context 11/12")  # the word, the file's name, two fences and 3 words, 4 answered
    typist.say("/undo")
    typist.expect("no turn is left")
    typist.say("go")
    typist.expect("context 5/12")


def test_a_full_context_is_said_and_the_person_chooses(sit_down):
    typist = sit_down(FAKE_CONTEXT="12")
    typist.say("one two")
    typist.expect("context 6/12")
    typist.say("one two three four five six")
    typist.expect("no longer fits the context of 12 tokens")
    typist.expect("Drop the oldest 1 of 1 turn and go on? [y/N]")
    typist.type("\r")
    typist.expect("the last message was not added")
    typist.say("one two three")
    typist.expect("the context is full; /reset")  # cut off by the context, and remembered
    typist.say("seven")
    typist.expect("Drop the oldest 2 of 2 turns and go on? [y/N]")
    typist.type("y\r")
    typist.expect("dropped; no turn is left")
    typist.expect("context 5/12")
    typist.say("one two")
    typist.expect("context 11/12 · nearly full")
    typist.say("x " * 20)
    typist.expect("even alone it is too long")
    typist.say("/stats")
    typist.expect("turns     2")
    typist.say("/reset")
    typist.expect("forgotten")
    typist.say("one")
    typist.expect("context 5/12")


@pytest.mark.parametrize(("how", "said"), [("drop", "dropped; no turn is left"), ("stop", "was not added")])
def test_a_full_context_may_be_decided_beforehand(sit_down, how, said):
    typist = sit_down("--when-full", how, FAKE_CONTEXT="12")
    typist.say("one two")
    typist.expect("context 6/12")
    typist.say("one two three four five six")
    typist.expect(said)
    typist.expect(PROMPT)


class TestSessions:
    def test_a_chat_goes_on_where_it_was(self, sit_down):
        typist = sit_down("--session", "s", "--seed", "4")
        typist.expect("session s begins; it is kept until `localmoe sessions rm s`")
        typist.say("Tell me a story")
        typist.expect("context 8/64")
        typist.say("/set temp 0.5")
        typist.say("And then?")
        typist.expect("context 14/64")
        typist.say("/exit")
        assert typist.wait() == 0
        facts = sessions.read_facts(sessions.path_of("s"))
        assert (len(facts.messages), facts.seed, facts.sampling["temperature"]) == (4, 6, 0.5)
        again = sit_down("--session", "s", columns=40)
        again.expect("session s goes on: 2 turns, 14 tokens\n  > Tell me a story\n    Once upon a time.\n  > And")
        again.say("/stats")
        again.expect("sampling  temperature 0.5")
        again.expect("session   s")
        again.expect("context   14 of 64 tokens (22%)")
        again.say("More")
        again.expect("context 19/64")
        again.say("/stats")
        again.expect("cache     2 KiB in bf16")
        other = sit_down("--session", "s")
        assert other.wait() == 1
        assert "session s is open in another localmoe" in other.seen
        again.say("/undo")
        again.expect("2 turns are left")
        again.expect(PROMPT)
        again.type("\x04")
        assert again.wait() == 0
        assert len(sessions.read_facts(sessions.path_of("s")).messages) == 4

    @pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
    @pytest.mark.parametrize("answering", [False, True])
    def test_a_closed_terminal_loses_nothing(self, sit_down, number, answering):
        typist = sit_down("--session", "s", FAKE_DELAY="0.2")
        typist.say("Tell me a story")
        typist.expect("context 8/64")
        typist.say("/set temp 0.5")  # not yet in the file
        typist.expect("temperature 0.5")
        if answering:
            typist.say("And then?")
            typist.expect("upon")
        else:
            typist.expect(PROMPT)
        typist.process.send_signal(number)
        assert typist.wait() == 128 + number
        facts = sessions.read_facts(sessions.path_of("s"))
        assert facts.sampling["temperature"] == 0.5
        assert len(facts.messages) == 2

    def test_a_full_disk_is_said_and_leaving_is_asked_twice(self, sit_down, home):
        (home / "sessions").mkdir()
        full = home / "sessions" / "full"
        full.touch()
        typist = sit_down("--session", "s")
        typist.say("Tell me a story")
        typist.expect("No space left on device")
        typist.say("/exit")
        typist.expect("No space left on device")
        typist.expect("the conversation is still here")
        typist.say("And then?")
        typist.expect("context 14/64")
        full.unlink()
        typist.say("/exit")
        assert typist.wait() == 0
        assert len(sessions.read_facts(sessions.path_of("s")).messages) == 4
        full.touch()
        typist = sit_down("--session", "s")
        typist.say("More")
        typist.say("/exit")
        typist.expect("or leave again to lose it")
        typist.say("/exit")
        assert typist.wait() == 1
        assert "session s could not be written" in typist.seen


def test_thinking_is_dim_and_control_characters_are_gone(sit_down):
    typist = sit_down(FAKE_TEMPLATE="think", FAKE_ANSWER="hm\x07 </think>\n\nred \x1b[31m \u202ealert")
    typist.say("Go")
    typist.expect("tokens/s")
    assert "thought 0 s · 2 tokens" in typist.seen
    typist.say("/think")
    typist.expect("hm")
    typist.say("/think show")
    typist.say("Go")
    typist.expect("thought 0 s")
    assert "\x1b[2mhm\x1b[0m" in typist.raw
    assert "red [31m alert" in typist.seen
    assert "\x1b[31m" not in typist.raw
    assert "\x07" not in typist.raw
    assert "\u202e" not in typist.raw


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_no_colour_where_none_is_wanted(sit_down, environment):
    typist = sit_down(**environment)
    typist.say("Hello")
    typist.expect("context 5/64")
    assert not re.search(r"\x1b\[[0-9;]*[1-9][0-9;]*m", typist.raw)


def test_alt_enter_and_paste_keep_lines(sit_down):
    typist = sit_down()
    typist.say("one\x1b\rtwo")
    typist.expect("context 6/64")
    typist.say("\x1b[200~three\nfour\x1b[201~")
    typist.expect("context 12/64")


def test_commands_of_a_conversation(sit_down, tmp_path, home):
    (tmp_path / "a file.txt").write_text("one two\nthree\n")
    typist = sit_down(FAKE_ANSWER="It is **bold**.", columns=300)  # a path is as long as it is
    typist.say("/undo")
    typist.expect("nothing to take back")
    typist.say("Hello")
    typist.expect("It is bold.")
    assert "\x1b[1mbold\x1b[0m" in typist.raw
    typist.say("/undo")
    typist.expect("no turn is left")
    typist.say(f"/file {tmp_path}/a file.txt")
    typist.expect("goes with the next question (2 lines)")
    typist.say("What is it?")
    typist.expect("context 13/64")  # 3 words, the file's name of 2, two fences and 3 words, 3 answered
    typist.say("/save talk")
    typist.expect("saved to")
    typist.say("/reset")
    typist.say("/load talk")
    typist.expect("1 turn; the conversation goes on")
    saved = home / "chats" / "talk.json"
    assert "What is it?" in saved.read_text()
    assert saved.stat().st_mode & 0o077 == 0
    typist.say(f"/export {tmp_path}/talk.md")
    typist.expect("written to")
    assert "## Answer\n\nIt is **bold**.\n" in (tmp_path / "talk.md").read_text()
    typist.say(f"/export {tmp_path}/talk.md")
    typist.expect("is there already")
    typist.say("/copy")
    typist.expect("copied")
    assert "\x1b]52;c;SXQgaXMgKipib2xkKiou\x07" in typist.raw
    typist.say("/set temp 0.7")
    typist.expect("temperature 0.7")
    typist.say("/set temp hot")
    typist.expect("'hot' is not a number")
    typist.say("/set temp")
    typist.expect("/set temp VALUE sets it; it is 0.7")
    typist.say("/set seed 1e3")
    typist.expect("temperature 0.7, top_p 0.9, seed 1000")
    typist.say("/set seed 9007199254740993")  # more than a float holds
    typist.expect("seed 9007199254740993")
    typist.say("/stats")
    typist.expect("temperature 0.7, top_p 0.9, seed 9007199254740993")
    typist.say("/think off")
    typist.expect("no switch for thinking")
    typist.say("/edit")
    typist.expect("What is it?")
    typist.type("\x15\x03")
    typist.say("/load tlak")
    typist.expect("no conversation is kept as tlak; did you mean talk?")
    typist.expect(PROMPT)
    typist.type("/load tal\t")
    typist.expect("/load talk")
    typist.type("\r")
    typist.expect("1 turn; the conversation goes on")
    typist.say(f"/load {tmp_path}/nothing.json")
    typist.expect("cannot be read")
    typist.say("/etc/passwd is what?")  # a path is no command
    typist.expect("It is bold.")
    typist.say("/exit")
    assert typist.wait() == 0


def test_another_model_takes_over_and_the_conversation_goes_on(sit_down, home):
    (home / "models/demo/compact").mkdir()
    for name in ("config.json", "localmoe.json"):
        text = (home / "models/demo/balanced" / name).read_text().replace("balanced", "compact")
        (home / "models/demo/compact" / name).write_text(text)
    typist = sit_down(FAKE_FAILS="models/demo/compact", columns=300)
    typist.say("Tell me a story")
    typist.expect("context 8/64")
    typist.say("/model")
    typist.expect("demo:balanced (")
    typist.say("/set temp 0.5")
    typist.say("/model demo:source")
    typist.expect("demo:source · context 64 tokens · the conversation goes on")
    typist.say("And then?")
    typist.expect("context 14/64")
    typist.say("/set")
    typist.expect("temperature 0.5")
    config = Path(os.environ["XDG_CONFIG_HOME"], "localmoe/config.toml")
    config.parent.mkdir(parents=True)
    config.write_text('[alias]\nmine = "demo:source"\n')
    typist.say("/model mine")
    typist.expect("demo:source · context 64 tokens · the conversation goes on")
    typist.say("/model nothing-like-it")
    typist.expect("no model is called 'nothing-like-it'")
    typist.say("/model demo:compact")
    typist.expect("compact: damaged; demo:source goes on")
    typist.say("And?")
    typist.expect("context 19/64")
    typist.expect(PROMPT)
    typist.type("/model demo:b\t")
    typist.expect("balanced")
    typist.type("\r")
    typist.expect("demo:balanced · context 64 tokens")
    typist.say("/exit")
    assert typist.wait() == 0


def test_a_model_that_cannot_chat_says_so_at_once(sit_down):
    typist = sit_down(FAKE_TEMPLATE="none")
    assert typist.wait() == 1
    assert "has no chat template" in typist.seen


def test_chat_ends_with_the_terminal(sit_down):
    typist = sit_down()
    typist.expect(PROMPT)
    typist.process.send_signal(signal.SIGHUP)  # the window was closed
    assert typist.process.wait(timeout=15) != 0


def test_conversation_alternates_roles():
    conversation = Conversation(system="s")
    conversation.add(Turn("q1", "a1"))
    asked = conversation.asking("q2")
    assert [message["role"] for message in asked] == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in asked] == ["s", "q1", "a1", "q2"]
    assert Conversation.of(conversation.messages) == conversation
    assert conversation.take_back() is not None
    assert conversation.take_back() is None
    for roles in (["user"], ["assistant", "user"], ["user", "assistant", "system", "user"]):
        with pytest.raises(ValueError, match="alternate"):
            Conversation.of([{"role": role, "content": "x"} for role in roles])
