"""Texts that were left for another, and what the model remembers of them.

The radix tree of everything computed, kept as its branches: the kernels attend to one matrix a layer, so the text in
use lies there in one piece (`localmoe.session.CachedTokens`), and of each text that was left only what came after the
fork is here. A token's rows are in one place at a time. Going back to a branch copies its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]


@dataclass(eq=False)  # one is not another, whatever they hold
class Branch:
    """The end of a text: `ids` from its beginning, rows from token `start` on.

    `rows` are the latents of each layer, [len(ids) - start, width]. `drafted` are the MTP layer's, whose row of a token
    needs the next one: the row of token t - 1 goes with token t, so there are len(ids) - max(start, 1).
    """

    ids: Ids
    start: int
    rows: Mapping[int, Tensor]
    drafted: Tensor | None = None

    def rows_of(self, layer: int, first: int, end: int) -> Tensor:
        """The rows of tokens `first` to `end` in a layer."""
        return self.rows[layer][first - self.start : end - self.start]

    def drafted_of(self, first: int, end: int) -> Tensor | None:
        """The MTP layer's rows `first` to `end`, which go with the tokens one further on."""
        before = max(self.start, 1) - 1
        return None if self.drafted is None else self.drafted[first - before : end - before]

    @property
    def count(self) -> int:
        """Tokens whose rows are here."""
        return len(self.ids) - self.start

    @property
    def nbytes(self) -> int:
        """Memory of the rows."""
        return sum(rows.nbytes for rows in self.rows.values()) + (0 if self.drafted is None else self.drafted.nbytes)


class Branches:
    """Branches, the one used last at the end."""

    def __init__(self) -> None:
        self._branches: list[Branch] = []

    @property
    def tokens(self) -> int:
        """Tokens whose rows are here."""
        return sum(branch.count for branch in self._branches)

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return sum(branch.nbytes for branch in self._branches)

    def add(self, branch: Branch) -> None:
        """Keep a branch."""
        self._branches.append(branch)

    def longest(self, ids: Sequence[int] | Ids, kept: int) -> tuple[Branch, int] | None:
        """The branch that knows most of `ids`, of which the first `kept` are in use, and how many it knows; None where
        none knows more than those."""
        wanted = np.asarray(ids, dtype=np.int64)
        known = [(common(branch.ids, wanted), branch) for branch in self._branches if branch.start <= kept]
        most, best = max(known, key=lambda each: each[0], default=(0, None))
        return None if best is None or most <= kept else (best, most)

    def give(self, branch: Branch, end: int) -> None:
        """The rows of its tokens up to `end` are in use again: only what follows stays here."""
        self._branches.remove(branch)
        if end < len(branch.ids):
            rows = {layer: branch.rows_of(layer, end, len(branch.ids)).clone() for layer in branch.rows}
            drafted = branch.drafted_of(end - 1, len(branch.ids) - 1)
            self.add(Branch(branch.ids, end, rows, None if drafted is None else drafted.clone()))

    def keep_within(self, tokens: int) -> None:
        """Forget those that were not used for longest, until the rest has at most so many tokens."""
        while self._branches and self.tokens > tokens:
            self._branches.pop(0)


def common(first: Ids, second: Ids) -> int:
    """How many tokens two texts begin with alike."""
    count = min(len(first), len(second))
    differs = np.flatnonzero(first[:count] != second[:count])
    return int(differs[0]) if len(differs) else count
