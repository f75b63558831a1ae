"""Expert slots given back to the latent cache: which ones, and who moves so that the coldest experts go; and whose the
slots are that come back from it.

All layers' slots are numbered through one stretch of memory, and the cache takes it from its front. So slots go in the
order of their numbers and experts in the order of their coldness: a warm one in a slot that goes moves to the slot of
a cold one behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from localmoe.offload.slots import SlotTable

Warmth = Callable[[int, int], float]
"""Of (layer, expert)."""


@dataclass(frozen=True)
class Move:
    """An expert of `layer` goes from one slot to another."""

    layer: int
    slot: int
    to: int


@dataclass(frozen=True)
class GivingBack:
    """`retired` are (layer, slot), the coldest first; then the `moves`, each to a slot that one of them had."""

    retired: tuple[tuple[int, int], ...]
    moves: tuple[Move, ...]


def what_to_give_back(tables: Mapping[int, SlotTable], first_kept: int, warmth: Warmth) -> GivingBack:
    """How the slots below number `first_kept` become free. As many experts lose their place as there are such slots,
    empty slots before any expert."""
    every = [(layer, slot, expert) for layer, table in tables.items() for slot, expert in table.slots()]
    going = [(layer, slot) for layer, slot, _ in every if slot < first_kept]

    def coldness(entry: tuple[int, int, int | None]) -> tuple[bool, float, int]:
        layer, slot, expert = entry
        return expert is not None, 0.0 if expert is None else warmth(layer, expert), slot

    coldest = sorted(every, key=coldness)[: len(going)]
    retired = tuple((layer, slot) for layer, slot, _ in coldest)
    behind = [slot for _, slot in retired if slot >= first_kept]
    leaving = set(retired)
    staying = [each for each in going if each not in leaving]
    return GivingBack(retired, tuple(Move(layer, slot, to) for (layer, slot), to in zip(staying, behind, strict=True)))


def who_gets_them(tables: Mapping[int, SlotTable], slots: Sequence[int], warmth: Tensor) -> list[tuple[int, int]]:
    """(layer, slot) for `slots` that were nobody's: as many for a layer as it has experts among the warmest, by
    `warmth` [L, E], of all that have no slot. No layer gets more than it has experts for."""
    waiting = []
    for layer, table in tables.items():
        away = warmth[layer][table.of_expert < 0].sort(descending=True).values
        waiting += [(-value, layer) for value in away[len(table.empty_slots) :][: len(slots)].tolist()]
    paired = zip(sorted(waiting), sorted(slots, reverse=True), strict=False)  # there may be more of either
    return [(layer, slot) for (_, layer), slot in paired]
