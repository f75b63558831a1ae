"""How often an expert that a token took was found on the card, counted while the model runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from localmoe.offload.slots import SlotTable


class HitCounts:
    """Of one model: `uses` int32 [L, E] are counted on the card, `tables` says who has a slot there, layer by layer.

    What was used since the last look is booked by the tables as they are, so `book` comes before these change.
    """

    def __init__(self, uses: Tensor, tables: Mapping[int, SlotTable]) -> None:
        self._uses = uses
        self._tables = tables
        self._seen = torch.zeros(uses.shape, dtype=torch.int64)
        self._totals = torch.zeros(len(uses), 2, dtype=torch.int64)

    def book(self) -> None:
        """Book the uses since the last call. Between passes: it waits for the card."""
        counts = self._uses.cpu().long()
        new = counts - self._seen
        self._seen = counts
        self._totals[:, 1] += new.sum(1)
        for layer, table in self._tables.items():
            self._totals[layer, 0] += new[layer][table.of_expert >= 0].sum()

    def totals(self) -> Tensor:
        """int64 [L, 2]: uses that found their expert on the card, and all that were counted. Between passes."""
        self.book()
        return self._totals.clone()


def rates(counts: Tensor, otherwise: list[float]) -> list[float]:
    """Layer by layer, the share of hits in `counts` [L, 2]; `otherwise` where nothing was counted (a layer that is not
    on the card, or before the first token)."""
    return [hits / uses if uses else placed for (hits, uses), placed in zip(counts.tolist(), otherwise, strict=True)]
