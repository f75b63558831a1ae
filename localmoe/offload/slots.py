"""Which expert is in which slot of a layer, and how that changes while a model runs.

A slot is emptied first (from then on its expert is computed on the CPU), filled in the background, and counted as held
only when all of its new weights have arrived. Both changes are made between passes, so that the card and the CPU always
agree on who computes an expert. A generation tells a late arrival from the one that is waited for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor


class SlotTable:
    """One layer's slots. `of_expert` int32 [E] says which slot an expert has, -1 for none: it is changed in place.

    The experts `held` have the slots `numbers`, one each: 0, 1, ... unless said otherwise.
    """

    def __init__(self, experts: int, held: Sequence[int], numbers: Sequence[int] | None = None) -> None:
        self.of_expert = torch.full((experts,), -1, dtype=torch.int32)
        own = range(len(held)) if numbers is None else numbers
        self._held: dict[int, int | None] = dict(zip(own, held, strict=True))
        self._generation = dict.fromkeys(self._held, 0)
        self._generations = count(1)  # none is ever given twice
        for slot, expert in zip(own, held, strict=True):
            self.of_expert[expert] = slot

    @property
    def held(self) -> list[int]:
        """Experts in slots, in the order of these; empty ones hold none."""
        return [expert for expert in self._held.values() if expert is not None]

    def slots(self) -> list[tuple[int, int | None]]:
        """Every slot with its expert, None for an empty one."""
        return list(self._held.items())

    def empty(self, slot: int) -> int:
        """Take its expert out of a slot, to fill it with another: returns the generation to say with `fill`."""
        expert = self._held[slot]
        if expert is not None:
            self.of_expert[expert] = -1
        self._held[slot] = None
        self._generation[slot] = next(self._generations)
        return self._generation[slot]

    @property
    def empty_slots(self) -> list[int]:
        """Those that hold no expert, in the order of their numbers."""
        return sorted(slot for slot, expert in self._held.items() if expert is None)

    def add(self, slot: int) -> None:
        """The slot is the layer's from now on, empty. No table may know it."""
        self._held[slot], self._generation[slot] = None, next(self._generations)

    def fill(self, slot: int, generation: int, expert: int) -> bool:
        """All of `expert`'s weights are in the slot. False, and nothing changes, if the slot was emptied once more
        meanwhile, or taken away, or the expert has another slot by now."""
        if self._generation.get(slot) != generation or self._held[slot] is not None or int(self.of_expert[expert]) >= 0:
            return False
        self._held[slot] = expert
        self.of_expert[expert] = slot
        return True

    def retire(self, slot: int) -> None:
        """The slot is the layer's no more. Its expert has none then, and nothing on its way to it is let in."""
        self.empty(slot)
        del self._held[slot], self._generation[slot]

    def move(self, slot: int, to: int) -> None:
        """The expert in a slot has another one from now on, which no table knows, and the layer loses the first."""
        expert = self._held[slot]
        assert expert is not None, "only experts are moved"
        self.retire(slot)
        self._held[to], self._generation[to] = expert, next(self._generations)
        self.of_expert[expert] = to

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


@dataclass(frozen=True)
class Fill:
    """An expert without a slot comes into an empty one."""

    layer: int
    slot: int
    comes: int


def best_fills(warmth: Tensor, tables: Mapping[int, SlotTable], most: int) -> list[Fill]:
    """Up to `most` empty slots and who comes there: the layers' warmest experts by `warmth` [L, E], of all the warmest
    first. The slots with the highest numbers are filled first: they are given back last."""
    found: list[Fill] = []
    for layer, table in tables.items():
        empty = table.empty_slots
        if empty:
            away = (table.of_expert < 0).nonzero().flatten()
            hottest = away[warmth[layer, away].argsort(descending=True, stable=True)[:most]].tolist()
            found += [Fill(layer, slot, expert) for slot, expert in zip(reversed(empty), hottest, strict=False)]
    return sorted(found, key=lambda fill: (-float(warmth[fill.layer, fill.comes]), fill.layer))[:most]
