"""Text to token ids and back, through the checkpoint's own `tokenizer.json` (or `tiktoken.model`, see tiktoken.py).

`decode` keeps control tokens visible. An answer's text (`stream`) is without those marked "special", except `<think>`
and `</think>`: some checkpoints mark them and others don't, and what a model said should not depend on it. Encoding
decides by who wrote the text (`encode`'s `control`).
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmoe.errors import CheckpointError
from localmoe.text import tiktoken
from localmoe.text.files import read_json_object
from localmoe.text.thinking import THINKING_TAGS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import tokenizers

FILE = "tokenizer.json"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


class Tokenizer:
    """A `tokenizer.json` with what `tokenizer_config.json` says about beginnings and ends."""

    def __init__(
        self, definition: str, *, special_tokens: dict[str, str], add_bos: bool | None, eos_ids: Iterable[int]
    ) -> None:
        """`definition` is the text of a `tokenizer.json`; `add_bos` is what `tokenizer_config.json` says, None
        when it says nothing (then the tokenizer's own post-processor decides). Raises ValueError."""
        self.definition = definition
        self._rust = _build(definition)
        self.special_tokens = special_tokens
        self.vocab_size: int = self._rust.get_vocab_size(with_added_tokens=True)
        self.bos_id: int | None = self._id_of("bos_token")
        eos = self._id_of("eos_token")
        self.eos_ids = frozenset(eos_ids) | (frozenset() if eos is None else {eos})
        self._prefix = self._beginning(add_bos)

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Read a checkpoint's tokenizer. Raises CheckpointError naming the file that is missing or damaged."""
        path, definition = _read_definition(directory)
        config = read_json_object(directory / "tokenizer_config.json")
        add_bos = config.get("add_bos_token")
        if add_bos is not None and not isinstance(add_bos, bool):
            raise CheckpointError(f"{directory / 'tokenizer_config.json'}: add_bos_token is not true or false")
        try:
            return cls(
                definition,
                special_tokens=special_tokens(config),
                add_bos=add_bos,
                eos_ids=end_token_ids(directory),
            )
        except ValueError as error:
            raise CheckpointError(f"{path}: not a usable tokenizer: {error}") from error

    def encode(self, text: str, *, add_bos: bool, control: bool = True) -> list[int]:
        """Token ids of `text`.

        `add_bos` asks for the beginning this checkpoint puts before a text (often one token, sometimes none).
        `control` says whether control tokens spelled out in `text` become control tokens: True for a prompt the
        user writes whole, False for text that must stay text (a chat message).
        """
        encoder = self._rust if control else self._plain
        ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
        if not control:
            ids = self._respell(ids)
        return [*self._prefix, *ids] if add_bos else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens included. An id without a token (padding rows of the head) is empty."""
        text: str = self._rust.decode(list(ids), skip_special_tokens=False)
        return text

    def knows(self, token_id: int) -> bool:
        """Whether the id stands for a token at all: heads are often padded to a round number of rows."""
        return self._rust.id_to_token(token_id) is not None

    def stream(self) -> StreamingDetokenizer:
        """A detokenizer for one answer."""
        return StreamingDetokenizer(self)

    @cached_property
    def unspoken_ids(self) -> frozenset[int]:
        """The tokens that never show in an answer: what is marked "special", thinking tags aside."""
        added = self._rust.get_added_tokens_decoder().items()
        return frozenset(id_ for id_, token in added if token.special and token.content not in THINKING_TAGS)

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Every added token by its text. Not only the "special" ones: V3's `<｜User｜>` is not marked as such."""
        return {token.content: id_ for id_, token in self._rust.get_added_tokens_decoder().items() if token.content}

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches any control token, the longest one where several begin."""
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer knowing no added tokens: whatever a text spells stays a text."""
        import tokenizers

        plain = tokenizers.Tokenizer(self._rust.model)  # shares the model: nothing is parsed again
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            setattr(plain, part, getattr(self._rust, part))
        return plain

    def _respell(self, ids: list[int]) -> list[int]:
        """Where the vocabulary itself merges plain text into a control token, spell that one in pieces."""
        control = {id_: content for content, id_ in self.control_tokens.items()}
        if control.keys().isdisjoint(ids):
            return ids
        pieces: list[int] = []
        for id_ in ids:
            spelled = [id_]
            if id_ in control:
                characters = list(control[id_])
                spelled = [i for c in characters for i in self._plain.encode(c, add_special_tokens=False).ids]
            pieces += (i for i in spelled if i not in control)
        return pieces

    def _id_of(self, name: str) -> int | None:
        content = self.special_tokens.get(name)
        if content is None:
            return None
        found: int | None = self._rust.token_to_id(content)
        return found

    def _beginning(self, add_bos: bool | None) -> tuple[int, ...]:
        if add_bos is not None:
            return (self.bos_id,) if add_bos and self.bos_id is not None else ()
        bare = self._rust.encode("a", add_special_tokens=False).ids
        dressed = self._rust.encode("a", add_special_tokens=True).ids
        starts = range(len(dressed) - len(bare) + 1)
        return tuple(dressed[: next((n for n in starts if dressed[n : n + len(bare)] == bare), 0)])


class StreamingDetokenizer:
    """Turns ids into text one at a time; the pieces add up to `Tokenizer.decode` of all ids but the unspoken ones.

    (With a byte-fallback decoder only where the bytes are valid: it takes back a whole run for one bad byte.)

    A character's bytes may be spread over several tokens, and some decoders treat the first token of a text
    differently (they drop its space). So each step decodes a short window of recent tokens together and gives
    out what the newest added, holding back while the window ends in an unfinished character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the window: tokens already given out, for context, then those held back
        self._settled = 0  # how many of them are given out
        self._given = ""  # their text

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished."""
        if token_id in self._tokenizer.unspoken_ids or not self._tokenizer.knows(token_id):
            return ""  # in the window, a decoder would take the token after an unknown one for the first of the text
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_REPLACEMENT):
            return ""
        return self._settle(text)

    def finish(self) -> str:
        """What was held back: bytes that never became a character, as replacement characters."""
        return self._settle(self._tokenizer.decode(self._ids))

    def _settle(self, text: str) -> str:
        added = text[len(self._given) :]
        del self._ids[: self._settled]
        self._settled = len(self._ids)
        self._given = self._tokenizer.decode(self._ids)
        return added


def end_token_ids(directory: Path) -> frozenset[int]:
    """The ids that end an answer, by `generation_config.json` and `config.json` (each an int or a list there)."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = read_json_object(directory / name).get("eos_token_id")
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(id_) is int and id_ >= 0 for id_ in listed):
            raise CheckpointError(f"{directory / name}: eos_token_id is neither a token id nor a list of them")
        ids.update(listed)
    return frozenset(ids)


def tokenizer_file(directory: Path) -> Path | None:
    """The file that a checkpoint's tokenizer is read from; None where there is none."""
    found = (directory / name for name in (FILE, tiktoken.FILE))
    return next((path for path in found if path.is_file()), None)


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and so on of a `tokenizer_config.json`: each a text, or an object around one."""
    contents = {name: config.get(name) for name in _SPECIAL_TOKENS}
    texts = {name: c.get("content") if isinstance(c, dict) else c for name, c in contents.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _read_definition(directory: Path) -> tuple[Path, str]:
    """The text of a `tokenizer.json`, and the file that it is from or that it was made of. Raises CheckpointError."""
    path = tokenizer_file(directory)
    if path is None:
        missing = directory / FILE
        raise CheckpointError(
            f"{missing}: no such file; text needs the checkpoint's tokenizer.json (token ids work without it)"
        )
    if path.name != FILE:
        return path, tiktoken.definition(directory)
    try:
        return path, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _build(definition: str) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        built = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the binding raises bare Exception
        raise ValueError(str(error).splitlines()[0] if str(error) else "it cannot be parsed") from error
    # A stored truncation or padding would silently change prompts.
    built.no_truncation()
    built.no_padding()
    return built
