"""Which expert is in which slot of a layer, and how that changes while a model runs.

A slot is emptied first (from then on its expert is computed on the CPU), filled in the background, and counted as held
only when all of its new weights have arrived. Both changes are made between passes, so that the card and the CPU always
agree on who computes an expert. A generation tells a late arrival from the one that is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class SlotTable:
    """One layer's slots. `of_expert` int32 [E] says which slot an expert has, -1 for none: it is changed in place."""

    def __init__(self, experts: int, held: Sequence[int]) -> None:
        self.of_expert = torch.full((experts,), -1, dtype=torch.int32)
        self._held: list[int | None] = list(held)
        self._generation = [0] * len(held)
        for slot, expert in enumerate(held):
            self.of_expert[expert] = slot

    @property
    def held(self) -> list[int]:
        """Experts in slots, in the order of these; slots being filled hold none."""
        return [expert for expert in self._held if expert is not None]

    def empty(self, slot: int) -> int:
        """Take its expert out of a slot, to fill it with another: returns the generation to say with `fill`."""
        expert = self._held[slot]
        if expert is not None:
            self.of_expert[expert] = -1
        self._held[slot] = None
        self._generation[slot] += 1
        return self._generation[slot]

    def fill(self, slot: int, generation: int, expert: int) -> bool:
        """All of `expert`'s weights are in the slot. False, and nothing changes, if the slot was emptied once more
        meanwhile, or the expert has another slot by now."""
        if generation != self._generation[slot] or self._held[slot] is not None or int(self.of_expert[expert]) >= 0:
            return False
        self._held[slot] = expert
        self.of_expert[expert] = slot
        return True

    def slot_of(self, expert: int) -> int | None:
        """Its slot, if it has one."""
        slot = int(self.of_expert[expert])
        return slot if slot >= 0 else None


@dataclass(frozen=True)
class Swap:
    """An expert that is used more than another which has a slot: it should have that slot."""

    layer: int
    leaves: int
    comes: int
    gain: float


def best_swaps(
    uses: Tensor, tables: dict[int, SlotTable], most: int, *, ratio: float = 1.5, least: float = 4.0
) -> list[Swap]:
    """Up to `most` swaps, at most one a layer, the most gain first. `uses` [L, E] are recent; an expert comes in when
    it was used `ratio` times as often as the one that leaves and `least` times more: less is noise."""
    found = []
    for layer, table in tables.items():
        here = table.of_expert >= 0
        if not bool(here.any()) or bool(here.all()):
            continue
        row = uses[layer].double()
        leaves = int(torch.where(here, row, torch.inf).argmin())
        comes = int(torch.where(here, -torch.inf, row).argmax())
        gain = float(row[comes] - row[leaves])
        if float(row[comes]) >= ratio * float(row[leaves]) and gain >= least:
            found.append(Swap(layer, leaves, comes, gain))
    return sorted(found, key=lambda swap: (-swap.gain, swap.layer))[:most]
