"""The checkpoint's own chat template, and messages turned into token ids with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from localmoe.errors import CheckpointError, TemplateError
from localmoe.text.files import read_json_object
from localmoe.text.thinking import THINKING_TAGS
from localmoe.text.tokenizer import special_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from jinja2 import Template

    from localmoe.text.sandbox import TemplateSandbox
    from localmoe.text.tokenizer import Tokenizer

_Parsed = TypeVar("_Parsed")

Message = Mapping[str, Any]
"""One turn: `role` ("system", "user", "assistant") and `content`, and whatever else the template reads."""

MAX_SOURCE = 1_000_000  # characters; the longest published template has some 10,000

# V3.1's template asks for the first, GLM's for the second.
_THINKING_SWITCHES = ("thinking", "enable_thinking")

# Unicode noncharacters, "intended for process-internal uses": they enclose what a message spells out.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_BRACKETS = {"<": ">", "[": "]"}


class ChatTemplate:
    """A Jinja template, run in a sandbox with limits (sandbox.py), with the variables transformers gives it."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str], origin: str = "chat template") -> None:
        """`origin` names the file in messages. Nothing is parsed until the template is used."""
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._origin = origin

    @classmethod
    def from_directory(cls, directory: Path) -> ChatTemplate | None:
        """The template a checkpoint ships: `chat_template.jinja`, or the one in `tokenizer_config.json` (of
        several named ones, `default`). None when it has none; CheckpointError when it cannot be read."""
        config_path = directory / "tokenizer_config.json"
        config = read_json_object(config_path)
        path = directory / "chat_template.jinja"
        try:
            source: object = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            path = config_path
            source = _default_template(config.get("chat_template"), path)
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        if source is None:
            return None
        if not isinstance(source, str):
            raise CheckpointError(f"{path}: chat_template is neither a text nor a list of named texts")
        return cls(source, special_tokens=special_tokens(config), origin=str(path))

    @property
    def switches_thinking(self) -> bool:
        """Whether the template looks at a thinking switch. Raises TemplateError when it is not valid Jinja."""
        return bool(self._switches)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, thinking: bool | None = None
    ) -> str:
        """The prompt as text, exactly as transformers renders it.

        `thinking` None leaves the choice to the template. Raises TemplateError with the template's own words
        when it refuses the conversation, and when it fails or runs out of its limits.
        """
        from jinja2 import TemplateError as JinjaError

        template = self._prepared  # a syntax error is reported as such, with its line
        switches = {} if thinking is None else dict.fromkeys(_THINKING_SWITCHES, thinking)
        try:
            variables: dict[str, Any] = {
                **self._special_tokens,
                "messages": [_plain_data(message) for message in messages],
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **switches,
            }
            return self._sandbox.render(template, variables)
        except JinjaError as error:
            raise self._error("cannot render this conversation", error) from error
        except (MemoryError, RecursionError) as error:
            raise self._error("needs too much memory", error) from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise self._error("fails on this conversation", error) from error

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
    ) -> list[int]:
        """The prompt as token ids, in which only the template writes control tokens.

        A message that spells one out ("what does <｜User｜> mean?") stays text, letter by letter as it was, so
        nobody's pasted document can pose as another turn. The thinking tags of an assistant's own turn are
        taken as tokens. Without such spelling this is the plain encoding of `render`.
        """
        pattern = tokenizer.control_pattern
        options: Any = {"add_generation_prompt": add_generation_prompt, "thinking": thinking}
        if not any(pattern.search(text) for text in _texts(list(messages))):
            # The template writes the beginning of the text itself
            return tokenizer.encode(self.render(messages, **options), add_bos=False)
        marked = [_marked(message, pattern) for message in messages]
        return _encode_marked(tokenizer, self.render(marked, **options))

    def turn_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The control tokens that this template frames messages with, thinking tags aside: a model that writes one in
        an answer begins another turn.

        Read off a short conversation; empty where the template refuses it. An added token that is neither marked
        special nor in brackets (some checkpoints add letters) may be a word of the template, and is left out.
        """
        turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
        for chat in (turns, turns[1:]):  # some know no system's turn
            try:
                text = self.render(chat)
            except TemplateError:
                continue
            written = set(tokenizer.control_pattern.findall(text)).difference(THINKING_TAGS)
            ids = {tokenizer.control_tokens[token]: token for token in written}
            marked = tokenizer.unspoken_ids
            return frozenset(i for i, token in ids.items() if i in marked or _BRACKETS.get(token[0]) == token[-1])
        return frozenset()

    @cached_property
    def _sandbox(self) -> TemplateSandbox:
        from localmoe.text.sandbox import TemplateSandbox  # Jinja is slow to import, and `--raw` needs none

        return TemplateSandbox()

    @cached_property
    def _prepared(self) -> Template:
        return self._parse(self._sandbox.prepare)

    @cached_property
    def _switches(self) -> frozenset[str]:
        from jinja2 import meta

        parsed = self._parse(self._sandbox.parse)
        return frozenset(meta.find_undeclared_variables(parsed)).intersection(_THINKING_SWITCHES)

    def _parse(self, parse: Callable[[str], _Parsed]) -> _Parsed:
        from jinja2 import TemplateSyntaxError

        if len(self.source) > MAX_SOURCE:
            raise TemplateError(f"{self._origin}: the chat template is larger than {MAX_SOURCE:,} characters")
        try:
            return parse(self.source)
        except TemplateSyntaxError as error:
            raise self._error(f"is not valid (line {error.lineno})", error) from error
        except (RecursionError, MemoryError) as error:
            raise self._error("is nested too deeply", error) from error

    def _error(self, what: str, error: BaseException) -> TemplateError:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        return TemplateError(f"{self._origin}: the chat template {what}: {said}; `--raw` goes without it")


def _default_template(value: object, path: Path) -> object:
    """`tokenizer_config.json` holds one template, or a list of `{"name", "template"}`."""
    if not isinstance(value, list):
        return value
    try:
        named = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError):
        raise CheckpointError(f"{path}: chat_template lists something without a name and a template") from None
    if named and "default" not in named:
        raise CheckpointError(f"{path}: none of the chat templates ({', '.join(map(str, named))}) is named default")
    return named.get("default")


def _plain_data(value: Any) -> Any:
    """Rebuilt from JSON's own types, so that no object's methods are within the template's reach."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_data(item) for item in value]
    raise TemplateError(f"a message holds a {type(value).__name__}; it may hold only what JSON can")


def _texts(value: Any) -> Iterator[str]:
    """Every text in a message or a list of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _marked(message: Message, pattern: re.Pattern[str]) -> dict[str, Any]:
    """The message with every control token it spells out enclosed in marks."""
    kept = THINKING_TAGS if message.get("role") == "assistant" else ()

    def enclose(found: re.Match[str]) -> str:
        return found[0] if found[0] in kept else f"{_OPEN}{found[0]}{_CLOSE}"

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(enclose, value.replace(_OPEN, "").replace(_CLOSE, ""))
        if isinstance(value, Mapping):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [walk(item) for item in value]
        return value

    return {key: walk(value) for key, value in message.items()}


def _encode_marked(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a rendered text: unmarked control tokens as such, all else, marked ones too, as plain text.

    A template's string methods may part the two marks of a token (`split('</think>')`); a lone mark is
    dropped, and what stands around it is plain text or a token by itself, never joined to one.
    """
    control = tokenizer.control_tokens
    first = "".join(map(re.escape, {_OPEN, _CLOSE, *(token[0] for token in control)}))  # most characters are none
    pieces = re.compile(
        f"(?=[{first}])(?:{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}|[{_OPEN}{_CLOSE}]|({tokenizer.control_pattern.pattern}))"
    )
    ids: list[int] = []
    plain: list[str] = []
    end = 0

    def flush() -> None:
        ids.extend(tokenizer.encode("".join(plain), add_bos=False, control=False))
        plain.clear()

    for found in pieces.finditer(text):
        plain.append(text[end : found.start()])
        end = found.end()
        if found[2] is not None:
            flush()
            ids.append(control[found[2]])
        elif found[1] is not None:
            plain.append(found[1])
    plain.append(text[end:])
    flush()
    return ids
