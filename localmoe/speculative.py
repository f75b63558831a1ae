"""Guessing the next tokens cheaply, so that the model checks several in one pass.

The output does not depend on the guesses. A token is always drawn from the model's own logits, with random numbers
that depend on the seed and the token's position alone (`localmoe.sampling`); a guess is right when it is the token
that was drawn, and then the logits behind it are there already. Guesses of an MTP layer are drawn with the same random
numbers, which makes them right more often (Daliri, Musco, Suresh, https://arxiv.org/abs/2408.07978, on this
coupling; https://arxiv.org/abs/2211.17192 on speculative decoding).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
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
        """The cache now holds `token_ids`, the last of which were just computed: their states, float32 [T, H]."""
        ...

    def draft(self, token_ids: Sequence[int], next_id: int, count: int, choose: Choose) -> list[int]:
        """Up to `count` tokens that may come after `token_ids`, those in the cache, and `next_id`."""
        ...


class MtpSteps(Protocol):
    """What drafting needs of an MTP layer: `localmoe.model.mtp.MtpLayer`, or a fake in tests."""

    def remember(self, states: Tensor, next_ids: Tensor, cache: LatentCache) -> None: ...

    def step(self, state: Tensor, next_id: int, cache: LatentCache) -> Tensor: ...

    def logits(self, state: Tensor) -> Tensor: ...


class MtpDrafter:
    """Guesses with the checkpoint's own MTP layer; further ones by feeding it its own state.

    The layer's cache lags behind the main one: a row needs the token after it. States wait until a guess is asked
    for, so that a pause in guessing costs nothing but their memory, and that is bounded.
    """

    name = "mtp"
    needs_states = True
    _MOST_WAITING = 256

    def __init__(self, layer: MtpSteps, cache: LatentCache) -> None:
        self.cache = cache
        self._layer = layer
        self._waiting: list[Tensor] = []  # states of the tokens from `_first` on
        self._first = 0

    def keep(self, count: int) -> int:
        """See `Drafter`."""
        held = self.cache.length
        count = min(count, max(held, self._first + self._count))
        if count > held:
            self._trim(count)
            return count
        # The row of the last token kept was made with a token that now changes, and its state is gone
        kept = max(count - 1, 0)
        self.cache.truncate(min(kept, held))
        self._waiting, self._first = [], kept
        return kept

    def observe(self, token_ids: Sequence[int], states: Tensor | None) -> None:
        """See `Drafter`."""
        if states is None:
            raise ValueError("an MTP layer needs the model's states")
        if not self._waiting:
            self._first = len(token_ids) - len(states)
        self._waiting.append(states)
        if len(token_ids) - self.cache.length > self._MOST_WAITING:
            self.settle(token_ids)

    def waiting_state(self, token_ids: Sequence[int]) -> Tensor | None:
        """With the cache's rows all that there is of `token_ids`: the last one's state, [1, H], or [0, H] where the
        rows are complete. None where this drafter has not seen them all."""
        if self._waiting:
            if self._first + self._count != len(token_ids):
                return None
            self.settle(token_ids)
        state = self._waiting[-1] if self._waiting else torch.empty(0, 0)
        return state if self.cache.length + len(state) == len(token_ids) else None

    def resume(self, rows: int, state: Tensor) -> None:
        """Go on from `rows` rows that were written into the empty cache and what `waiting_state` gave then."""
        self.cache.advance(rows)
        self._waiting, self._first = [state] if len(state) else [], rows

    @property
    def rows(self) -> Tensor:
        """Its latents as stored, [rows, width]."""
        (layer,) = self.cache.layers
        return self.cache.reserve(layer, 0)

    def settled(self, token_ids: Sequence[int]) -> int:
        """How many rows there are of `token_ids`, those in the main cache, with all that can be made."""
        if self._waiting:
            self.settle(token_ids)
        return self.cache.length

    def append(self, rows: Tensor) -> None:
        """Go on from rows that were kept elsewhere, as stored; with the last, those of all tokens are there."""
        (layer,) = self.cache.layers
        self.cache.reserve(layer, len(rows))[self.cache.length :] = rows
        self.cache.advance(len(rows))
        self._waiting, self._first = [], self.cache.length

    def settle(self, token_ids: Sequence[int]) -> None:
        """Put the states that wait into the cache, but for the last, whose next token is not known."""
        start = self.cache.length
        states = torch.cat(self._waiting)[start - self._first :] if self._waiting else torch.empty(0, 0)
        if len(states) > 1:
            following = torch.tensor(token_ids[start + 1 : start + len(states)])
            with torch.inference_mode():
                self._layer.remember(states[:-1], following, self.cache)
        self._waiting, self._first = [states[-1:].clone()], start + len(states) - 1

    def draft(self, token_ids: Sequence[int], next_id: int, count: int, choose: Choose) -> list[int]:
        """See `Drafter`."""
        if count < 1 or self._first + self._count != len(token_ids) or self.cache.length > len(token_ids):
            return []
        self.settle(token_ids)
        guesses = [next_id]
        with torch.inference_mode():
            state = self._waiting[-1]  # [1, H]
            for ahead in range(count):
                state = self._layer.step(state, guesses[-1], self.cache)
                guesses.append(choose(self._layer.logits(state)[0], ahead))
        # The rows of guesses were made with the layer's own states: the model's replace them
        self.cache.truncate(len(token_ids))
        return guesses[1:]

    @property
    def _count(self) -> int:
        return sum(len(states) for states in self._waiting)

    def _trim(self, count: int) -> None:
        """Drop the states of the tokens from `count` on."""
        while self._waiting and self._first + self._count > count:
            excess = self._first + self._count - count
            last = self._waiting.pop()
            if excess < len(last):
                self._waiting.append(last[: len(last) - excess])


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
    found not to pay."""

    drafter: str
    passes: int  # of the model, after the prompt's
    drafted_tokens: int
    accepted_tokens: int
    drafts: int

    @property
    def acceptance_rate(self) -> float | None:
        """The share of guesses that were right; None without guesses."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None


class DraftLength:
    """How many tokens to guess at a time: what gave the most tokens a second so far, in this process.

    A pass with k guesses takes a time t(k) and gives 1 + a(1) + a(1) a(2) + ... tokens, a(j) being how often the j-th
    guess is right once those before it were. Both are measured while running. Lengths next to the best are tried when
    times and rates, carried on, promise more; where guessing loses, it is tried again ever more rarely.
    """

    _FIRST = 4  # plain passes, and then passes with one guess, before anything is decided
    _RECENT = 15  # passes that a time is the median of
    _DECAY = 0.99  # of what acceptance remembers, a pass
    _OFTEN, _SELDOM = 64, 512  # passes until a length that lost is tried again
    _BURST = 2  # passes of such a trial
    _MARGIN = 1.03  # guessing must win by: it is not to lose when the measured times are a little off

    def __init__(self, most: int, *, fixed: bool) -> None:
        self._most = most
        self._fixed = fixed
        self._times: list[deque[float]] = [deque(maxlen=self._RECENT) for _ in range(most + 1)]
        self._tried = [0.0] * (most + 1)  # guesses at this distance that were checked ...
        self._right = [0.0] * (most + 1)  # ... and right
        self._since_trial = 0
        self._interval = self._OFTEN
        self._trials_left = 0

    @property
    def best(self) -> int:
        """The length with the most tokens a second by what is known, among those tried and the next longer one."""
        if self._fixed or len(self._times[0]) < self._FIRST or len(self._times[1]) < self._FIRST:
            return self._most if self._fixed else 0
        plain = 1 / self._time(0)
        rates = {length: self._rate(length) for length in range(1, self._most + 1) if self._known(length)}
        longest = max(rates)
        if longest < self._most:  # the times go on as they did
            longer = self._time(longest) + max(self._time(longest) - self._time(longest - 1), 0.0)
            rates[longest + 1] = self._tokens(longest + 1) / longer
        winner = max(rates, key=lambda length: rates[length])
        return winner if rates[winner] > plain * self._MARGIN else 0

    def next(self) -> int:
        """How many to guess now."""
        if self._fixed:
            return self._most
        if len(self._times[0]) < self._FIRST:
            return 0
        if len(self._times[1]) < self._FIRST:
            return 1
        best = self.best
        if self._trials_left == 0 and self._since_trial >= self._interval:
            self._trials_left, self._since_trial = self._BURST, 0
            self._interval = self._OFTEN if best else min(2 * self._interval, self._SELDOM)
        if self._trials_left:
            return 0 if best else 1
        return best

    def record(self, drafted: int, accepted: int, seconds: float) -> None:
        """A pass that checked `drafted` guesses, found the first `accepted` right, and took `seconds` with them."""
        self._times[drafted].append(seconds)
        self._trials_left = max(self._trials_left - 1, 0)
        self._since_trial += 1
        for distance in range(1, min(accepted + 1, drafted) + 1):
            self._tried[distance] = self._tried[distance] * self._DECAY + 1
            self._right[distance] = self._right[distance] * self._DECAY + (distance <= accepted)

    def _known(self, length: int) -> bool:
        return len(self._times[length]) > 0 and (length == 0 or self._known(length - 1))

    def _time(self, length: int) -> float:
        return median(self._times[length])

    def _rate(self, length: int) -> float:
        return self._tokens(length) / self._time(length)

    def _tokens(self, length: int) -> float:
        """Tokens that a pass with so many guesses gives."""
        tokens = reach = 1.0
        share = 0.0
        for distance in range(1, length + 1):
            if self._tried[distance] > 0:
                share = self._right[distance] / self._tried[distance]
            reach *= share
            tokens += reach
        return tokens
