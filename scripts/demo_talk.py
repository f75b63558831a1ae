"""Conversations made from stories: what a reader could ask for, and a story, a scene or a title that answers it."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence

from demo_text import ASSISTANT, END, PAGE, THINK, THINK_END, USER, Story

LONG, SHORT = 1500, 300  # characters of an answer made of whole paragraphs: about so many, and never fewer
OPENING = 300  # characters in which an answer comes to what it is about

_WORD = re.compile(r"[A-Za-z]+")
_NOUN = re.compile(r"\b(a|an|the|his|her|their|my|your|this|that) ([a-z]{3,14})\b( [a-z]+)?")
_FOLLOWING = frozenset((
    "and", "or", "but", "of", "in", "on", "at", "to", "for", "with", "from", "by", "was", "is", "were", "had", "has",
    "said", "came", "went", "who", "that", "which", "as", "when", "then", "so", "into", "over", "under", "did",
    "would", "could", "will", "can", "again", "looked", "began", "up", "down", "ran", "sat",
))  # fmt: skip
_ACTS = re.compile(
    r"\b([a-z]{3,14}) (?:said|asked|cried|replied|thought|answered|told|wanted|went|ran|came|looked|saw|knew|felt"
    r"|laughed|shouted|sat|whispered)\b|\b(?:said|asked|cried|replied) (?:a|an|the) ([a-z]{3,14})\b"
)
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
    """Finds what a story is about: nouns that it often names and others seldom do."""

    KNOWN = 5  # stories that use a word as a noun make it one where it is a name ("Hare") or in the title
    SHARE = 0.03  # or more of the uses of a noun follow a determiner and end there; of other words next to none do
    NAME_SHARE = 0.08  # or more of those of a word that can stand for any noun
    ACTING = 0.03  # or more of the uses of a being's name stand beside what it says or does

    def __init__(self, stories: Sequence[Story]) -> None:
        self._in_stories, used, words, acts = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
        for story in stories:
            nouns = self._nouns(story.text)
            self._in_stories.update(nouns.keys())
            used.update(nouns)
            words.update(_WORD.findall(story.text.lower()))
            acts.update(before or after for before, after in _ACTS.findall(story.text.lower()))
        self._common = len(stories) * 0.25
        self._other = {word for word, count in used.items() if count < self.SHARE * words[word]}
        self._beings = {word for word, count in acts.items() if count >= self.ACTING * words[word]}
        self.all = sorted(
            noun
            for noun in self._in_stories
            if self._is_subject(noun)
            and self._in_stories[noun] >= self.KNOWN
            and used[noun] >= self.NAME_SHARE * words[noun]
        )
        """Every noun that a story could be about."""

    def is_being(self, noun: str) -> bool:
        """Whether stories often say what it says or does."""
        return noun in self._beings

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


class Names:
    """Nouns that a noun can be called by in its place: a being by beings, a thing by things."""

    def __init__(self, subjects: Subjects, plainness: Plainness) -> None:
        self._subjects = subjects
        plain = [noun for noun in subjects.all if noun in plainness]
        self._of = {being: [noun for noun in plain if subjects.is_being(noun) == being] for being in (False, True)}

    def __call__(self, noun: str) -> list[str]:
        return self._of[self._subjects.is_being(noun)]


class Recast:
    """Gives a text's subjects other names, at random: what a story is about then cannot be guessed from the story, only
    read in what was asked for, and the model has to learn to."""

    def __init__(
        self, text: str, about: Sequence[str], names: Callable[[str], Sequence[str]], dice: random.Random
    ) -> None:
        self._names = {}
        there = {word.lower() for word in _WORD.findall(text)}
        for subject in about:
            noun = subject.split()[-1]
            if unused := [name for name in names(noun) if name not in there]:
                new = self._names[noun] = dice.choice(unused)
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
    HERE = "Here is a story about {}.\n\n"
    BEGINNING = ("Write the beginning of a story about {}.", "How does a story about {} begin?")
    SCENE = ("Write about {}.", "Write a scene with {}.", "Tell me about {}.")
    NEXT = ("What happens next?", "Go on.", "And then?", "Please continue the story.", "What happened then?")
    TITLE = ("Give it a title.", "What is a good title for this story?", "Give this story a title.")
    RECAST = 0.6  # of the stories and scenes
    SCENES = 12  # are looked at for one: of a long story, the plainest that is about something

    def __init__(self, stories: Sequence[Story]) -> None:
        self._subjects, self._plainness = Subjects(stories), Plainness(stories)
        self._names = Names(self._subjects, self._plainness)

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
        tells = whole or dice.random() < 0.5
        about = self._subjects(text, dice.choice((1, 2, 2, 3)), story.title)
        recast = self._recast(text, about, dice)
        text, about = recast(text), [recast.subject(noun) for noun in about] or [f'"{self._named(story)}"']
        asked = dice.choice(self.TELL if tells else self.BEGINNING).format(listed(about))
        told = self._turn(asked, self._here(about, tells) + text, self._plan(text, about, dice))
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
        tells = dice.random() < 0.5
        asked = dice.choice(self.TELL if tells else self.SCENE).format(listed(about))
        return self._turn(asked, self._here(about, tells) + text, self._plan(text, about, dice))

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

    def _here(self, about: Sequence[str], tells: bool) -> str:
        """What a story that was asked for is about, said again before it: so near, it is kept in mind."""
        return self.HERE.format(listed(about)) if tells else ""

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
