"""The line a user types in a chat: editing, history across runs, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings

from localmoe import store
from localmoe.cli import streams

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyPressEvent

PROMPT = ">>> "


class LineEditor:
    """Reads the user's lines. Enter sends, Alt-Enter begins a new line, a pasted text keeps its lines."""

    def __init__(self) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history(),
            key_bindings=_bindings(),
            enable_open_in_editor=False,
            prompt_continuation="... ",
        )

    def read(self) -> str | None:
        """The next line, or None when the user leaves: Ctrl-D, or Ctrl-C twice on an empty line."""
        warned = False
        while True:
            try:
                return self._session.prompt(PROMPT)
            except EOFError:
                return None
            except KeyboardInterrupt:
                if self._session.default_buffer.text:
                    warned = False  # it cleared the line, which is all that was meant
                    continue
                if warned:
                    return None
                warned = True
                streams.write("Ctrl-C again, Ctrl-D or /exit leaves", faint=True)
                streams.write("\n")


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

    return bindings
