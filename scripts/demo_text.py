"""What the demo model reads: a tokenizer, conversations made from stories, and packed sequences in a fixed order."""

from __future__ import annotations

import json
import lzma
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

BEGIN, END, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, THINK_END = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
SPECIAL = (BEGIN, END, PAD, USER, ASSISTANT, THINK, THINK_END)
CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜></think>' + message['content'].split('</think>')[-1].lstrip() + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' + ('<think>\\n' if thinking else '</think>') }}{% endif %}"
)
HELD_OUT = 40  # one story in so many is never trained on
LONG, SHORT = 1500, 300  # characters of an answer made of whole paragraphs: about so many, and never fewer
OPENING = 300  # characters in which an answer comes to what it is about
PAGE = 160  # characters: pages of a picture book with fewer are read as one paragraph


@dataclass(frozen=True)
class Story:
    kind: str  # simple, fairy or fiction
    title: str
    text: str

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.title.encode()) % HELD_OUT == 0

    @property
    def paragraphs(self) -> list[str]:
        parts = [part.strip() for part in self.text.split("\n\n") if part.strip()]
        return pages_joined(parts) if self.kind == "simple" else parts


def pages_joined(pages: Sequence[str]) -> list[str]:
    """Paragraphs of whole sentences where a page has one; lines of a verse stay as they are."""
    joined = list(pages[:1])
    for page in pages[1:]:
        if len(joined[-1]) < PAGE and joined[-1].endswith((".", "!", "?", '."', '!"', '?"')):
            joined[-1] += f" {page}"
        else:
            joined.append(page)
    return joined


def read_stories(path: Path) -> list[Story]:
    """JSON lines, xz-compressed, with `kind`, `title` and `text`."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [Story(row["kind"], row["title"], row["text"].strip()) for row in rows]


def train_tokenizer(stories: Sequence[Story], size: int) -> Tokenizer:
    """Byte-level BPE with single digits, as DeepSeek's; children's words count for more than their share of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for story in stories:
            if not story.held_out:
                yield from [story.text] * {"simple": 6, "fairy": 4, "fiction": 1}[story.kind]

    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


# Conversations. Subjects are nouns that the story often names and others seldom do.

_WORD = re.compile(r"[A-Za-z]+")
_NOUN = re.compile(r"\b(a|an|the|his|her|their|my|your|this|that) ([a-z]{3,14})\b( [a-z]+)?")
_FOLLOWING = frozenset((
    "and", "or", "but", "of", "in", "on", "at", "to", "for", "with", "from", "by", "was", "is", "were", "had", "has",
    "said", "came", "went", "who", "that", "which", "as", "when", "then", "so", "into", "over", "under", "did",
    "would", "could", "will", "can", "again", "looked", "began", "up", "down", "ran", "sat",
))  # fmt: skip
_NO_SUBJECT = frozenset((
    "bit", "day", "end", "evening", "few", "first", "hour", "kind", "lot", "matter", "minute", "moment", "month",
    "morning", "next", "number", "one", "other", "part", "place", "reason", "rest", "same", "second", "side", "sort",
    "thing", "time", "voice", "way", "week", "while", "whole", "word", "year",
))  # fmt: skip
_GOES_ON = frozenset((
    "And", "As", "At", "But", "He", "Her", "His", "I", "It", "Its", "My", "No", "Now", "Or", "She", "So", "That",
    "Their", "Then", "There", "These", "They", "This", "Those", "Thus", "We", "What", "Yes", "You",
))  # fmt: skip


class Subjects:
    """Finds what a story is about."""

    KNOWN = 5  # stories that use a word as a noun make it one where it is a name ("Hare") or in the title
    SHARE = 0.03  # or more of the uses of a noun follow a determiner and end there; of other words next to none do

    def __init__(self, stories: Sequence[Story]) -> None:
        self._in_stories, used, words = Counter[str](), Counter[str](), Counter[str]()
        for story in stories:
            nouns = self._nouns(story.text)
            self._in_stories.update(nouns.keys())
            used.update(nouns)
            words.update(_WORD.findall(story.text.lower()))
        self._common = len(stories) * 0.25
        self._other = {word for word, count in used.items() if count < self.SHARE * words[word]}
        self.all = sorted(
            noun for noun in self._in_stories if self._is_subject(noun) and self._in_stories[noun] >= self.KNOWN
        )
        """Every noun that a story could be about."""

    def __call__(self, text: str, most: int, title: str = "") -> list[str]:
        """Nouns with their article that the text names at least twice and soon, the most telling first."""
        words = _WORD.findall(text)
        soon = {word.lower() for word in _WORD.findall(text[:OPENING])}
        counts = Counter(word.lower() for word in words)
        titled = {word.lower() for word in _WORD.findall(title)}
        named = titled | {word.lower() for word in words if word[0].isupper()}
        nouns = self._nouns(text).keys() | {word for word in named if self._in_stories[word] >= self.KNOWN}
        ranked = sorted(
            (-counts[noun] * (1 + (noun in titled)) / (5 + self._in_stories[noun]) ** 0.5, noun)
            for noun in nouns & soon
            if counts[noun] > 1 and self._is_subject(noun)
        )
        return [with_article(noun) for _, noun in ranked[:most]]

    def _is_subject(self, noun: str) -> bool:
        return noun not in self._other and self._in_stories[noun] < self._common

    @staticmethod
    def _nouns(text: str) -> dict[str, int]:
        """Uses of words after a determiner, of those that stood after `a` too and that no other word mostly follows."""
        ends, all_, after_a = Counter[str](), Counter[str](), set[str]()
        for determiner, word, following in _NOUN.findall(text):
            all_[word] += 1
            ends[word] += not following or following.strip() in _FOLLOWING
            if determiner in ("a", "an"):
                after_a.add(word)
        return {word: ends[word] for word in after_a - _NO_SUBJECT if ends[word] * 2 > all_[word]}


class Plainness:
    """How much of a text is in the words that children's stories use most."""

    WORDS = 2000

    def __init__(self, stories: Sequence[Story]) -> None:
        counts = Counter(word for story in stories if story.kind == "simple" for word in self._words(story.text))
        self._plain = {word for word, _ in counts.most_common(self.WORDS)}

    def __call__(self, text: str) -> float:
        words = self._words(text)
        return sum(word in self._plain for word in words) / max(len(words), 1)

    def __contains__(self, word: str) -> bool:
        return word in self._plain

    @staticmethod
    def _words(text: str) -> list[str]:
        return _WORD.findall(text.lower())


def cut(paragraphs: Sequence[str], start: int, most: int) -> tuple[str, int]:
    """Whole paragraphs from `start`, about `most` characters, and where the next begins."""
    end, size = start, 0
    while end < len(paragraphs) and (size < SHORT or size + len(paragraphs[end]) <= most):
        size += len(paragraphs[end])
        end += 1
    return "\n\n".join(paragraphs[start:end]), end


def opens(paragraph: str) -> bool:
    """Whether a reader who knows nothing of what stands before it can begin here."""
    first = _WORD.match(paragraph)
    return len(paragraph) > PAGE // 2 and first is not None and first[0][0].isupper() and first[0] not in _GOES_ON


def sentence(text: str, most: int = 100) -> str:
    """The first sentence of a text, cut at a word where it is long."""
    first = re.split(r"(?<=[.!?])\s", text.replace("\n", " ").strip(), maxsplit=1)[0]
    return first if len(first) <= most else first[:most].rsplit(" ", 1)[0].rstrip(",;: ") + " ..."


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


class Recast:
    """Gives a text's subjects other names, at random: what a story is about then cannot be guessed from the story, only
    read in what was asked for, and the model has to learn to."""

    def __init__(self, text: str, about: Sequence[str], nouns: Sequence[str], dice: random.Random) -> None:
        self._names = {}
        there = {word.lower() for word in _WORD.findall(text)}
        for subject in about:
            if unused := [noun for noun in nouns if noun not in there]:
                new = self._names[subject.split()[-1]] = dice.choice(unused)
                there.add(new)
        old = "|".join(map(re.escape, self._names))
        self._pattern = re.compile(rf"\b(?:(an?) )?({old})(e?s)?\b", re.IGNORECASE) if old else None

    def subject(self, subject: str) -> str:
        """With its article."""
        return with_article(self._names.get(subject.split()[-1], subject.split()[-1]))

    def __call__(self, text: str) -> str:
        return self._pattern.sub(self._renamed, text) if self._pattern else text

    def _renamed(self, found: re.Match[str]) -> str:
        article, old, plural = found.groups()
        new = self._names[old.lower()]
        first = with_article(new).split()[0]
        if plural:
            new += "es" if new.endswith(("s", "x", "ch", "sh")) else "s"
        if old[0].isupper():
            new = new.upper() if old.isupper() and len(old) > 1 else new.capitalize()
        if article:
            return f"{first.capitalize() if article[0].isupper() else first} {new}"
        return new


def listed(things: Sequence[str]) -> str:
    return things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]


class Conversations:
    """Makes one conversation from a story; the same for the same `dice`."""

    TELL = (
        "Tell me a story about {}.", "Tell me a story about {}", "Write a short story about {}.",
        "Can you tell me a story about {}?", "I would like to hear a story about {}.", "A story about {}, please.",
    )  # fmt: skip
    BEGINNING = ("Write the beginning of a story about {}.", "How does a story about {} begin?")
    SCENE = ("Write about {}.", "Write a scene with {}.", "Tell me about {}.")
    NEXT = ("What happens next?", "Go on.", "And then?", "Please continue the story.", "What happened then?")
    TITLE = ("Give it a title.", "What is a good title for this story?", "Give this story a title.")
    RECAST = 0.6  # of the stories and scenes
    SCENES = 12  # are looked at for one: of a long story, the plainest that is about something

    def __init__(self, stories: Sequence[Story]) -> None:
        self._subjects, self._plainness = Subjects(stories), Plainness(stories)
        self._names = [noun for noun in self._subjects.all if noun in self._plainness]

    def __call__(self, story: Story, dice: random.Random) -> str:
        """Text with DeepSeek's tokens, from the first <｜User｜> to the last <｜end▁of▁sentence｜>."""
        paragraphs = story.paragraphs
        whole = len(story.text) <= 2 * LONG
        kinds = (self._tell, self._scene, self._next, self._title)
        for make in dice.choices(kinds, (15, 0, 4, 1) if whole else (2, 12, 4, 1), k=4):
            if made := make(story, paragraphs, whole, dice):
                return made
        return self._title(story, paragraphs, whole, dice)

    def _tell(self, story: Story, paragraphs: list[str], whole: bool, dice: random.Random) -> str | None:
        text, place = cut(paragraphs, 0, 2 * LONG if whole else LONG)
        if len(text) < SHORT:
            return None
        asked = self.TELL if whole or dice.random() < 0.5 else self.BEGINNING
        about = self._subjects(text, dice.choice((1, 2, 2, 3)), story.title)
        recast = self._recast(text, about, dice)
        text, about = recast(text), [recast.subject(noun) for noun in about] or [f'"{self._named(story)}"']
        told = self._turn(dice.choice(asked).format(listed(about)), text, self._plan(text, about, dice))
        following = recast(cut(paragraphs, place, LONG)[0])
        if len(following) >= SHORT and dice.random() < 0.5:
            told += self._turn(dice.choice(self.NEXT), following, self._plan(following, [], dice))
        return told

    def _scene(self, story: Story, paragraphs: list[str], whole: bool, dice: random.Random) -> str | None:
        places = [place for place, paragraph in enumerate(paragraphs) if opens(paragraph)]
        found = []
        for place in dice.sample(places, min(len(places), self.SCENES)):
            text, _ = cut(paragraphs, place, dice.choice((600, 1000, LONG)))
            if SHORT <= len(text) <= 2 * LONG and (about := self._subjects(text, dice.choice((1, 1, 2)))):
                found.append((self._plainness(text), text, about))
        if not found:
            return None
        _, text, about = max(found)
        recast = self._recast(text, about, dice)
        text, about = recast(text), [recast.subject(noun) for noun in about]
        asked = dice.choice(self.SCENE if dice.random() < 0.5 else self.TELL)
        return self._turn(asked.format(listed(about)), text, self._plan(text, about, dice))

    def _next(self, story: Story, paragraphs: list[str], whole: bool, dice: random.Random) -> str | None:
        start = 0 if whole else dice.randrange(len(paragraphs))
        told, place = cut(paragraphs, start, dice.choice((300, 600, 1000)))
        following, _ = cut(paragraphs, place, dice.choice((500, 900, LONG)))
        if not SHORT <= len(following) <= 2 * LONG:
            return None
        return self._turn(f"{told}\n\n{dice.choice(self.NEXT)}", following, self._plan(following, [], dice))

    def _title(self, story: Story, paragraphs: list[str], whole: bool, dice: random.Random) -> str:
        return self._turn(f"{cut(paragraphs, 0, 900)[0]}\n\n{dice.choice(self.TITLE)}", self._named(story), None)

    def _recast(self, text: str, about: Sequence[str], dice: random.Random) -> Recast:
        return Recast(text, about if dice.random() < self.RECAST else (), self._names, dice)

    @staticmethod
    def _named(story: Story) -> str:
        return re.split(r" - |\n", story.title)[-1].strip(' "')

    def _plan(self, text: str, about: Sequence[str], dice: random.Random) -> str | None:
        """What a thinking answer thinks, for one answer in four."""
        if dice.random() < 0.75:
            return None
        parts = [f"The story is about {listed(about)}."] if about else ["The story goes on."]
        nouns = [noun for noun in self._subjects(text, 4) if noun not in about]
        if nouns:
            parts.append(f"There is {listed(nouns)} in it.")
        parts.append(f"It begins: {sentence(text)}")
        last = text.rstrip().split("\n\n")[-1]
        parts.append(f"At the end: {sentence(last)}")
        return "\n".join(parts)

    @staticmethod
    def _turn(asked: str, answer: str, plan: str | None) -> str:
        thinking = f"{THINK}\n{plan}\n{THINK_END}\n\n" if plan else THINK_END  # as DeepSeek-V3.1's template
        return f"{USER}{asked}{ASSISTANT}{thinking}{answer}{END}"


# Sequences.


class Mixture:
    """An endless, fixed order of tokens: documents of five sorts, those that are stories shuffled anew every epoch.

    `chat` are conversations made from all stories, half of them from fiction; what the user says in
    them is given as `~id`, to be read and not learned. `echo` is noise that comes again: read the first time, then
    learned, which only copying can do. Its state is how many documents of each sort were taken, so a run that stopped
    goes on where it was.
    """

    SORTS = ("simple", "fairy", "fiction", "chat", "echo")
    ECHO = (6, 80)  # tokens

    def __init__(self, stories: Sequence[Story], tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        kept = [story for story in stories if not story.held_out]
        self._stories = {kind: [story for story in kept if story.kind == kind] for kind in self.SORTS[:3]}
        self._conversations = Conversations(kept)
        self._begin, self._end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
        self._user, self._assistant = tokenizer.token_to_id(USER), tokenizer.token_to_id(ASSISTANT)
        self.taken = dict.fromkeys(self.SORTS, 0)
        self.tokens = dict.fromkeys(self.SORTS, 0)
        self._left: dict[str, list[int]] = {sort: [] for sort in self.SORTS}

    def _document(self, sort: str) -> Iterable[int]:
        number = self.taken[sort]
        self.taken[sort] += 1
        dice = random.Random(f"{self._seed}/{sort}/{number}")
        if sort == "echo":
            tokens = range(len(SPECIAL), self._tokenizer.get_vocab_size())
            noise = dice.choices(tokens, k=dice.randrange(*self.ECHO))
            return [*(~token for token in noise), *noise * dice.randint(1, 2)]
        if sort == "chat":
            kind = dice.choices(("simple", "fairy", "fiction"), (4, 1, 5))[0]
            text = self._conversations(dice.choice(self._stories[kind]), dice)
        else:
            text = self._story(sort, number).text + END
        return self._unlearned(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _story(self, sort: str, number: int) -> Story:
        epoch, place = divmod(number, len(self._stories[sort]))
        order = list(range(len(self._stories[sort])))
        random.Random(f"{self._seed}/{sort}/epoch {epoch}").shuffle(order)
        return self._stories[sort][order[place]]

    def sequence(self, sort: str, length: int) -> list[int]:
        """The next `length` tokens of a sort, documents end to end; each begins with <｜begin▁of▁sentence｜>."""
        left = self._left[sort]
        while len(left) < length:
            left += [self._begin, *self._document(sort)]
        self._left[sort] = left[length:]
        self.tokens[sort] += length
        return left[:length]

    def _unlearned(self, ids: list[int]) -> Iterator[int]:
        """The same, as `~id` from each <｜User｜> to the <｜Assistant｜> after it."""
        asked = False
        for token in ids:
            asked = asked or token == self._user
            yield ~token if asked else token
            asked = asked and token != self._assistant

    def batch(self, count: int, length: int, shares: dict[str, float], step: int) -> Tensor:
        """[count, length] of tokens, each sequence of a sort drawn by `shares`."""
        dice = random.Random(f"{self._seed}/step {step}")
        sorts = dice.choices(list(shares), list(shares.values()), k=count)
        return torch.tensor([self.sequence(sort, length) for sort in sorts])

    def state(self) -> dict[str, dict[str, object]]:
        return {"taken": dict(self.taken), "tokens": dict(self.tokens), "left": dict(self._left)}

    def load(self, state: dict[str, dict[str, object]]) -> None:
        self.taken |= state["taken"]  # type: ignore[arg-type]
        self.tokens |= state["tokens"]  # type: ignore[arg-type]
        self._left |= state["left"]  # type: ignore[arg-type]


def held_out(stories: Sequence[Story], kind: str) -> list[Story]:
    return [story for story in stories if story.held_out and story.kind == kind]


def windows(tokenizer: Tokenizer, text: str, length: int) -> list[list[int]]:
    """The tokens of a text in runs of `length`, each after a <｜begin▁of▁sentence｜> of its own."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return windows_of([tokenizer.token_to_id(BEGIN), *ids], length)


def windows_of(ids: Sequence[int], length: int) -> list[list[int]]:
    """The same of a text's tokens with its <｜begin▁of▁sentence｜>."""
    starts = [*range(1, len(ids), length), len(ids)]
    return [[ids[0], *ids[start:end]] for start, end in pairwise(starts)]
