from __future__ import annotations

import random

import pytest
import tokenizers

from localmoe.errors import CheckpointError
from localmoe.text import Tokenizer

TEXTS = [
    "Once upon a time, there was a dragon.\n\n\tIt had 1,234 teeth!",
    "  leading and trailing  ",
    "héllo wörld — 你好，世界 🐉👩‍👩‍👧 \u200b\u202e \x00\x07",
    "\ufffd already replaced \ufffd",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(demo: Tokenizer, text: str) -> None:
    assert demo.decode(demo.encode(text, add_bos=False)) == text


def test_beginning_is_added_once_and_only_when_asked(demo: Tokenizer) -> None:
    plain = demo.encode("a boat", add_bos=False)
    assert demo.encode("a boat", add_bos=True) == [demo.bos_id, *plain]
    assert demo.bos_id == 0
    assert demo.bos_id not in plain
    assert demo.vocab_size == 4096


def test_beginning_is_left_out_where_the_checkpoint_says_so(write_tokenizer) -> None:
    said_no = Tokenizer.from_directory(
        write_tokenizer(tokenizer_config={"bos_token": "<think>", "add_bos_token": False})
    )
    assert said_no.bos_id == 5
    assert said_no.encode("a", add_bos=True) == said_no.encode("a", add_bos=False)


def test_without_a_word_about_it_the_post_processor_decides() -> None:
    rust = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "x": 1, "[G]": 2, "[S]": 3, "[E]": 4}, unk_token="x")
    )
    rust.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    silent = Tokenizer(rust.to_str(), special_tokens={"bos_token": "[G]"}, add_bos=None, eos_ids=[])
    assert silent.encode("a", add_bos=True) == [0]
    rust.post_processor = tokenizers.processors.TemplateProcessing(
        single="[G] [S] $A [E]", special_tokens=[("[G]", 2), ("[S]", 3), ("[E]", 4)]
    )
    dressed = Tokenizer(rust.to_str(), special_tokens={}, add_bos=None, eos_ids=[])
    assert dressed.encode("a a", add_bos=True) == [2, 3, 0, 0]  # its beginning, not its end


@pytest.mark.parametrize("written", [1, [1, 7]])
def test_end_ids_come_from_all_three_files(write_tokenizer, written: object) -> None:
    directory = write_tokenizer(
        config={"eos_token_id": written},
        generation_config={"eos_token_id": [9, 1]},
        tokenizer_config={"eos_token": {"content": "</think>", "lstrip": False}},
    )
    wanted = {1, 9, 6} | ({7} if written != 1 else set())
    assert Tokenizer.from_directory(directory).eos_ids == wanted


@pytest.mark.parametrize("eos", ["1", [1, None], True, -1, {"id": 1}])
def test_end_ids_that_are_none_are_refused(write_tokenizer, eos: object) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        Tokenizer.from_directory(write_tokenizer(generation_config={"eos_token_id": eos}))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "tokenizer.json: no such file"), ("{", "not a usable tokenizer"), ("\udcff", "cannot be read")],
)
def test_broken_tokenizer_files_are_named(tmp_path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_tokenizer_config_is_named(write_tokenizer) -> None:
    for content, message in (
        ("[1]", "no JSON object"),
        ("{", "not valid JSON"),
        ({"add_bos_token": 1}, "add_bos_token"),
    ):
        with pytest.raises(CheckpointError, match=f"tokenizer_config.json: .*{message}"):
            Tokenizer.from_directory(write_tokenizer(tokenizer_config=content))


def test_stored_truncation_and_padding_do_not_change_a_prompt(demo: Tokenizer) -> None:
    rust = tokenizers.Tokenizer.from_str(demo.definition)
    rust.enable_truncation(3)
    rust.enable_padding(length=50)
    ours = Tokenizer(rust.to_str(), special_tokens={}, add_bos=False, eos_ids=[])
    text = "one two three four five six"
    assert ours.encode(text, add_bos=True) == demo.encode(text, add_bos=False)


@pytest.mark.parametrize("name", ["demo", "v3_like"])
def test_control_tokens_in_text_are_text_when_told_so(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    text = "what do <｜User｜> and </think> mean, <think>?"
    as_control = tokenizer.encode(text, add_bos=False)
    as_text = tokenizer.encode(text, add_bos=False, control=False)
    control = set(tokenizer.control_tokens.values())
    assert len(control.intersection(as_control)) == 3
    assert control.isdisjoint(as_text)
    assert tokenizer.decode(as_text) == tokenizer.decode(as_control) == text


def test_control_tokens_that_the_vocabulary_can_spell_are_respelled() -> None:
    """A word-level or merge-ignoring vocabulary can reach a control token's id without its being "added"."""
    rust = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={"<": 0, "t": 1, ">": 2, "<t": 3, "<t>": 4}, merges=[("<", "t"), ("<t", ">")])
    )
    rust.decoder = tokenizers.decoders.Fuse()
    rust.add_special_tokens(["<t>"])
    tokenizer = Tokenizer(rust.to_str(), special_tokens={}, add_bos=False, eos_ids=[])
    assert tokenizer.encode("t<t>t", add_bos=False) == [1, 4, 1]
    assert tokenizer.encode("t<t>t", add_bos=False, control=False) == [1, 0, 1, 2, 1]


@pytest.mark.parametrize("name", ["demo", "v3_like"])
def test_streamed_text_adds_up_to_the_decoded_whole(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    random_ids = random.Random(7)
    for _ in range(300):
        # ids beyond the vocabulary too: the head may have padding rows
        ids = [random_ids.randrange(tokenizer.vocab_size + 20) for _ in range(random_ids.randrange(40))]
        stream = tokenizer.stream()
        pieces = [stream.push(id_) for id_ in ids] + [stream.finish()]
        assert "".join(pieces) == tokenizer.decode([id_ for id_ in ids if id_ not in tokenizer.unspoken_ids])


@pytest.mark.parametrize("name", ["demo", "v3_like", "sentencepiece_like"])
@pytest.mark.parametrize("text", ["cats 🐉🐉 é你好 the cat.", " 👩‍👩‍👧", "ÿþé"])
def test_stream_never_shows_part_of_a_character(name: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text, add_bos=False)
    stream = tokenizer.stream()
    shown = ""
    for id_ in ids:
        shown += stream.push(id_)
        assert text.startswith(shown) or tokenizer.decode(ids).startswith(shown)
        assert "\ufffd" not in shown
    assert shown + stream.finish() == tokenizer.decode(ids)


def test_bytes_that_become_no_character_are_shown_at_the_end(demo: Tokenizer) -> None:
    dragon = demo.encode("🐉", add_bos=False)
    assert len(dragon) > 1, "the test needs a character of several tokens"
    stream = demo.stream()
    assert [stream.push(id_) for id_ in dragon[:-1]] == [""] * (len(dragon) - 1)
    assert stream.finish() == demo.decode(dragon[:-1])
    assert "\ufffd" in demo.decode(dragon[:-1])


def test_spaces_between_streamed_words_survive_a_decoder_that_strips_the_first(sentencepiece_like: Tokenizer) -> None:
    ids = [sentencepiece_like._rust.token_to_id(piece) for piece in ("▁the", "▁cat", "s", "▁the")]
    stream = sentencepiece_like.stream()
    padding = sentencepiece_like.vocab_size + 3
    assert [stream.push(id_) for id_ in [padding, *ids]] == ["", "the", " cat", "s", " the"]


@pytest.mark.parametrize(
    ("name", "wanted"), [("demo", "<think>a</think>b é"), ("v3_like", "<｜Assistant｜><think>a</think>b<｜User｜> é")]
)
def test_streamed_text_is_without_special_tokens_but_with_the_thinking_tags(
    name: str, wanted: str, request: pytest.FixtureRequest
) -> None:
    """The demo marks every added token special; V3 neither its turns' nor (R1, V3.1) the thinking tags."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    text = "<｜begin▁of▁sentence｜><｜Assistant｜><think>a</think>b<｜end▁of▁sentence｜><｜User｜> é"
    ids = tokenizer.encode(text, add_bos=False)
    assert tokenizer.decode(ids) == text
    middle = len(ids) - 1  # between the two bytes of é
    assert len(tokenizer.decode(ids[:middle])) == len(text)
    ids.insert(middle, tokenizer.control_tokens["<｜begin▁of▁sentence｜>"])
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == wanted
