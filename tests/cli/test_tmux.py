"""`chat` in tmux, a terminal that answers: typed at as a person would, its screens compared.

Nothing sleeps: whatever is waited for is looked for on the screen until it is there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")

PATIENCE = 90.0
PROMPT = ">>>"
OPTIONS = """
set -g status off
set -g default-terminal tmux-256color
set -g history-limit 5000
set -s escape-time 0
"""


class Terminal:
    """One window of a tmux server of its own. What is dumb about it is the program's environment."""

    def __init__(self, command: list[str], environment: Mapping[str, str], columns: int, rows: int) -> None:
        self._directory = tempfile.mkdtemp(prefix="tmux")  # a socket's path has to be short
        options = Path(self._directory, "tmux.conf")
        options.write_text(OPTIONS)
        self._tmux = ["tmux", "-u", "-S", f"{self._directory}/socket", "-f", str(options)]
        inside = [f"{name}={value}" for name, value in environment.items() if name != "TERM" or value == "dumb"]
        size = ["-x", str(columns), "-y", str(rows)]
        # tmux 3.3 sometimes misses the end of a program, so a shell, which lives through Ctrl-C, tells it on the screen
        shell = ["sh", "-c", 'trap : INT; "$@"; echo "left with $?"; read -r _', "sh"]
        started = [*shell, "env", "-u", "TMUX", *inside, *command]
        self._call("new-session", "-d", *size, *started, environment=environment)

    def _call(self, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
        merged = dict(os.environ if environment is None else environment) | {"LC_ALL": "C.UTF-8", "TERM": "xterm"}
        done = subprocess.run(
            [*self._tmux, *arguments], env=merged, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def type(self, text: str) -> None:
        self._call("send-keys", "-l", text)

    def press(self, *keys: str) -> None:
        """Keys by tmux's names: Enter, M-Enter, C-c, Up."""
        self._call("send-keys", *keys)

    def say(self, line: str) -> None:
        """Type a line at the prompt. It is on the screen before Enter is pressed."""
        self.wait(lambda screen: screen.rstrip().split("\n")[-1].strip() != "" and self.at_prompt)
        self.type(line)
        self.press("Enter")

    @property
    def at_prompt(self) -> bool:
        """Whether the cursor is after an empty prompt."""
        x, y = map(int, self._call("display-message", "-p", "#{cursor_x} #{cursor_y}").split())
        return x == len(PROMPT) + 1 and self.screen().split("\n")[y].startswith(PROMPT)

    def paste(self, text: str) -> None:
        """As a terminal pastes: all at once, in brackets where the program asked for them."""
        Path(self._directory, "paste").write_text(text)
        self._call("load-buffer", f"{self._directory}/paste")
        self._call("paste-buffer", "-p")

    def resize(self, columns: int, rows: int) -> None:
        self._call("resize-window", "-x", str(columns), "-y", str(rows))

    def screen(self, *, styles: bool = False, history: bool = False) -> str:
        """What is shown, or all that was."""
        return self._call("capture-pane", "-p", *(["-e"] if styles else []), *(["-S", "-"] if history else []))

    def wait(self, found: Callable[[str], object]) -> str:
        """The screen, with what was scrolled away, as soon as `found` of it is true."""
        deadline = time.monotonic() + PATIENCE
        while not found(screen := self.screen(history=True)):
            assert time.monotonic() < deadline, f"never seen:\n{screen}"
            time.sleep(0.05)
        return screen

    def expect(self, text: str, *, times: int = 1) -> str:
        return self.wait(lambda screen: screen.count(text) >= times)

    def ended(self) -> int:
        """Wait for the program's end; its exit status."""
        found = re.search(r"^left with (\d+)$", self.wait(lambda screen: "left with " in screen), re.MULTILINE)
        assert found is not None
        return int(found[1])

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, check=False)
        shutil.rmtree(self._directory)


@pytest.fixture
def sit_down(program) -> Iterator[Callable[..., Terminal]]:
    terminals: list[Terminal] = []

    def start(*arguments: str, columns: int = 80, rows: int = 24, real: bool = False, **environment: str) -> Terminal:
        command = [sys.executable, "-m", "localmoe"] if real else list(program.command)
        merged = program.environment | {"OMP_NUM_THREADS": "2"} | environment
        terminals.append(Terminal([*command, "chat", *(arguments or ("demo",))], merged, columns, rows))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def lines(screen: str) -> list[str]:
    return [line.rstrip() for line in screen.rstrip().split("\n")]


def test_a_person_on_the_demo(sit_down) -> None:
    """Multi-line, an answer stopped half-way, the same answer again, and away. The reference is slow enough to stop."""
    person = sit_down("demo:source", "--kernels", "reference", "--temp", "0", "--ctx", "256", real=True)
    person.expect("demo:source · context 256 tokens · /help lists the commands")
    person.expect("demo:source · 0 of 256 tokens")  # the status line
    person.type("Tell me a story")
    person.press("M-Enter")
    person.type("about a fox")
    shown = lines(person.expect("... about a fox"))
    assert f"{PROMPT} Tell me a story" in shown
    person.press("Enter")
    asked = "... about a fox\n"
    person.wait(lambda screen: len(screen.rpartition(asked)[2].split()) > 8)  # some words are there
    person.press("C-c")
    person.expect("· stopped")
    person.expect("tokens/s", times=2)  # of the afterword and the status line
    person.say("/set")
    person.expect("greedy: always the likeliest token")
    person.say("/regen")
    person.expect("without a temperature the answer comes out the same")
    screen = person.wait(lambda screen: screen.count(" · context ") == 3 and person.at_prompt)
    stopped, whole = re.findall(r"(?:about a fox|for others)\n\n?(.*?)\n\d+ tokens ·", screen, re.DOTALL)
    first, again = " ".join(stopped.split()), " ".join(whole.split())
    assert len(first) > 20
    assert again.startswith(first)  # and no ^C in it
    person.say("/exit")
    assert person.ended() == 0


def test_a_remark_longer_than_the_line_leaves_nothing_behind(sit_down, home) -> None:
    directory = home / "models" / "demo" / "balanced"
    assert len(f"loading {directory} ...") > 40
    screen = sit_down(str(directory), columns=40).expect("/help lists the commands")
    assert "loading" not in screen
    assert screen.startswith(str(directory)[:40])


def test_history_across_runs(sit_down) -> None:
    person = sit_down()
    person.expect(PROMPT)
    person.type("one")
    person.press("M-Enter")
    person.type("two")
    person.press("Enter")
    person.expect("context 6/64")
    person.say("/exit")
    assert person.ended() == 0
    again = sit_down()
    again.expect("of 64 tokens")
    again.press("Up")
    again.expect("/exit")
    again.press("Up")
    assert [f"{PROMPT} one", "... two"] == lines(again.expect("... two"))[1:3]
    again.press("Enter")
    again.expect("context 6/64")
    again.press("C-d")
    assert again.ended() == 0


def test_a_paste_of_two_hundred_lines_is_one_question(sit_down) -> None:
    person = sit_down(FAKE_CONTEXT="5000")
    person.expect("of 5,000 tokens")
    person.paste("".join(f"line {number}\n" for number in range(200)))
    person.expect("line 199")
    person.press("Enter")
    person.expect("context 404/5000")  # 400 words and an answer of 4
    person.say("/stats")
    person.expect("turns     1")
    assert "... line 199" in person.screen(history=True)


def test_a_chinese_prompt_and_an_answer_of_wide_characters(sit_down) -> None:
    family = "\N{WOMAN}\u200d\N{WOMAN}\u200d\N{GIRL}"
    person = sit_down(columns=40, FAKE_ANSWER=f"从前有一座山，山里有一座庙，庙里有一个老和尚在讲故事。 {family} 完")
    person.expect(PROMPT)
    person.say("给我讲一个故事")
    shown = lines(person.expect("context 4/64"))
    assert f"{PROMPT} 给我讲一个故事" in shown
    first = next(number for number, line in enumerate(shown) if line.startswith("从前"))
    assert "".join(shown[first : first + 2]).startswith("从前有一座山，山里有一座庙，庙里有一个老和尚在讲故事。")
    assert not shown[first + 1].startswith(("，", "。"))


def test_forty_columns(sit_down) -> None:
    answer = "A **bold** fox ran over the long hills and `never` came home again, they say.\n\n- one\n- two"
    person = sit_down(columns=40, rows=20, FAKE_ANSWER=answer)
    person.expect("demo:balanced · 0 of 64 tokens")
    person.say("Go")
    person.expect("context 18/64")
    shown = lines(person.wait(lambda _: person.at_prompt))
    start = shown.index(f"{PROMPT} Go") + 1
    assert [line for line in shown[start:] if line][:7] == [
        "A bold fox ran over the long hills and",
        "never came home again, they say.",
        "• one",
        "• two",
        "17 tokens · 32.0 tokens/s",
        "context 18/64",
        PROMPT,
    ]
    assert shown[-1] == "demo:balanced · 18 of 64 tokens"  # the speed has no room


def test_what_is_typed_during_an_answer_waits_for_the_prompt(sit_down) -> None:
    words = [f"word{number}" for number in range(30)]
    person = sit_down(FAKE_ANSWER=" ".join(words), FAKE_DELAY="0.05")
    person.expect(PROMPT)
    person.say("Go")
    person.expect("word3 ")
    person.type("and then")
    person.expect("context 31/64")
    shown = person.expect(f"{PROMPT} and then")
    assert " ".join(words) in shown.replace("\n", " ")
    person.press("Enter")
    person.expect("context 63/64")


def test_a_resize_in_the_middle_of_an_answer(sit_down) -> None:
    words = [f"word{number}" for number in range(60)]
    person = sit_down(FAKE_ANSWER=" ".join(words), FAKE_DELAY="0.05", FAKE_CONTEXT="500")
    person.expect(PROMPT)
    person.say("Go")
    person.expect("word12 ")
    person.resize(50, 20)
    person.expect("word30")
    person.resize(100, 30)
    person.expect("context 61/500")
    shown = person.screen(history=True)
    assert re.findall(r"word\d+", shown) == words  # nothing twice, nothing lost
    person.say("/exit")
    assert person.ended() == 0


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_where_none_is_wanted(sit_down, environment) -> None:
    person = sit_down(FAKE_ANSWER="It is **bold**.", **environment)
    person.expect(PROMPT)
    person.say("Hello")
    person.expect("context 4/64")
    person.wait(lambda _: person.at_prompt)
    assert "\x1b[" not in person.screen(styles=True, history=True)
    is_dumb = "TERM" in environment
    assert ("demo:balanced · 4 of 64 tokens" in person.screen()) == (not is_dumb)  # no status line on a dumb terminal
    person.say("/exit")
    assert person.ended() == 0


def test_colour_where_it_is(sit_down) -> None:
    person = sit_down(FAKE_ANSWER="It is **bold**.")
    person.expect(PROMPT)
    person.say("Hello")
    person.expect("context 4/64")
    assert re.search(r"\x1b\[1mbold\x1b\[0m", person.screen(styles=True))


def test_a_session_is_there_again(sit_down) -> None:
    """Left with Ctrl-D and come back to: what was said is shown, and the next question goes on from it unread again."""
    session = ("demo:source", "--session", "fox", "--temp", "0", "-n", "12", "--ctx", "256")
    person = sit_down(*session, real=True)
    person.expect("session fox begins")
    person.say("Tell me a story about a fox")
    shown = person.expect("12 tokens · ")
    answer = " ".join(re.split(r"about a fox\n\n?", shown, maxsplit=1)[1].rpartition("\n12 tokens")[0].split())
    assert len(answer) > 10
    used = int(re.findall(r"context (\d+)/256", shown)[-1])
    person.wait(lambda _: person.at_prompt)
    person.press("C-d")
    assert person.ended() == 0

    again = sit_down(*session, real=True)
    shown = again.wait(lambda _: again.at_prompt)
    held = re.search(r"session fox goes on: 1 turn, (\d+) tokens\n  > (.*)\n((?:    .*\n|\n)+)", shown)
    assert held is not None, shown
    assert used - 1 <= int(held[1]) <= used  # the last token has not been through the model
    assert (held[2], " ".join(held[3].split())) == ("Tell me a story about a fox", answer)
    again.expect(f"demo:source · {held[1]} of 256 tokens")  # the status line knows it too
    again.say("And then?")
    again.expect("12 tokens · ")
    again.say("/stats")
    known = re.search(r"last      prompt (\d+) tokens, (\d+) of them known", again.expect("of them known"))
    assert known is not None
    assert used - 1 <= int(known[2]) < int(known[1])
    again.wait(lambda _: again.at_prompt)
    again.press("C-d")
    assert again.ended() == 0
