"""The loop of `localmoe chat`: read a line, obey it or answer it."""

from __future__ import annotations

import base64
import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from localmoe.cli import model_argument, options, settings, speed, streams, transcript, units
from localmoe.cli.answer import Answer, Request, collect
from localmoe.cli.chat_words import afterword, recap, statistics
from localmoe.cli.conversation import Conversation, Turn
from localmoe.cli.kept import Kept, turns_to_drop
from localmoe.cli.status import folded, status
from localmoe.cli.values import near_miss, suggestion
from localmoe.errors import ContextOverflowError, LocalMoeError, StorageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from localmoe.cli.model_switch import ModelSwitch
    from localmoe.engine import Engine

COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation (the system prompt stays)",
    "/system TEXT": "set the system prompt; without TEXT show it",
    "/regen": "answer the last question again",
    "/undo": "forget the last question and its answer",
    "/edit": "take back the last question to change it",
    "/file PATH": "send a text file along with the next question",
    "/set NAME VALUE": "temp, top_p, top_k, min_p, a penalty, seed; alone: show them",
    "/think show|hide": "leave the thinking on the screen, or fold it to one line",
    "/think off|on": "answer at once, or think first, where the template can",
    "/save NAME": "keep the conversation; NAME may be a path",
    "/load NAME": "go on with a conversation that was kept",
    "/export FILE.md": "write the conversation as Markdown",
    "/copy": "put the last answer on the clipboard (the terminal's: OSC 52)",
    "/model NAME": "go on with another model; without NAME say which this is",
    "/stats": "model, context used, speed of the last answer",
    "/exit": "leave (so does Ctrl-D)",
}
ELSEWHERE = {  # what other programs call them
    "/?": "/help",
    "/bye": "/exit",
    "/clear": "/reset",
    "/new": "/reset",
    "/q": "/exit",
    "/quit": "/exit",
    "/retry": "/regen",
}
KEYS = (
    "Ctrl-C stops an answer. Alt-Enter begins a new line, so does Enter after a backslash. The arrow keys bring back "
    "earlier questions, Ctrl-R searches them, Tab completes commands and files."
)


@dataclass(frozen=True)
class Asking:
    """The person at the keyboard."""

    read: Callable[[str], str | None]
    """The next line, beginning with the draft given; None when the person leaves (Ctrl-D, Ctrl-C twice)."""
    choose: Callable[[str], bool]
    """Whether the question given is answered with yes; anything but a yes is a no."""


class Chat:
    """The loop: read a line, obey it or answer it."""

    def __init__(self, engine: Engine, name: str, request: Request, conversation: Conversation, kept: Kept) -> None:
        self.switch: ModelSwitch | None = None  # what /model changes the model with
        self.explains = False  # the speed of every answer
        self._engine = engine
        self._kept = kept
        self._choose: Callable[[str], bool] = lambda question: False
        self._name = name
        self._request = request
        self._conversation = conversation
        self._last: Answer | None = None
        self._unanswered: str | None = None  # stopped before its first word; /regen asks it again
        self._shows_thinking = False
        self._draft = ""  # what the next prompt begins with
        self._attached: list[str] = []  # files that go with the next question

    def close(self) -> None:
        """Close the engine that the chat ended with."""
        self._engine.close()

    def status(self) -> str:
        """The line under the prompt."""
        return status(self._engine, self._name, self._last, self._conversation.used or 0)

    def _count(self) -> None:
        """Know how much of the context the conversation takes, which was changed by something else than an answer."""
        if self._conversation.used is None:
            messages, thinking = self._conversation.messages, self._request.thinking
            with contextlib.suppress(LocalMoeError):  # of its template: the next answer says what is wrong
                self._conversation.count(len(self._engine.prompt_ids(messages, thinking=thinking)))

    def _next_draft(self) -> str:
        draft, self._draft = self._draft, ""
        return draft

    def talk(self, asking: Asking) -> None:
        """Until the person leaves. A session is written after answers, now and then, and at the end: whoever leaves
        while that fails is told first, and has the chance to stay."""
        self._choose = asking.choose
        _say(f"{self._name} · context {self._engine.max_context} tokens · /help lists the commands")
        if self._kept.name is not None:
            _say(recap(self._kept, self._conversation))
        try:
            while True:
                self._listen(asking)
                if self._save_session():
                    return
                _say("the conversation is still here: make room, or leave again to lose it (/save NAME keeps its text)")
                if self._listen_once(asking) is None:
                    break
        except SystemExit:  # the terminal was closed, or the machine shuts down
            self._save_session()
            raise
        raise StorageError(f"session {self._kept.name} could not be written")

    def _listen(self, asking: Asking) -> None:
        while self._listen_once(asking) is not None:
            pass

    def _listen_once(self, asking: Asking) -> str | None:
        """Read a line and do what it says; None when it was to leave."""
        line = asking.read(self._next_draft())
        text = "/exit" if line is None else line.strip()
        if text == "/exit" or line is None:
            return None
        try:
            if text.startswith("/") and "/" not in text[1:].partition(" ")[0]:  # a path begins a question
                self._obey(text)
            elif text:
                attached, self._attached = self._attached, []
                self._answer("\n".join([line, *attached]), attached)
        except KeyboardInterrupt:  # between two pieces of work; the conversation is whole
            _say("\nstopped")
        except LocalMoeError as error:
            _say(f"{error}")
        return text

    def _save_session(self) -> bool:
        """Whether the session is on disk, or there is none to keep."""
        if self._kept.is_new and not self._conversation.turns:
            return True
        try:
            self._kept.save(self._engine, self._name, self._conversation, self._request)
        except LocalMoeError as error:
            _say(f"{error}")
            return False
        except KeyboardInterrupt:
            _say("the session was not written")
            return False
        return True

    def _obey(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if argument and command in COMMANDS and command != "/help":  # those that take something have its name there
            raise UsageError(f"{command} takes nothing after it")
        obey = self._commands.get(command)
        if obey is not None:
            obey(argument)
            return
        near = near_miss(command, [*self._commands, "/exit"], ELSEWHERE)
        _say(f"no such command: {command}; " + (f"did you mean {near}?" if near else "/help lists them"))

    @property
    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._set_system,
            "/regen": lambda _: self._regenerate(),
            "/undo": self._undo,
            "/edit": self._edit,
            "/file": self._attach,
            "/set": self._set,
            "/think": self._think,
            "/save": self._save,
            "/load": self._load,
            "/export": self._export,
            "/copy": self._copy,
            "/model": self._change_model,
            "/stats": lambda _: _say(self._statistics()),
        }

    def _help(self, _: str) -> None:
        width = max(map(len, COMMANDS))
        _say("\n".join([*(f"{name:<{width}}  {what}" for name, what in COMMANDS.items()), KEYS]))

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._last = self._unanswered = None
        self._attached.clear()
        _say("forgotten")

    def _undo(self, _: str) -> None:
        turn = self._conversation.take_back()
        self._count()
        left = units.are_left(len(self._conversation.turns), "turn")
        _say("nothing to take back" if turn is None else f"forgotten; {left}")

    def _edit(self, _: str) -> None:
        turn = self._conversation.take_back()
        if turn is None:
            _say("nothing to edit yet")
        else:
            self._count()
            self._draft = turn.question

    def _attach(self, name: str) -> None:
        from localmoe.cli.prompt import fenced

        if not name:
            raise UsageError("/file PATH names the file to send along")
        text = fenced(Path(os.path.expanduser(name)))  # noqa: PTH111  (Path's raises for an unknown user)
        self._attached.append(text)
        _say(f"{name} goes with the next question ({units.counted(text.count(chr(10)) - 2, 'line')})")

    def _set(self, argument: str) -> None:
        typed, _, value = argument.partition(" ")
        name = {"temp": "temperature"}.get(typed.replace("-", "_"), typed.replace("-", "_"))
        if not name:
            _say(self._settings)
            return
        if name not in (*self._request.sampling, "seed"):
            known = ["temp", *list(self._request.sampling)[1:], "seed"]
            raise UsageError(f"/set: no setting {name!r}{suggestion(name, known)}")
        if not value.strip():
            now = self._request.seed if name == "seed" else f"{self._request.sampling[name]:g}"
            raise UsageError(f"/set {typed} VALUE sets it; it is {'not set' if now is None else now}")
        try:
            number = float(value)
        except ValueError:
            raise UsageError(f"/set {name}: {value!r} is not a number") from None
        if name == "seed":
            if not 0 <= number < 1 << 63 or number != int(number):
                raise UsageError(f"/set seed: a whole number from 0 on is needed, not {value}")
            exact = value.strip().isdecimal()  # a float holds 53 bits of it
            self._request = replace(self._request, seed=int(value) if exact else int(number))
        else:
            options.check_sampling(name, number, f"/set {name}")
            changed = self._request.sampling | {name: int(number) if name == "top_k" else number}
            self._request = replace(self._request, sampling=changed)
        _say(self._settings)

    @property
    def _settings(self) -> str:
        return settings.as_text(self._request.sampling, self._request.seed)

    def _think(self, how: str) -> None:
        if how in ("show", "hide"):
            self._shows_thinking = how == "show"
            _say("thinking stays on the screen" if self._shows_thinking else "thinking is folded to one line")
        elif how in ("off", "on"):
            template = self._engine.chat_template
            if template is not None and not template.switches_thinking:
                raise UsageError(f"/think {how}: this model's chat template has no switch for thinking")
            self._request = replace(self._request, thinking=how == "on")
            _say(f"thinking is {how} from the next answer on")
        else:
            _say((self._last.thinking.strip() if self._last else "") or "/think show, hide, off or on")

    def _save(self, name: str) -> None:
        path = transcript.path_of(name)
        transcript.save(self._conversation, path)
        _say(f"saved to {path}")

    def _load(self, name: str) -> None:
        self._conversation = transcript.load(transcript.found(name))
        self._last = self._unanswered = None
        self._count()
        turns = units.counted(len(self._conversation.turns), "turn")
        _say(f"{turns}; the conversation goes on from there")

    def _export(self, name: str) -> None:
        if not name:
            raise UsageError("/export FILE.md names the file to write")
        transcript.export(self._conversation, Path(os.path.expanduser(name)))  # noqa: PTH111
        _say(f"written to {name}")

    def _copy(self, _: str) -> None:
        if not self._conversation.turns:
            _say("nothing to copy yet")
        elif os.environ.get("TERM", "dumb") == "dumb":
            _say("this terminal cannot copy; /export FILE.md writes the conversation")
        else:
            data = base64.b64encode(self._conversation.turns[-1].answer.encode()).decode()
            streams.draw(f"\x1b]52;c;{data}\x07")
            _say("copied, if this terminal lets programs copy")

    def _change_model(self, model: str) -> None:
        if not model or self.switch is None:
            _say(f"{self._name} ({self._engine.path}); /model NAME goes on with another one")
            return
        opened = self.switch(self._engine, self._request, model_argument.meant(model))
        self._engine, self._name, self._request = opened.engine, opened.name, opened.request
        self._last = None
        self._conversation.count(None)
        self._count()
        _say(opened.problem or f"{self._name} · context {self._engine.max_context} tokens · the conversation goes on")

    def _set_system(self, text: str) -> None:
        if text:
            self._conversation.system = text
            _say("set; it counts from the next answer on")
        else:
            _say(self._conversation.system or "no system prompt; /system TEXT sets one")

    def _regenerate(self) -> None:
        if self._unanswered is not None:
            self._answer(self._unanswered)
            return
        turn = self._conversation.take_back()
        if turn is None:
            _say("nothing to answer again yet")
            return
        if self._request.sampling["temperature"] == 0:
            _say("without a temperature the answer comes out the same; start chat with --temp 0.7 for others")
        if not self._answer(turn.question):
            self._conversation.add(turn)

    def _answer(self, question: str, attached: Sequence[str] = ()) -> bool:
        """Answer `question`, the `attached` files included, and remember the turn; whether there was an answer."""
        self._unanswered = question
        messages = self._conversation.asking(question)
        from localmoe.cli.answer_view import AnswerView

        answer = Answer()
        view = AnswerView(answer, show_thinking=self._shows_thinking)
        timed = speed.timer(self._engine) if self.explains else None
        try:
            with streams.no_echo():
                collect(
                    self._engine, messages, self._numbered(), view.show, reuse_prefix=True, into=answer, timed=timed
                )
        except ContextOverflowError:
            self._unanswered = None
            return self._make_room(question, attached) and self._answer(question, attached)
        finally:
            view.finish()
        self._last = answer
        _say(afterword(answer, self._engine.max_context) + "\n")
        if timed is not None:
            speed.tell(speed.of_answer(self._engine, timed, answer))
        if not answer.text:
            return False
        self._unanswered = None
        self._conversation.add(Turn(question, answer.text, answer.prompt_tokens + answer.completion_tokens))
        if self._kept.is_due:
            self._save_session()
        return True

    def _make_room(self, question: str, attached: Sequence[str]) -> bool:
        """Let go of old turns for `question`, if the person wants it so; else its files wait for the next one."""
        count = turns_to_drop(self._engine, self._conversation, question, self._request.thinking)
        turns = len(self._conversation.turns)
        _say(f"the conversation no longer fits the context of {self._engine.max_context} tokens")
        if not count:
            _say("the last message was not added: even alone it is too long")
        elif self._choose(f"Drop the oldest {count} of {units.counted(turns, 'turn')} and go on?"):
            self._conversation.drop_oldest(count)
            self._count()
            _say(f"dropped; {units.are_left(turns - count, 'turn')}")
            return True
        else:
            self._attached[:0] = attached
            kept = "; its files go with the next question" if attached else ""
            _say(f"the last message was not added{kept}. /reset begins a new conversation, a shorter one may still fit")
        return False

    def _statistics(self) -> str:
        return statistics(self._engine, self._name, self._request, self._conversation, self._last, self._kept)

    def _numbered(self) -> Request:
        """The request with a seed of its own, so that with --seed the chat repeats but /regen does not."""
        request, seed = self._request, self._request.seed
        if seed is not None:
            self._request = replace(request, seed=(seed + 1) % (1 << 63))
        return request


def _say(text: str) -> None:
    streams.write(folded(text, streams.columns()), faint=True)
    streams.write("\n")
