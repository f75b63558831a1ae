"""What `scripts/train_demo` reads is as it says: conversations, and sequences in a fixed order."""

from __future__ import annotations

import json
import random
import re
from types import ModuleType
from typing import Any

from demo_sizes import WORDS

from localmoe.text.template import ChatTemplate


def test_data_come_in_a_fixed_order_and_go_on_where_they_stopped(
    sequences: ModuleType, stories: list[Any], tokenizer: Any
) -> None:
    shares = {"simple": 1.0, "fairy": 1.0, "fiction": 1.0, "chat": 2.0}
    whole = sequences.Mixture(stories, tokenizer, 5)
    batches = [whole.batch(3, 40, shares, step) for step in range(6)]
    first = sequences.Mixture(stories, tokenizer, 5)
    for step in range(3):
        first.batch(3, 40, shares, step)
    rest = sequences.Mixture(stories, tokenizer, 5)
    rest.load(json.loads(json.dumps(first.state())))
    assert all(rest.batch(3, 40, shares, step).equal(batches[step]) for step in range(3, 6))
    assert not sequences.Mixture(stories, tokenizer, 6).batch(3, 40, shares, 0).equal(batches[0])


def test_noise_is_learned_when_it_comes_again(
    sequences: ModuleType, text: ModuleType, stories: list[Any], tokenizer: Any
) -> None:
    mixture = sequences.Mixture(stories, tokenizer, 5)
    begin, (least, most) = tokenizer.token_to_id(text.BEGIN), sequences.Mixture.ECHO
    for _ in range(30):
        noise = list(mixture._document("echo"))
        read = [~token for token in noise if token < 0]
        assert least <= len(read) < most
        assert noise[len(read) :] in (read, 2 * read)
        assert min(read) >= len(text.SPECIAL)
    found = mixture.sequence("echo", 500)
    assert found.count(begin) > 2
    assert mixture.tokens["echo"] == 500


def test_a_recast_story_is_the_same_with_other_names(talk: ModuleType) -> None:
    story = "A goat met an owl. The goats sang; Goat was glad, and AN OWL too. Goatherds have owls, not a goat."
    recast = talk.Recast(story, ["a goat", "an owl"], lambda noun: ["apple"], random.Random(0))
    assert recast(story).startswith(
        "An apple met an owl. The apples sang; Apple was glad, and AN OWL too. Goatherds have"
    )
    assert recast.subject("a goat") == "an apple"
    assert recast.subject("an owl") == "an owl"  # no name is left that is not there
    boxes = talk.Recast("an owl, owls", ["an owl"], lambda noun: ["box"], random.Random(0))
    assert boxes("An owl, OWLS, the owl") == "A box, BOXES, the box"
    same = talk.Recast(story, [], lambda noun: ["apple"], random.Random(0))
    assert same(story) == story


def test_beings_are_recast_as_beings_and_things_as_things(talk: ModuleType, text: ModuleType) -> None:
    told = [
        text.Story("simple", f"Number {n}", f"Once a {being} sat on a {thing}, and the {being} said: it is a {thing}.")
        for n, (being, thing) in enumerate(zip(["goat", "fox"] * 20, ["drum", "boat"] * 20, strict=True))
    ]
    told += [text.Story("fiction", f"Other {n}", "Nothing at all.") for n in range(200)]  # subjects are not everywhere
    subjects = talk.Subjects(told)
    assert {noun: subjects.is_being(noun) for noun in subjects.all} == {
        "goat": True, "fox": True, "drum": False, "boat": False,
    }  # fmt: skip
    names = talk.Names(subjects, talk.Plainness(told))
    assert sorted(names("goat")) == ["fox", "goat"]
    assert sorted(names("drum")) == ["boat", "drum"]


def test_held_out_stories_are_never_read(sequences: ModuleType, stories: list[Any], tokenizer: Any) -> None:
    hidden = [story for story in stories if story.held_out]
    assert hidden
    mixture = sequences.Mixture(stories, tokenizer, 0)

    def document(sort: str) -> str:
        return str(tokenizer.decode([token if token >= 0 else ~token for token in mixture._document(sort)]))

    epochs = [sort for sort in ("simple", "fairy", "fiction") for _ in range(40)]
    seen = "".join(document(sort) for sort in [*epochs, *["chat"] * 200])
    told = [story for story in stories if f"number {story.title.split()[1]}." in seen]
    assert len(told) > 40
    assert not [story for story in told if story.held_out]


def test_conversations_are_what_the_template_writes(talk: ModuleType, text: ModuleType, stories: list[Any]) -> None:
    """A training conversation begins as the chat template renders its question; thinking is inside its tags."""
    make = talk.Conversations(stories)
    dice = random.Random(3)
    template = ChatTemplate(text.CHAT_TEMPLATE, special_tokens={"bos_token": text.BEGIN, "eos_token": text.END})
    thought = 0
    for _ in range(200):
        story = dice.choice(stories)
        made = make(story, dice)
        asked, answer = made.removeprefix(text.USER).split(text.ASSISTANT, 1)
        thinking = answer.startswith(text.THINK)
        thought += thinking
        rendered = template.render([{"role": "user", "content": asked}], thinking=thinking)
        assert (text.BEGIN + made).startswith(rendered)
        assert made.endswith(text.END)
        assert not thinking or answer.index(f"\n{text.THINK_END}\n\n") > 0
    assert 10 < thought < 100
    assert any(f"a {word}" in make._subjects(stories[0].text, 3) for word in WORDS)


def test_an_answer_is_about_what_was_asked_and_long_enough(talk: ModuleType, text: ModuleType) -> None:
    """Its subjects are named at least twice; only a title is short; a picture book's pages are read as paragraphs."""
    dice = random.Random(1)
    pages = ["The goat ran to a river.", "There was a drum.", "A goat and a drum, oh", "The drum was loud."] * 30
    told = [text.Story("simple", "The goat", "\n\n".join(pages[: dice.randrange(2, 90)])) for _ in range(30)]
    long = "\n\n".join(f"Then he saw a {dice.choice(WORDS)}. The {dice.choice(WORDS)} fell, number {n}. " * 3
                       + "\n\n" + f"Far away a {(word := dice.choice(WORDS))} slept. The {word} was old. " * 4
                       for n in range(40))  # fmt: skip
    told.append(text.Story("fiction", "Long", long))
    make = talk.Conversations(told)
    assert told[0].paragraphs != told[0].text.split("\n\n")
    assert all(talk.opens(part) == part.startswith("Far") for part in told[-1].paragraphs)
    scenes = told_again = 0
    for number in range(300):
        made = make(told[-1] if number % 2 else dice.choice(told), dice)
        for turn in made.split(text.USER)[1:]:
            asked, answer = turn.removesuffix(text.END).split(text.ASSISTANT)
            answer = answer.split(text.THINK_END)[1].strip()
            if asked.endswith(talk.Conversations.TITLE):
                assert answer in {story.title for story in told}
                continue
            if "a story about" in asked.lower() and "beginning" not in asked and "begin?" not in asked:
                about = re.search(r"a(?: short)? story about (.+?)(?:, please)?[.?]?$", asked, re.IGNORECASE)
                assert about is not None
                assert answer.startswith(f"Here is a story about {about[1]}.\n\n")
                answer = answer.split("\n\n", 1)[1]
                told_again += 1
            assert talk.SHORT <= len(answer) <= 2 * talk.LONG
            scenes += asked.startswith(("Write about", "Write a scene"))
            if "\n" not in asked and '"' not in asked:
                for noun in re.findall(r"\ban? (?!short|story|scene)(\w+)", asked):
                    assert len(re.findall(rf"\b{noun}\b", answer.lower())) > 1
    assert scenes > 20
    assert told_again > 100
