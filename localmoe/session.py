"""One conversation's tokens and what the model remembers of them, in memory and on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from localmoe.errors import UsageError
from localmoe.model.kv_cache import LatentCache
from localmoe.speculative import Choose, Drafter


class LanguageModel(Protocol):
    """What generation needs of a model: `localmoe.model.deepseek.Model`, or a fake in tests."""

    def forward(self, token_ids: Tensor, cache: LatentCache, *, last_only: bool = False) -> Tensor:
        """Logits float32 [T, V], or [1, V] of the last token; `cache` then holds the tokens."""
        ...

    def states(self, token_ids: Tensor, cache: LatentCache) -> Tensor:
        """As `forward`, but what the head reads, float32 [T, H]. Only asked for by a drafter that needs it."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """The head: [T, H] -> [T, V]."""
        ...


class CachedTokens:
    """A latent cache and the ids of the tokens in it, so that a prompt with the same beginning can go on there.

    `drafter` sees every token that comes in or goes, if there is one.
    """

    def __init__(self, cache: LatentCache, drafter: Drafter | None = None) -> None:
        self.cache = cache
        self.drafter = drafter
        self._ids: list[int] = []
        self._turn = 0

    @property
    def capacity(self) -> int:
        """Tokens it can hold."""
        return self.cache.capacity

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What it holds."""
        return tuple(self._ids)

    @property
    def length(self) -> int:
        """Tokens that both the ids and the latents are there of: an interrupt may have come between the two."""
        return min(len(self._ids), self.cache.length)

    def adopt(self, token_ids: Sequence[int]) -> None:
        """Count the rows that were written into the empty cache as those of `token_ids`."""
        if self._ids or self.cache.length:
            raise ValueError("only an empty cache can take over another's tokens")
        self.cache.advance(len(token_ids))
        self._ids = list(token_ids)
        if self.drafter is not None and not self.drafter.needs_states:
            self.drafter.observe(self._ids, None)

    def begin(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """Keep what `token_ids` begins with and forget the rest. Returns (tokens kept, turn).

        At least the last token is left to compute: its logits are wanted. `turn` is to be given to `extend`.
        """
        longest = min(self.length, len(token_ids) - 1)
        kept = next((n for n in range(longest) if self._ids[n] != token_ids[n]), longest)
        self._turn += 1
        return self._cut(kept), self._turn

    def extend(self, model: LanguageModel, token_ids: Sequence[int], turn: int, *, every: bool = False) -> Tensor:
        """Run the model over more tokens; float32 logits [1, V] of the last, or [T, V] of every one.

        Raises UsageError for an old turn.
        """
        self._check(turn)
        ids = torch.tensor(token_ids)
        states = None
        with torch.inference_mode():
            if self.drafter is not None and self.drafter.needs_states:
                states = model.states(ids, self.cache)  # [T, H]
                logits = model.logits(states if every else states[-1:])
            else:
                logits = model.forward(ids, self.cache, last_only=not every)
        self._ids += token_ids
        if self.drafter is not None:
            self.drafter.observe(self._ids, states)
        return logits

    def draft(self, next_id: int, count: int, choose: Choose, turn: int) -> list[int]:
        """Up to `count` guesses of what comes after `next_id`, as many as there is room for. As `extend` otherwise."""
        self._check(turn)
        room = self.capacity - len(self._ids) - 1
        if self.drafter is None or min(count, room) < 1:
            return []
        return self.drafter.draft(self._ids, next_id, min(count, room), choose)

    def forget(self, count: int, turn: int) -> None:
        """Take back the last `count` tokens; nothing for an old turn, whose tokens are gone."""
        if count and turn == self._turn:
            self._cut(len(self._ids) - count)

    def _check(self, turn: int) -> None:
        if turn != self._turn:
            raise UsageError("another generation has begun on the same cache; finish one before the next")

    def _cut(self, kept: int) -> int:
        """Keep the first `kept` tokens, or fewer where the drafter needs their states again; returns how many."""
        if self.drafter is not None:
            kept = self.drafter.keep(kept)
        self.cache.truncate(kept)
        del self._ids[kept:]
        return kept
