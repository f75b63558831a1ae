"""Guessing the next tokens cheaply, so that the model checks several in one pass.

The output does not depend on the guesses. A token is always drawn from the model's own logits, with random numbers
that depend on the seed and the token's position alone (`localmoe.sampling`); a guess is right when it is the token
that was drawn, and then the logits behind it are there already. Guesses of an MTP layer are drawn with the same random
numbers, which makes them right more often (Daliri, Musco, Suresh, https://arxiv.org/abs/2408.07978, on this
coupling; https://arxiv.org/abs/2211.17192 on speculative decoding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from localmoe.kernels.cpu import MATVEC_TOKENS
from localmoe.model.kv_cache import LatentCache

MOST_DRAFTS = MATVEC_TOKENS - 1
"""With the token before them, as many as the CPU kernels compute each as if alone, to the bit."""

Choose = Callable[[Tensor, int], int]
"""Logits float32 [V] and how far ahead -> a token id."""


class Drafter(Protocol):
    """Guesses what comes after the tokens in a cache, whose states it may have seen."""

    name: str
    needs_states: bool  # of the main model, for `observe`

    def keep(self, count: int) -> int:
        """The cache is about to forget all but `count` tokens. Returns how many it may keep for the drafter to go on:
        `count`, or fewer where a state that it needs is no longer there."""
        ...

    def observe(self, token_ids: Sequence[int], states: Tensor | None) -> None:
        """The cache now holds `token_ids`, the last of which were just computed: their states, float32 [T, H]. One that
        needs states is not told of every pass; it needs to know the one before a guess."""
        ...

    def draft(self, token_ids: Sequence[int], next_id: int, count: int, choose: Choose) -> list[int]:
        """Up to `count` tokens that may come after `token_ids`, those in the cache, and `next_id`."""
        ...


class MtpSteps(Protocol):
    """What drafting needs of an MTP layer: `localmoe.model.mtp.MtpLayer`, or a fake in tests."""

    def remember(self, states: Tensor, next_ids: Sequence[int], cache: LatentCache, start: int) -> None: ...

    def step(self, states: Tensor, next_ids: Sequence[int], cache: LatentCache, start: int) -> Tensor: ...

    def logits(self, state: Tensor) -> Tensor: ...

    @property
    def width(self) -> int: ...


class MtpDrafter:
    """Guesses with the checkpoint's own MTP layer; further ones by feeding it its own state.

    The layer's cache lags behind the main one: a row needs the token after it. States wait until a guess is asked for,
    and join its pass. Where they are many, their rows alone are made, so a pause in guessing costs next to nothing.

    The rows are those of tokens `start`, `start + 1`, ...: of the whole text, unless some were not observed, at its
    beginning or where nothing was to be guessed for a while. Then the layer attends to what came since, and is right
    less often at first.
    """

    name = "mtp"
    needs_states = True
    _MOST_WAITING = 256

    def __init__(self, layer: MtpSteps, cache: LatentCache) -> None:
        self.cache = cache
        self.start = 0
        self.width = layer.width
        """Numbers in a state."""
        self._layer = layer
        self._waiting = _States()  # of the tokens from `_first` on; the first may have its row already
        self._first = 0
        self.seen = 0
        """The token after the last one whose state was here."""

    @property
    def end(self) -> int:
        """The token after the last one that has a row."""
        return self.start + self.cache.length

    @property
    def rows(self) -> Tensor:
        """The latents as stored, [end - start, width]."""
        (layer,) = self.cache.layers
        return self.cache.reserve(layer, 0)

    def keep(self, count: int) -> int:
        """See `Drafter`."""
        if self.seen == self.start or not self.start < count <= self.seen:
            self.restart(count)
            return count
        if count > self._first:
            self._drop_states(count)
            self._drop_rows(count - 1)
        else:  # the last token's row was made with a token that now changes, and its state is gone
            count -= 1
            self._drop_rows(count)
            self._waiting.clear()
            self._first = self.seen = count
        return count

    def observe(self, token_ids: Sequence[int], states: Tensor | None) -> None:
        """See `Drafter`."""
        if states is None:
            raise ValueError("an MTP layer needs the model's states")
        first = len(token_ids) - len(states)
        if first != self.seen:
            self.restart(first)
        self._waiting.add(states)
        self.seen = len(token_ids)
        if len(token_ids) - self.end > self._MOST_WAITING:
            self.settle(token_ids)

    def settle(self, token_ids: Sequence[int]) -> None:
        """Make the rows of all tokens seen but the last, whose next token is not known."""
        states = self._without_rows()
        if len(states) > 1:
            following = token_ids[self.end + 1 : self.end + len(states)]
            with torch.inference_mode():
                self._layer.remember(states[:-1], following, self.cache, self.start)
        if len(states):
            self._keep_last()

    def draft(self, token_ids: Sequence[int], next_id: int, count: int, choose: Choose) -> list[int]:
        """See `Drafter`."""
        if count < 1 or not self._waiting.count or self.seen != len(token_ids):
            return []
        self._drop_rows(len(token_ids) - 1)
        if len(token_ids) - self.end > MATVEC_TOKENS:
            self.settle(token_ids)
        states = self._without_rows()  # [T, H], of the last tokens
        following = [*token_ids[self.end + 1 :], next_id]
        guesses: list[int] = []
        with torch.inference_mode():
            state = self._layer.step(states, following, self.cache, self.start)  # [1, H]
            guesses.append(choose(self._layer.logits(state)[0], 0))
            for ahead in range(1, count):
                state = self._layer.step(state, guesses[-1:], self.cache, self.start)
                guesses.append(choose(self._layer.logits(state)[0], ahead))
        self._drop_rows(len(token_ids))  # guesses' rows were made with the layer's own states: the model's replace them
        self._keep_last()
        return guesses

    def last_state(self) -> Tensor:
        """After `settle`: of the token whose row is still to be made, [1, H]; [0, 0] where there is none."""
        states = self._without_rows()
        return states[-1:].clone() if len(states) else torch.empty(0, 0)

    def resume(self, start: int, rows: int, state: Tensor) -> None:
        """Go on from `rows` rows that were written into the empty cache, token `start`'s first, and a state as
        `last_state` gave it."""
        self.start = start
        self.cache.advance(rows)
        self._waiting.clear()
        if len(state):
            self._waiting.add(state)
        self._first = self.end
        self.seen = self.end + len(state)

    def append(self, rows: Tensor) -> None:
        """Go on from rows that were kept elsewhere, as stored; with the last, those of all tokens are there."""
        (layer,) = self.cache.layers
        self.cache.reserve(layer, len(rows))[self.cache.length :] = rows
        self.cache.advance(len(rows))
        self._waiting.clear()
        self._first = self.seen = self.end

    def restart(self, token: int) -> None:
        """Forget everything, and attend to what comes from `token` on."""
        self.cache.truncate(0)
        self.start = self._first = self.seen = token
        self._waiting.clear()

    def _without_rows(self) -> Tensor:
        """The states that wait for their rows, [T, H]: good until the next one comes."""
        return self._waiting.since(self.end - self._first)

    def _keep_last(self) -> None:
        """All seen have their rows but the last."""
        self._waiting.keep_last()
        self._first = self.seen - 1

    def _drop_rows(self, end: int) -> None:
        """Only tokens before `end` keep theirs."""
        self.cache.truncate(min(self.cache.length, end - self.start))

    def _drop_states(self, end: int) -> None:
        """Only tokens before `end`, of which one waits, keep theirs."""
        if end < self.seen:
            self._waiting.count = end - self._first
            self.seen = end


class _States:
    """States in a row, float32 [T, H], in memory of their own. Kept as the tensors that they come in, they would be in
    the way of the next passes', which then take new memory each time."""

    def __init__(self) -> None:
        self._rows = torch.empty(0, 0)
        self._array = self._rows.numpy()  # the same memory: torch takes longer to find a row than to copy it
        self.count = 0

    def add(self, states: Tensor) -> None:
        """Copy them behind the others."""
        end = self.count + len(states)
        if end > len(self._array):
            rows = torch.empty(max(end, 2 * len(self._array), 64), states.shape[1])
            array = rows.numpy()
            if self.count:
                array[: self.count] = self._array[: self.count]
            self._rows, self._array = rows, array
        self._array[self.count : end] = states.numpy()
        self.count = end

    def since(self, start: int) -> Tensor:
        """Those from `start` on, not copied."""
        return self._rows[start : self.count]

    def keep_last(self) -> None:
        """Forget all but the last."""
        self._array[0] = self._array[self.count - 1]
        self.count = 1

    def clear(self) -> None:
        """Forget all."""
        self.count = 0


class LookupDrafter:
    """Guesses that the text goes on as it did where its last few tokens stood before (prompt lookup decoding,
    https://github.com/apoorvumang/prompt-lookup-decoding). No model: good where an answer repeats its prompt."""

    name = "lookup"
    needs_states = False
    _LENGTHS = (5, 3, 2)  # tokens that have to agree, the longest first

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}  # n-gram -> where it ended last, with a token after it
        self._indexed = 0

    def keep(self, count: int) -> int:
        """See `Drafter`."""
        self._indexed = min(self._indexed, count)
        return count

    def observe(self, token_ids: Sequence[int], states: Tensor | None) -> None:
        """See `Drafter`."""
        for end in range(self._indexed, len(token_ids)):
            for length in self._LENGTHS:
                if end >= length:
                    self._places[tuple(token_ids[end - length : end])] = end
        self._indexed = len(token_ids)

    def draft(self, token_ids: Sequence[int], next_id: int, count: int, choose: Choose) -> list[int]:
        """See `Drafter`."""
        text = [*token_ids[-max(self._LENGTHS) :], next_id]
        for length in self._LENGTHS:
            wanted = tuple(text[-length:])
            place = self._places.get(wanted)
            # A place may be of a text that was taken back since
            if place is not None and place < len(token_ids) and tuple(token_ids[place - length : place]) == wanted:
                return [*token_ids[place : place + count], next_id][:count]
        return []


@dataclass(frozen=True)
class SpeculationStats:
    """What guessing did in one generation. `drafts` is how many tokens are guessed at a time by now: 0 where it was
    found not to pay, or nothing is known yet."""

    drafter: str
    passes: int  # of the model, after the prompt's
    drafted_tokens: int
    accepted_tokens: int
    drafts: int

    @property
    def acceptance_rate(self) -> float | None:
        """The share of guesses that were right; None without guesses."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None
