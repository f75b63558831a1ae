"""What the demo model is trained on: stories, conversations and noise as sequences of tokens, in a fixed order."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from demo_talk import Conversations
from demo_text import ASSISTANT, BEGIN, END, SPECIAL, USER, Story
from tokenizers import Tokenizer
from torch import Tensor


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
