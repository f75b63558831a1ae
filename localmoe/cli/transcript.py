"""A conversation in a file: saved and taken up again as JSON, or exported as Markdown to read."""

from __future__ import annotations

import json
import os
from pathlib import Path

from localmoe import store
from localmoe.cli.conversation import Conversation, Turn
from localmoe.cli.values import suggestion
from localmoe.errors import InputError, StorageError, UsageError
from localmoe.formats.files import write_atomically

_FORMAT = 1


def path_of(name: str) -> Path:
    """Where a conversation called `name` lies: a path as it is, a plain word among localmoe's own files."""
    if not name:
        raise UsageError("give it a name, or a path")
    if "/" in name or name.endswith(".json") or name.startswith("~"):
        return Path(os.path.expanduser(name))  # noqa: PTH111  (Path's raises for an unknown user)
    return _directory() / f"{name}.json"


def names() -> list[str]:
    """The conversations among localmoe's own files."""
    return sorted(path.stem for path in _directory().glob("*.json"))


def found(name: str) -> Path:
    """The same of a conversation to be read. Raises InputError for a word that none is called."""
    path, known = path_of(name), names()
    if path.parent == _directory() and not path.exists():
        there = suggestion(name, known) if known else "; /save NAME keeps one"
        raise InputError(f"no conversation is kept as {name}{there}")
    return path


def _directory() -> Path:
    return store.home() / "chats"


def save(conversation: Conversation, path: Path) -> None:
    """Write the conversation, readable by its owner alone. Raises StorageError."""
    turns = [{"question": turn.question, "answer": turn.answer} for turn in conversation.turns]
    content = {"localmoe_chat": _FORMAT, "system": conversation.system, "turns": turns}
    _write(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def load(path: Path) -> Conversation:
    """Read what `save` wrote. Raises InputError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not a saved conversation") from error
    try:
        if content["localmoe_chat"] != _FORMAT:
            raise InputError(f"{path}: was saved by another version of localmoe")
        system, turns = content["system"], [(turn["question"], turn["answer"]) for turn in content["turns"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: is not a saved conversation") from error
    texts = [text for turn in turns for text in turn] + ([] if system is None else [system])
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{path}: is not a saved conversation")
    return Conversation(system, [Turn(question, answer) for question, answer in turns])


def export(conversation: Conversation, path: Path) -> None:
    """Write the conversation as Markdown to a new file. Raises StorageError, UsageError where there is one already."""
    if path.exists():
        raise UsageError(f"{path} is there already; choose another name")
    parts = [f"> {line}" for line in (conversation.system or "").splitlines()]
    parts = ["\n".join(parts)] if parts else []
    for turn in conversation.turns:
        parts += [f"## Question\n\n{turn.question}", f"## Answer\n\n{turn.answer}"]
    _write(path, "\n\n".join(parts) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode(), mode=0o600)  # a conversation is its owner's
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
