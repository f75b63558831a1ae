"""Slots given back to the cache: the coldest experts go, the warm ones in their way move, and nobody is lost."""

from __future__ import annotations

import random

import pytest
import torch

from localmoe.offload.giving_back import GivingBack, Move, what_to_give_back, who_gets_them
from localmoe.offload.slots import SlotTable, best_fills


def test_the_coldest_go_and_a_warm_one_moves_behind() -> None:
    tables = {1: SlotTable(4, [0, 1], [0, 3]), 2: SlotTable(4, [2, 3], [1, 2])}
    heat = {(1, 0): 9.0, (1, 1): 1.0, (2, 2): 5.0, (2, 3): 7.0}
    found = what_to_give_back(tables, 1, lambda *each: heat[each])
    assert found == GivingBack(((1, 3),), (Move(1, 0, 3),))
    found = what_to_give_back(tables, 2, lambda *each: heat[each])
    assert found == GivingBack(((1, 3), (2, 1)), (Move(1, 0, 3),))
    assert what_to_give_back(tables, 0, lambda *each: heat[each]) == GivingBack((), ())


def test_an_empty_slot_goes_before_any_expert() -> None:
    table = SlotTable(3, [0, 1, 2])
    table.empty(2)
    found = what_to_give_back({5: table}, 1, lambda _, expert: -float(expert))
    assert found == GivingBack(((5, 2),), (Move(5, 0, 2),))


def test_a_slot_that_was_taken_away_lets_nothing_in() -> None:
    table = SlotTable(4, [0, 1], [4, 7])
    waited_for = table.empty(4)
    table.retire(4)
    assert not table.fill(4, waited_for, 2)
    table.move(7, 4)
    assert (table.slot_of(0), table.slot_of(1), table.held) == (None, 4, [1])
    again = table.empty(4)
    assert again != waited_for
    assert not table.fill(4, waited_for, 2)
    assert table.fill(4, again, 2)


@pytest.mark.parametrize("seed", range(5))
def test_step_by_step_to_the_last_slot(seed: int) -> None:
    """Memory that is not there: what every slot holds. Those left are always the warmest, each with its own weights."""
    dice = random.Random(seed)
    experts = [(layer, expert) for layer in range(3) for expert in range(6)]
    dice.shuffle(experts)
    heat = {each: dice.random() for each in experts}
    first = 2
    memory: dict[int, tuple[int, int]] = dict(enumerate(experts[:14], first))
    tables = {}
    for layer in range(3):
        own = {slot: expert for slot, (of, expert) in memory.items() if of == layer}
        tables[layer] = SlotTable(6, list(own.values()), list(own))
    while first < 16:
        first += dice.randint(1, 4)
        changes = what_to_give_back(tables, first, lambda *each: heat[each])
        for layer, slot in changes.retired:
            tables[layer].retire(slot)
        for move in changes.moves:
            tables[move.layer].move(move.slot, move.to)
            memory[move.to] = memory[move.slot]
        held = [(layer, expert, slot) for layer, table in tables.items() for slot, expert in table.slots()]
        assert all(slot >= first and memory[slot] == (layer, expert) for layer, expert, slot in held)
        assert all(tables[layer].slot_of(expert) == slot for layer, expert, slot in held if expert is not None)
        assert sum(int((table.of_expert >= 0).sum()) for table in tables.values()) == len(held)
        warmest = sorted(experts[:14], key=heat.__getitem__, reverse=True)[: max(0, 16 - first)]
        assert {(layer, expert) for layer, expert, _ in held} == set(warmest)
    assert not any(table.held for table in tables.values())


def test_the_warmest_that_wait_decide_whose_slots_come_back() -> None:
    tables = {0: SlotTable(3, [1], [9]), 2: SlotTable(3, [0, 1], [7, 8])}
    warmth = torch.tensor([[5.0, 9.0, 3.0], [9.0, 9.0, 9.0], [0.0, 0.0, 4.0]])
    assert who_gets_them(tables, range(4, 6), warmth) == [(0, 5), (2, 4)]
    assert who_gets_them(tables, range(6), warmth) == [(0, 5), (2, 4), (0, 3)]  # more than there are experts
    tables[0].add(6)  # the warmest will have this one
    assert who_gets_them(tables, range(4, 6), warmth) == [(2, 5), (0, 4)]
    assert who_gets_them({}, range(4, 6), warmth) == []


@pytest.mark.parametrize("seed", range(5))
def test_back_and_forth(seed: int) -> None:
    """As above, with slots that come back too and are filled, or not yet: no slot before the front, none of two, every
    expert with its own weights, and when all are filled as many experts as at the beginning, the warmest."""
    dice = random.Random(seed)
    layers, count, slots = 3, 6, 14
    warmth = torch.rand(layers, count, generator=torch.Generator().manual_seed(seed))
    experts = [(layer, expert) for layer in range(layers) for expert in range(count)]
    memory = dict(enumerate(sorted(experts, key=lambda each: float(warmth[each]))[-slots + 1 :], 1))
    tables = {}
    for layer in range(layers):
        own = {slot: expert for slot, (of, expert) in memory.items() if of == layer}
        tables[layer] = SlotTable(count, list(own.values()), list(own))
    first = 1
    for step in range(60):
        front = dice.randint(1, slots) if step < 59 else 1
        if front > first:
            changes = what_to_give_back(tables, front, lambda *each: float(warmth[each]))
            for layer, slot in changes.retired:
                tables[layer].retire(slot)
            for move in changes.moves:
                tables[move.layer].move(move.slot, move.to)
                memory[move.to] = memory[move.slot]
        else:
            for layer, slot in who_gets_them(tables, range(front, first), warmth):
                tables[layer].add(slot)
        first = front
        for fill in best_fills(warmth, tables, dice.randint(0, 4) if step < 59 else slots):
            generation = tables[fill.layer].empty(fill.slot)
            memory[fill.slot] = fill.layer, fill.comes
            assert tables[fill.layer].fill(fill.slot, generation, fill.comes)
        held = [(layer, expert, slot) for layer, table in tables.items() for slot, expert in table.slots()]
        assert sorted(slot for *_, slot in held) == list(range(first, slots))
        assert all(memory[slot] == (layer, expert) for layer, expert, slot in held if expert is not None)
        assert all(tables[layer].slot_of(expert) == slot for layer, expert, slot in held if expert is not None)
    warmest = sorted(experts, key=lambda each: float(warmth[each]))[-slots + 1 :]
    assert {(layer, expert) for layer, expert, _ in held} == set(warmest)
