"""One conversation's tokens and what the model remembers of them, in memory and on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from localmoe.branches import Branch, Branches, common
from localmoe.errors import UsageError
from localmoe.model.kv_cache import LatentCache
from localmoe.speculative import Choose, Drafter, MtpDrafter

_WORTH_KEEPING = 16  # tokens: fewer are computed again in one pass


class LanguageModel(Protocol):
    """What generation needs of a model: `localmoe.model.deepseek.Model`, or a fake in tests."""

    def forward(self, token_ids: Tensor, cache: LatentCache, *, last_only: bool = False) -> Tensor:
        """Logits float32 [T, V], or [1, V] of the last token; `cache` then holds the tokens."""
        ...

    def forward_with_states(
        self, token_ids: Tensor, cache: LatentCache, *, last_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """What `forward` returns, and what the head read, float32 [T, H], or of the last tokens of many. Only asked for
        by a drafter that needs it."""
        ...


class CachedTokens:
    """A latent cache and the ids of the tokens in it, so that a prompt with the same beginning can go on there.

    What is left behind, as a conversation goes back or another one is taken up, is kept on the side as long as it fits
    the cache's capacity together with the text in use. `drafter` sees every token that comes in or goes, if there is
    one.
    """

    def __init__(self, cache: LatentCache, drafter: Drafter | None = None) -> None:
        self.cache = cache
        self.drafter = drafter
        self._ids: list[int] = []
        self._turn = 0
        self._branches = Branches()

    @property
    def mtp(self) -> MtpDrafter | None:
        """The drafter, where it is an MTP layer: its latents are kept wherever these are."""
        return self.drafter if isinstance(self.drafter, MtpDrafter) else None

    @property
    def capacity(self) -> int:
        """Tokens it can hold."""
        return self.cache.capacity

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What it holds."""
        return tuple(self._ids)

    @property
    def nbytes(self) -> int:
        """Memory of all latents but the MTP layer's own."""
        return self.cache.nbytes + self._branches.nbytes

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
        """Put what is known of `token_ids`, from the beginning, into use. Returns (tokens known, turn).

        At least the last token is left to compute: its logits are wanted. `turn` is to be given to `extend`.
        """
        self._turn += 1
        wanted = np.asarray(token_ids[:-1], dtype=np.int64)
        kept = common(np.asarray(self._ids[: self.length], dtype=np.int64), wanted)
        with torch.inference_mode():
            if self.length - kept >= _WORTH_KEEPING:
                self._leave(kept)
            kept = self._cut(kept)
            while (found := self._branches.longest(wanted, kept)) is not None:
                branch, known = found
                if not self._take_up(branch, known):
                    break
                kept = self.length
        self._branches.keep_within(self.capacity - len(token_ids))
        return kept, self._turn

    def extend(
        self, model: LanguageModel, token_ids: Sequence[int], turn: int, *, every: bool = False, guessing: bool = True
    ) -> Tensor:
        """Run the model over more tokens; float32 logits [1, V] of the last, or [T, V] of every one.

        Without `guessing` nothing is guessed after them, and no states are kept for it. Raises UsageError for an old
        turn.
        """
        self._check(turn)
        ids = torch.tensor(token_ids)
        states = None
        with torch.inference_mode():
            if guessing and self.drafter is not None and self.drafter.needs_states:
                logits, states = model.forward_with_states(ids, self.cache, last_only=not every)
            else:
                logits = model.forward(ids, self.cache, last_only=not every)
        self._ids += token_ids
        if self.drafter is not None and (states is not None or not self.drafter.needs_states):
            self.drafter.observe(self._ids, states)
        self._branches.keep_within(self.capacity - len(self._ids))
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

    def _leave(self, kept: int) -> None:
        """Copy what comes after the first `kept` tokens to the side."""
        ids = self._ids[: self.length]
        drafted = None
        if (mtp := self.mtp) is not None:
            kept = max(kept - 1, 0)  # it may need the state of the last token kept again
            first = max(kept, 1) - 1
            if mtp.start <= first and mtp.seen == len(ids):
                mtp.settle(ids)
                drafted = _aside(mtp.rows[first - mtp.start : len(ids) - 1 - mtp.start])
        rows = {layer: _aside(self.cache.reserve(layer, 0)[kept : len(ids)]) for layer in self.cache.layers}
        self._branches.add(Branch(np.asarray(ids, dtype=np.int64), kept, rows, drafted))

    def _take_up(self, branch: Branch, known: int) -> bool:
        """Go on with the first `known` tokens of a branch, but for the last where its state is needed. False where that
        is not more than there is."""
        first = len(self._ids)
        mtp = self.mtp
        end = known if mtp is None else known - 1
        if end <= first:
            return False
        for layer in self.cache.layers:
            self.cache.reserve(layer, end - first)[first:] = branch.rows_of(layer, first, end)
        self.cache.advance(end - first)
        if mtp is not None:
            mtp.settle(self._ids)
            drafted = branch.drafted_of(mtp.end, end)
            if drafted is None:
                mtp.restart(end)
            else:
                mtp.append(drafted)
        self._ids += branch.ids[first:end].tolist()
        if self.drafter is not None and not self.drafter.needs_states:
            self.drafter.observe(self._ids, None)
        self._branches.give(branch, end)
        return True


def _aside(rows: Tensor) -> Tensor:
    """A copy in the CPU's memory: a card's is for what is in use."""
    return rows.to("cpu", copy=True)
