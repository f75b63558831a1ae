"""The line a user types in a chat: editing, history across runs, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession, prompt
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.styles import Style

from localmoe import store
from localmoe.cli import streams, transcript
from localmoe.cli.completion import models
from localmoe.cli.sanitize import printable_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.key_binding import KeyPressEvent

PROMPT = ">>> "
_TAKE_A_FILE = ("/file", "/save", "/load", "/export")


class LineEditor:
    """Reads the user's lines, with `status` under them where the terminal can. Enter sends, Alt-Enter begins a new
    line, a pasted text keeps its lines."""

    def __init__(self, commands: Sequence[str] = (), status: Callable[[], str] | None = None) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history(),
            key_bindings=_bindings(),
            completer=_Completer(commands),
            complete_while_typing=False,
            enable_open_in_editor=True,  # Ctrl-X Ctrl-E
            prompt_continuation="... ",
            bottom_toolbar=status,  # not on a dumb terminal, where the session is a plain line
            style=Style.from_dict({"bottom-toolbar": "noreverse" if os.environ.get("NO_COLOR") else "noreverse dim"}),
        )

    def read(self, draft: str = "") -> str | None:
        """The next line, or None when the user leaves: Ctrl-D, or Ctrl-C twice on an empty line.

        `draft` is what the line begins with."""
        warned = False
        while True:
            try:
                return self._session.prompt(PROMPT, default=draft)
            except EOFError:
                return None
            except KeyboardInterrupt:
                if self._session.default_buffer.text:
                    warned, draft = False, ""  # it cleared the line, which is all that was meant
                    continue
                if warned:
                    return None
                warned = True
                streams.write("Ctrl-C again, Ctrl-D or /exit leaves", faint=True)
                streams.write("\n")

    def choose(self, question: str) -> bool:
        """Whether the user says yes to `question`; no answer is a no."""
        try:
            answer: str = prompt(f"{question} [y/N] ")
        except (EOFError, KeyboardInterrupt):
            return False
        return answer.strip().lower() in ("y", "yes")


class _Completer(Completer):
    """Slash commands, and what they take: file names, models, conversations that are kept."""

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = sorted(set(commands))
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        command, space, argument = document.text_before_cursor.partition(" ")
        if not space and command.startswith("/"):
            yield from (Completion(c, start_position=-len(command)) for c in self._commands if c.startswith(command))
        elif command == "/model":
            names = (name for name in models() if name.startswith(argument))
            yield from (Completion(name, start_position=-len(argument)) for name in names)
        elif command in _TAKE_A_FILE:
            kept = (name for name in transcript.names() if name.startswith(argument)) if command == "/load" else ()
            yield from (Completion(name, start_position=-len(argument)) for name in kept)
            inner = Document(argument, len(argument))
            for found in self._paths.get_completions(inner, complete_event):
                if found.text == printable_line(found.text):  # a file name can hold what a terminal acts on
                    yield found


def _history() -> History:
    """The history file, readable by its owner alone; without a place to write, a history that ends with the chat."""
    path = store.home() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        streams.tell(f"localmoe: no history will be kept: {path}: {error.strerror}")
        return InMemoryHistory()
    return FileHistory(str(path))


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    after_backslash = Condition(lambda: get_app().current_buffer.document.text_before_cursor.endswith("\\"))

    @bindings.add("enter", filter=after_backslash)
    def _(event: KeyPressEvent) -> None:  # for terminals that keep Alt-Enter to themselves
        event.current_buffer.delete_before_cursor()
        event.current_buffer.insert_text("\n")

    return bindings
