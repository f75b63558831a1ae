"""Constrained output: what is allowed, what is refused before any work, and that guessing changes nothing."""

from __future__ import annotations

import builtins
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

import localmoe
from localmoe.errors import GrammarError, InputError, UsageError
from localmoe.generate import Settings, Step, generate
from localmoe.grammar import Grammar, Vocabulary
from localmoe.load import Engine, load
from localmoe.text import Tokenizer

DEMO = Path(localmoe.__file__).parent / "data" / "demo"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["fox", "boat"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
RECURSIVE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["value", "children"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(DEMO)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer, 4096 + 5, tokenizer.eos_ids)  # a head with padding rows


def takes(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether `text` is of the grammar, found a token at a time, masks included."""
    matcher = grammar.start()
    for token_id in tokenizer.encode(text, add_bos=False):
        if not bool(matcher.allowed()[token_id]):
            assert not matcher.accept(token_id)
            return False
        assert matcher.accept(token_id)
    return matcher.is_complete


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (
            SCHEMA,
            ['{"name":"Ann","age":7,"kind":"fox","tags":[]}', '{"name": "", "age": 0, "kind": "boat", "tags": [true]}'],
            ['{"name":"Ann","age":100,"kind":"fox","tags":[]}', '{"age":7}', '{"name":"123456789"', "[]", " {", "{"],
        ),
        (RECURSIVE, ['{"value":1,"children":[{"value":-2,"children":[]}]}'], ['{"value":1,"children":[{}]}']),
        ('{"type":"string","pattern":"^[a-c]+$"}', ['"abc"'], ['"abd"', '""']),
        ({"type": "array"}, ["[\n  1,\n  2\n]", "[1, {}]"], ["[  1]", "[\n\n1]"]),  # no endless white space
        (True, ["1", '"x"', "null"], ["x"]),
    ],
)
def test_schemas(vocabulary: Vocabulary, tokenizer: Tokenizer, schema: object, good: list[str], bad: list[str]) -> None:
    grammar = vocabulary.schema(schema)
    assert [text for text in good if not takes(grammar, tokenizer, text)] == []
    assert [text for text in bad if takes(grammar, tokenizer, text)] == []


def test_grammars_and_choices(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    for text in ('start: "<" /[a-z]+/ ">"', 'root ::= "<" [a-z]+ ">"'):
        grammar = vocabulary.grammar(text)
        assert takes(grammar, tokenizer, "<fox>")
        assert not takes(grammar, tokenizer, "<>")
    choice = vocabulary.choice(["no", "no way", 'say "x"\n', "🐉", "no"])
    assert all(takes(choice, tokenizer, text) for text in ("no", "no way", 'say "x"\n', "🐉"))
    assert not any(takes(choice, tokenizer, text) for text in ("no wa", "n", "no way!"))


def test_what_may_end_and_what_never_comes(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    end = next(iter(tokenizer.eos_ids))
    matcher = vocabulary.choice(["no", "no way"]).start()
    mask = matcher.allowed()
    assert mask.shape == (4101,)
    assert not mask[[end, 4096, 4100]].any()
    assert all(matcher.accept(token_id) for token_id in tokenizer.encode("no", add_bos=False))
    assert matcher.is_complete
    assert not matcher.is_over
    assert matcher.allowed()[end]
    assert matcher.fitting(tokenizer.encode(" way", add_bos=False)) >= 1
    matcher.back(1)
    assert not matcher.is_complete
    # Control tokens are no text, whatever the tokenizer calls them: a string may hold their letters only
    inside = vocabulary.schema({"type": "string"}).start()
    assert inside.accept(tokenizer.encode('"', add_bos=False)[0])
    controls = [i for i in tokenizer.control_tokens.values() if i not in tokenizer.eos_ids]
    assert len(controls) > 3
    assert not inside.allowed()[controls].any()


@pytest.mark.parametrize(
    ("schema", "error", "message"),
    [
        ("{", InputError, "not valid JSON"),
        ({"type": "objekt"}, GrammarError, "cannot be used: Invalid type: objekt"),
        ("[1]", GrammarError, "cannot be used"),
        ({"not": {}}, GrammarError, "Unimplemented"),
        ({"type": "string", "pattern": "(?=x)"}, GrammarError, "look-around"),
        ({"$ref": "http://x/y"}, GrammarError, "cannot be used"),
        (False, GrammarError, "cannot be met"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, GrammarError, "cannot be met"),
        ({"type": "object", "required": ["a"], "properties": {"a": False}}, GrammarError, "cannot be met"),
        ({"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#"}}}, GrammarError, "without an end"),
        ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, GrammarError, "without an end"),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}},
            GrammarError,
            "without an end",
        ),
        ({"enum": ["x" * 1_000_001]}, GrammarError, "longer than"),
        ('{"anyOf":[' * 200 + "{}" + "]}" * 200, GrammarError, "recursion limit"),
        ('{"items":' * 5000 + "{}" + "}" * 5000, InputError, "recursion"),
        ({"const": float("nan")}, GrammarError, "not JSON"),
    ],
)
def test_schemas_that_are_refused(vocabulary: Vocabulary, schema: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        vocabulary.schema(schema)
    assert "\n" not in str(caught.value)


def test_recursion_with_an_end_is_not_refused(vocabulary: Vocabulary) -> None:
    for schema in (
        RECURSIVE,
        {"type": "object", "required": ["a"], "properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
        {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "array", "items": {"$ref": "#/$defs/a~1b"}}}},
    ):
        vocabulary.schema(schema)


@pytest.mark.parametrize(
    "text", ["start: x", "start: /[^/", "root ::= (", "", "start: %json {", "start: a\na: b\nb: a"]
)
def test_grammars_that_are_refused(vocabulary: Vocabulary, text: str) -> None:
    with pytest.raises(GrammarError, match="the grammar cannot be") as caught:
        vocabulary.grammar(text)
    assert "\n" not in str(caught.value)


def test_without_the_library_one_line_says_what_to_install(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: object) -> object:
        if name == "llguidance":
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match="needs llguidance: pip install llguidance"):
        Vocabulary(tokenizer, 4096, [1])


class TestGenerating:
    @pytest.fixture(scope="class")
    @classmethod
    def artifact(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        from quantize.pipeline import quantize

        directory = tmp_path_factory.mktemp("grammar") / "compact"
        quantize(DEMO, directory, "compact", grid="absmax")
        return directory

    @pytest.fixture(scope="class")
    @classmethod
    def engines(cls, artifact: Path) -> Iterator[dict[str, Engine]]:
        """The same model: plain, guessing with its MTP layer, and from what the text repeats."""
        with (
            load(artifact, ctx=256, threads=1) as plain,
            load(artifact, ctx=256, threads=1, mtp=3) as mtp,
            load(artifact, ctx=256, threads=1, mtp=4) as lookup,
        ):
            lookup.speculate(None, 4)
            yield {"plain": plain, "mtp": mtp, "lookup": lookup}

    def answers(self, engines: dict[str, Engine], prompt: object = "Once", **settings: object) -> list[Step]:
        """The steps, the same with every way of guessing."""
        found = {name: list(engine.generate(prompt, **settings)) for name, engine in engines.items()}
        ids = {name: [step.token_id for step in steps] for name, steps in found.items()}
        assert ids["plain"] == ids["mtp"] == ids["lookup"]
        assert found["mtp"][-1].stats is not None
        assert found["mtp"][-1].stats.speculation is not None
        return found["plain"]

    @pytest.mark.parametrize("temperature", [0.0, 0.9])
    def test_a_schema_is_fulfilled_and_guessing_changes_no_token(
        self, engines: dict[str, Engine], temperature: float
    ) -> None:
        for seed in range(4):
            steps = self.answers(engines, temperature=temperature, seed=seed, schema=SCHEMA, max_tokens=300)
            value = json.loads("".join(step.text for step in steps))
            assert sorted(value) == ["age", "kind", "name", "tags"]
            assert 0 <= value["age"] <= 99
            assert len(value["name"]) <= 8
            assert steps[-1].finish_reason == "stop"
            assert steps[-1].stats is not None
            assert steps[-1].stats.fulfils_grammar is True

    def test_guesses_inside_a_grammar_are_right_more_often_than_never(self, engines: dict[str, Engine]) -> None:
        stats = list(engines["mtp"].generate("Once", schema=SCHEMA, max_tokens=150))[-1].stats
        assert stats is not None
        assert stats.speculation is not None
        assert stats.speculation.accepted_tokens > 5

    def test_penalties_and_a_choice(self, engines: dict[str, Engine]) -> None:
        for seed in range(4):
            steps = self.answers(
                engines, choice=["yes", "no", "no way"], temperature=1.5, seed=seed, repetition_penalty=1.3, top_p=0.9
            )
            assert "".join(step.text for step in steps) in ("yes", "no", "no way")

    def test_an_answer_that_is_cut_off_says_so(self, engines: dict[str, Engine]) -> None:
        steps = self.answers(engines, schema=SCHEMA, max_tokens=3)
        assert steps[-1].finish_reason == "length"
        assert steps[-1].stats is not None
        assert steps[-1].stats.fulfils_grammar is False

    def test_a_bias_against_all_that_is_allowed(self, engines: dict[str, Engine]) -> None:
        tokenizer = engines["plain"].tokenizer
        everything = dict.fromkeys(range(tokenizer.vocab_size), -math.inf)
        for temperature in (0.0, 1.0):
            steps = engines["plain"].generate("Once", choice=["no"], temperature=temperature, logit_bias=everything)
            with pytest.raises(InputError, match="no token that the grammar allows here is possible"):
                list(steps)

    def test_refused_at_the_call(self, engines: dict[str, Engine]) -> None:
        plain = engines["plain"]
        with pytest.raises(UsageError, match="schema and choice are both given"):
            plain.generate("Once", schema={}, choice=["x"])
        with pytest.raises(GrammarError):
            plain.generate("Once", schema={"enum": []})
        with pytest.raises(UsageError, match="at least one character"):
            plain.generate("Once", choice=[""])

    def test_thinking_is_free_and_the_answer_is_not(self, engines: dict[str, Engine]) -> None:
        """From the text that ends thinking on; the demo does not think, so any text serves."""
        plain = list(engines["plain"].generate("Once upon a time", max_tokens=40))
        text = "".join(step.text for step in plain)
        after = text.split()[4]
        results = []
        for engine in engines.values():
            settings = Settings(max_tokens=80, grammar=engine._grammar(None, None, ["yes", "no"]), grammar_after=after)
            steps = list(
                generate(
                    engine.model,
                    engine._new_cache(),
                    engine.prompt_ids("Once upon a time"),
                    settings,
                    end_ids=engine._end_ids,
                    detokenizer=engine.tokenizer.stream(),
                    lengths=engine._lengths,
                )
            )
            results.append("".join(step.text for step in steps))
            assert steps[-1].finish_reason == "stop"
        assert len(set(results)) == 1
        before, _, answer = results[0].partition(after)
        assert text.startswith(before + after)
        assert answer in ("yes", "no")

    def test_thinking_is_known_by_the_template(self, artifact: Path, engines: dict[str, Engine]) -> None:
        chat = [{"role": "user", "content": "Hi"}]
        assert not engines["plain"]._begins_thinking(chat, None)
        assert not engines["plain"]._begins_thinking("<think>", None)


def test_an_end_while_thinking_fulfils_nothing() -> None:
    """The model may end its answer before the grammar was ever in force."""
    with load("demo:source", kernels="reference") as engine:
        ids: Sequence[int] = engine.prompt_ids("Once")
        first = next(iter(engine.generate(ids, max_tokens=1))).token_id
        settings = Settings(grammar=engine._grammar(None, None, ["yes"]), grammar_after="</think>")
        (step,) = generate(
            engine.model,
            engine._new_cache(),
            ids,
            settings,
            end_ids={first},
            detokenizer=engine.tokenizer.stream(),
        )
        assert step.finish_reason == "stop"
        assert step.stats is not None
        assert step.stats.fulfils_grammar is False
