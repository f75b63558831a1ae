"""`localmoe run --jsonl`: many prompts, one JSON value a line; the answers in the same order, one JSON object a line.

A line is a text, or an object with `prompt` or `messages` and settings of its own. What is wrong with a line is the
answer to that line, and the others go on.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmoe.cli import streams
from localmoe.cli.answer import collect, unmet
from localmoe.cli.config_file import ANSWER, SAMPLING, check_value
from localmoe.cli.prompt import decode
from localmoe.cli.values import suggestion
from localmoe.errors import InputError, LocalMoeError, StorageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

    from localmoe.cli.answer import Answer, Request
    from localmoe.cli.asking import Form
    from localmoe.engine import Engine
    from localmoe.text import Message

_SETTINGS = {**SAMPLING, **{name: ANSWER[name] for name in ("max_tokens", "seed", "stop", "think")}}
_KEYS = ("id", "prompt", "system", "messages", "params", *_SETTINGS)
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Shared:
    """What the lines have in common: the text above each, how it is asked, and how it is answered."""

    above: str
    form: Form
    request: Request
    record: Callable[[Answer], dict[str, Any]]


@dataclass
class Tally:
    """What became of the lines."""

    done: int = 0
    failed: int = 0
    completion_tokens: int = 0
    decode_seconds: float = 0.0
    interrupted: bool = False

    def __str__(self) -> str:
        """One line for the person at the terminal."""
        words = [f"{self.done} answers", f"{self.completion_tokens} tokens"]
        if self.decode_seconds > 0:
            words[1] += f", {(self.completion_tokens - self.done + self.failed) / self.decode_seconds:.1f} tokens/s"
        words += [f"{self.failed} lines failed"] if self.failed else []
        return " · ".join([*words, *(["interrupted"] if self.interrupted else [])])


def open_lines(name: str) -> tuple[BinaryIO, int]:
    """The lines' file and how many lines it has, 0 where that cannot be known. Raises InputError, UsageError."""
    if name == "-":
        if sys.stdin is None or streams.is_terminal(sys.stdin):
            raise UsageError("--jsonl -: nothing is piped in; give a file, or lines on standard input")
        return sys.stdin.buffer, 0
    try:
        file, total = Path(name).open("rb"), 0  # noqa: SIM115  (the caller closes it)
        if file.seekable():
            total = sum(bool(line.strip()) for line in file)
            file.seek(0)
    except OSError as error:
        raise InputError(f"--jsonl: {name}: cannot be read: {error.strerror}") from error
    return file, total


def answer_lines(engine: Engine, lines: BinaryIO, total: int, shared: Shared) -> Tally:
    """Answer every line, writing each answer to standard output as soon as it is there.

    Ctrl-C ends it after the answer under way, which is written as far as it came. Raises what writing raises.
    """
    from localmoe.cli.render import progress_bar

    tally = Tally()
    watched = not streams.is_terminal(sys.stdout)  # at a terminal the answers themselves show how far it is
    with progress_bar("answers", counts="lines") if watched else contextlib.nullcontext() as advance:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = _answer(engine, line, shared, tally, number)
            streams.write_json(record)
            tally.done += 1
            if advance is not None:
                advance(tally.done, total, "")
            if tally.interrupted:
                break
    return tally


def _answer(engine: Engine, line: bytes, shared: Shared, tally: Tally, number: int) -> dict[str, Any]:
    """The object that answers one line."""
    head: dict[str, Any] = {"line": number}
    try:
        content = _read(line, number)
        if content.get("id") is not None:
            head["id"] = content["id"]
        asked, request = _question(content, shared, f"line {number}")
        answer = collect(engine, asked, request, lambda segment: None, reuse_prefix=True)
    except StorageError:
        raise
    except LocalMoeError as error:
        tally.failed += 1
        return head | {"error": {"kind": error.kind, "message": str(error)}}
    tally.completion_tokens += answer.completion_tokens
    tally.decode_seconds += answer.decode_seconds
    tally.interrupted = answer.finish_reason == "interrupted"
    problem = unmet(answer)
    tally.failed += problem is not None
    wrong = {} if problem is None else {"error": {"kind": "grammar", "message": problem}}
    return head | shared.record(answer) | wrong


def _read(line: bytes, number: int) -> dict[str, Any]:
    """A line as an object. Raises InputError naming it."""
    where = f"line {number}"
    text = decode(line, where)
    try:
        content = json.loads(text)
        text = json.dumps(content, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half a character: a \\ud800 to \\udfff without its partner") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {str(error) or 'nested too deep'}") from error
    if isinstance(content, str):
        return {"prompt": content}
    if not isinstance(content, dict):
        raise InputError(f"{where}: a text or an object is needed")
    return content


def _question(content: dict[str, Any], shared: Shared, where: str) -> tuple[str | list[Message], Request]:
    """What a line asks and how. Raises UsageError naming the line and the key."""
    for key, value in content.items():
        if key not in _KEYS:
            raise UsageError(f"{where}: no key {key!r}{suggestion(key, _KEYS)}")
        if key in _SETTINGS and value is not None:
            value = [value] if key == "stop" and isinstance(value, str) else value
            check_value(_SETTINGS[key], key, value, f"{where}: {key}")
    system, params = content.get("system"), content.get("params")
    if not (system is None or isinstance(system, str)):
        raise UsageError(f"{where}: system: a text is needed")
    if not (params is None or (isinstance(params, dict) and all(isinstance(each, str) for each in params.values()))):
        raise UsageError(f"{where}: params: an object of texts is needed")
    if "messages" in content:
        return _messages(content, shared, where), _request(content, shared.request)
    text = content.get("prompt")
    if not (isinstance(text, str) or (text is None and not shared.form.needs_text)):
        raise UsageError(f"{where}: prompt: a text is needed" if "prompt" in content else f"{where}: no prompt")
    if shared.form.raw and system is not None:
        raise UsageError(f"{where}: system: --raw goes without the chat template")
    whole = "\n".join(part for part in (shared.above, text) if part)
    if not whole and shared.form.needs_text and not shared.form.raw:
        raise InputError(f"{where}: the prompt is empty")
    try:
        asked = shared.form.ask(whole, system=system, params=params)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    return asked, _request(content, shared.request)


def _messages(content: dict[str, Any], shared: Shared, where: str) -> list[Message]:
    if shared.above or shared.form.raw or shared.form.template is not None or {"prompt", "system"} & content.keys():
        raise UsageError(f"{where}: messages go without prompt, system, PROMPT, -f, --template and --raw")
    asked = content["messages"]
    if not (isinstance(asked, list) and asked and all(isinstance(each, dict) for each in asked)):
        raise UsageError(f"{where}: messages: a list of objects is needed")
    for each in asked:
        if each.keys() != {"role", "content"} or each["role"] not in _ROLES or not isinstance(each["content"], str):
            raise UsageError(f"{where}: messages: each has a role ({', '.join(_ROLES)}) and a content, a text")
    return [{"role": each["role"], "content": each["content"]} for each in asked]


def _request(content: dict[str, Any], request: Request) -> Request:
    given = {key: value for key, value in content.items() if key in _SETTINGS and value is not None}
    stop = given.pop("stop", request.stop)
    thinking = given.pop("think", request.thinking)
    own = {key: given.pop(key) for key in ("max_tokens", "seed") if key in given}
    sampling = request.sampling | given
    return replace(
        request, sampling=sampling, stop=(stop,) if isinstance(stop, str) else tuple(stop), thinking=thinking, **own
    )
