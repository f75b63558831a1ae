"""Constrained output: which tokens may come next, by a JSON schema, a grammar, or a list of choices.

llguidance (https://github.com/guidance-ai/llguidance; the extra `grammar`) parses; this module speaks of a model's
tokens and turns refusals into one line. V = vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from localmoe.errors import GrammarError, InputError, UsageError

if TYPE_CHECKING:
    from localmoe.text import Tokenizer

_LONGEST = 1_000_000  # characters of a schema or a grammar
_LONGEST_MESSAGE = 300
_WHITESPACE = r" |\n {0,20}"
"""Between JSON's tokens: as people write it. Were it free, a weak model would write spaces until it is cut off."""


class Vocabulary:
    """The tokens of a model as the grammar's parser wants them. Making one takes a second for 129,280 tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Iterable[int]) -> None:
        """`vocab_size` is V, the rows of the head; `end_ids` the tokens that end an answer.

        Raises UsageError where the library is not installed or the model has no end token.
        """
        self._library = _library()
        ends = sorted(token_id for token_id in set(end_ids) if token_id < vocab_size)
        if not ends:
            raise UsageError("constrained output needs a token that ends an answer, and this model names none")
        rows = max(vocab_size, tokenizer.vocab_size)
        self.size = vocab_size
        self.tokens = self._library.LLTokenizer(tokenizer.definition, n_vocab=rows, eos_token=ends)
        # A text in an answer must not pose as a turn: V3's `<｜User｜>` is not marked as special
        self.control_ids = sorted(
            token_id for token_id in set(tokenizer.control_tokens.values()) - set(ends) if token_id < vocab_size
        )

    def schema(self, schema: str | Mapping[str, Any] | bool) -> Grammar:
        """The texts that are JSON and fulfil a JSON schema, given as JSON or as Python has it.

        Raises InputError for a text that is not JSON; GrammarError for a schema that is not valid, that asks for
        something the parser does not know (it ignores nothing), or that no value fulfils.
        """
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise InputError(f"the schema is not valid JSON: {_one_line(error)}") from error
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise GrammarError(f"the schema is not JSON: {_one_line(error)}") from error
        if not isinstance(schema, Mapping | bool):
            raise GrammarError("the schema cannot be used: it is neither an object nor true or false")
        if schema is False:
            raise GrammarError("the schema cannot be met: it is false")
        try:
            possible = can_be_met(schema)
        except RecursionError as error:
            raise GrammarError("the schema cannot be used: it is nested too deeply") from error
        if not possible:
            raise GrammarError("the schema cannot be met: every value of it needs another one inside, without an end")
        translate = partial(
            self._library.LLMatcher.grammar_from_json_schema, defaults={"whitespace_pattern": _WHITESPACE}
        )
        return self._compile(translate, "{}" if schema is True else text, "schema")

    def grammar(self, text: str) -> Grammar:
        """The texts of a grammar: llguidance's dialect of Lark (https://github.com/guidance-ai/llguidance,
        docs/syntax.md), or llama.cpp's GBNF, which is told by its `::=`. Raises GrammarError."""
        return self._compile(lambda source: self._library.grammar_from("grammar", source), text, "grammar")

    def choice(self, texts: Sequence[str]) -> Grammar:
        """One of these texts, as it is. Raises UsageError for none or an empty one."""
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise UsageError("a choice is a text of at least one character, and one at least is needed")
        alternatives = "start: " + " | ".join(json.dumps(text) for text in dict.fromkeys(texts))
        return self._compile(self._library.LLMatcher.grammar_from_lark, alternatives, "choice")

    def _compile(self, translate: Any, text: str, what: str) -> Grammar:
        if len(text) > _LONGEST:
            raise GrammarError(f"the {what} is longer than {_LONGEST:,} characters")
        try:
            source = translate(text)
        except ValueError as error:
            raise GrammarError(f"the {what} cannot be used: {_one_line(error)}") from error
        matcher = self._library.LLMatcher(self.tokens, source, log_level=0)
        if matcher.is_error():
            reason = _one_line(matcher.get_error())
            verb = "cannot be met" if "nsatisfiable" in reason else "cannot be used"
            raise GrammarError(f"the {what} {verb}: {reason}")
        grammar = Grammar(self, matcher)
        try:
            possible = bool(grammar.start().allowed().any())
        except InputError:  # rules that only name one another
            possible = False
        if not possible:
            raise GrammarError(f"the {what} cannot be met: no text fulfils it")
        return grammar


class Grammar:
    """What an answer may be, compiled for one vocabulary. May be used for many answers."""

    def __init__(self, vocabulary: Vocabulary, matcher: Any) -> None:
        self._vocabulary = vocabulary
        self._matcher = matcher

    def start(self) -> Matcher:
        """A matcher for one answer, at its beginning."""
        return Matcher(self._vocabulary, self._matcher.deep_copy())


class Matcher:
    """One answer so far, and what may follow."""

    def __init__(self, vocabulary: Vocabulary, matcher: Any) -> None:
        self._vocabulary = vocabulary
        self._matcher = matcher

    def allowed(self) -> Tensor:
        """The tokens that may come next, bool [V]; end tokens where the answer may end.

        Raises InputError where the grammar has become too complex to follow.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise InputError(f"the grammar cannot be followed further: {_one_line(self._matcher.get_error())}")
        mask = torch.from_numpy(np.unpackbits(bits, count=self._vocabulary.size, bitorder="little").view(np.bool_))
        mask[self._vocabulary.control_ids] = False
        return mask

    def accept(self, token_id: int) -> bool:
        """Go on with a token; False, and nothing changes, for one that is not allowed."""
        return bool(self._matcher.try_consume_tokens([token_id]) == 1)

    def back(self, count: int) -> None:
        """Take the last `count` accepted tokens back."""
        if count and not self._matcher.rollback(count):
            raise InputError(f"the grammar cannot be followed further: {_one_line(self._matcher.get_error())}")

    def fitting(self, token_ids: Sequence[int]) -> int:
        """How many of `token_ids` may follow, from the first on. Nothing changes."""
        return int(self._matcher.validate_tokens(list(token_ids)))

    @property
    def is_over(self) -> bool:
        """Whether nothing but an end token may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def is_complete(self) -> bool:
        """Whether the answer fulfils the grammar as it is."""
        return bool(self._matcher.is_accepting()) or self.is_over


def can_be_met(schema: object) -> bool:
    """Whether a JSON schema's recursion has an end: False where every value would have to hold another, for ever.

    Conservative: what it does not understand counts as possible. The parser finds every other contradiction.
    """
    finite: set[str] = set()  # JSON pointers of schemas known to have a value
    places: dict[str, object] = {}
    _collect(schema, "#", places)

    def ends(node: object) -> bool:
        if not isinstance(node, Mapping):
            return node is not False
        reference = node.get("$ref")
        if isinstance(reference, str) and reference in places and reference not in finite:
            return False
        for word in ("anyOf", "oneOf"):
            if isinstance(node.get(word), list) and node[word] and not any(map(ends, node[word])):
                return False
        if isinstance(node.get("allOf"), list) and not all(map(ends, node["allOf"])):
            return False
        kinds = node.get("type")
        if kinds == "object" and isinstance(node.get("required"), list) and isinstance(node.get("properties"), Mapping):
            properties = node["properties"]
            return all(ends(properties[name]) for name in node["required"] if name in properties)
        if kinds == "array" and isinstance(node.get("minItems"), int) and node["minItems"] > 0:
            return ends(node.get("items", True))
        return True

    while True:
        found = {place for place, node in places.items() if place not in finite and ends(node)}
        if not found:
            return "#" in finite
        finite |= found


def _collect(node: object, place: str, places: dict[str, object]) -> None:
    stack = [(node, place)]
    while stack:
        node, place = stack.pop()
        if isinstance(node, Mapping | bool):
            places[place] = node
        items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            stack.append((value, f"{place}/{str(key).replace('~', '~0').replace('/', '~1')}"))


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UsageError(
            "constrained output (--schema, --grammar, --choice) needs llguidance: pip install llguidance"
        ) from error
    return llguidance


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + " ..."
