"""Experts that change places: the table's states, what is worth a swap, and a model that goes on meanwhile."""

from __future__ import annotations

import threading
from concurrent.futures import Executor, Future
from typing import Any

import torch

from localmoe.offload.hits import HitCounts, rates
from localmoe.offload.refresh import EVERY, Refresh
from localmoe.offload.slots import Fill, SlotTable, best_fills, best_swaps


class Later(Executor):
    """Runs what it was given when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Any]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run(self) -> None:
        for future, call in self.waiting:
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)
        self.waiting.clear()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.waiting.clear()


class Layer:
    """Slots on a device that is not there: what it holds and what the card was told."""

    def __init__(self, experts: int, held: list[int]) -> None:
        self.table = SlotTable(experts, held)
        self.memory: dict[int, int] = dict(enumerate(held))
        self.card = self.table.of_expert.clone()
        self.broken = False
        self.filled_with: list[int] = []

    def filled(self) -> None:
        self.filled_with.append(len(self.table.held))

    def publish(self) -> None:
        self.card = self.table.of_expert.clone()

    def load(self, slot: int, expert: int) -> None:
        assert slot not in self.card.tolist(), "a slot that the card still reads is overwritten"
        if self.broken:
            raise OSError("the disk is gone")
        self.memory[slot] = expert

    def check(self) -> None:
        """Who has a slot has its own weights there, and both sides know the same."""
        assert torch.equal(self.card, self.table.of_expert)
        for expert, slot in enumerate(self.card.tolist()):
            assert slot < 0 or self.memory[slot] == expert


def test_a_slot_is_emptied_filled_and_known_by_its_generation() -> None:
    table = SlotTable(5, [3, 1])
    assert table.of_expert.tolist() == [-1, 1, -1, 0, -1]
    first = table.empty(0)
    assert table.of_expert.tolist() == [-1, 1, -1, -1, -1]
    assert table.held == [1]
    second = table.empty(0)
    assert not table.fill(0, first, 4)  # arrives late
    assert table.fill(0, second, 2)
    assert not table.fill(0, second, 4)  # arrives twice
    assert (table.slot_of(2), table.slot_of(1), table.slot_of(3)) == (0, 1, None)
    third = table.empty(1)
    assert not table.fill(1, third, 2)  # has a slot already
    assert table.held == [2]


def test_the_swaps_that_gain_most() -> None:
    tables = {0: SlotTable(4, [0, 1]), 1: SlotTable(4, [2]), 2: SlotTable(4, [0, 1, 2, 3]), 3: SlotTable(4, [])}
    uses = torch.tensor([[9, 2, 30, 3], [50, 60, 1, 0], [0, 0, 0, 9], [9, 9, 9, 9]])
    found = best_swaps(uses, tables, 5)
    assert [(swap.layer, swap.leaves, swap.comes, swap.gain) for swap in found] == [(1, 2, 1, 59.0), (0, 1, 2, 28.0)]
    assert len(best_swaps(uses, tables, 1)) == 1
    assert best_swaps(torch.tensor([[10, 11, 14, 14]]), {0: SlotTable(4, [0, 1])}, 5) == []  # too little


def test_the_warmest_come_into_empty_slots_and_the_last_slots_are_filled_first() -> None:
    tables = {0: SlotTable(4, [0]), 1: SlotTable(4, [2], [5]), 2: SlotTable(4, [1], [6]), 3: SlotTable(1, [0], [4])}
    for layer, slots in ((0, (7, 9)), (1, (8,)), (3, (3,))):
        for slot in slots:
            tables[layer].add(slot)
    warmth = torch.tensor([[9, 2, 3, 5], [4, 1, 6, 4], [9, 9, 9, 9], [9, 0, 0, 0]])
    fills = [Fill(0, 9, 3), Fill(1, 8, 0), Fill(0, 7, 2)]  # layer 3 has no expert for its slot, layer 2 no slot
    assert best_fills(warmth, {**tables, 3: SlotTable(1, [0], [4])}, 9) == fills
    assert best_fills(warmth[:, :4], {layer: tables[layer] for layer in (0, 1, 2)}, 2) == fills[:2]


def passes(refresh: Refresh, count: int) -> None:
    for _ in range(count):
        refresh.between_passes()


def test_the_hot_ones_come_in_and_what_runs_never_reads_half() -> None:
    layers = {0: Layer(6, [0, 1]), 2: Layer(6, [4])}
    counts, later = torch.zeros(3, 6, dtype=torch.int32), Later()
    refresh = Refresh(layers, counts, later)
    counts[0] += torch.tensor([0, 9, 90, 3, 0, 0], dtype=torch.int32)
    counts[2] += torch.tensor([80, 0, 0, 0, 7, 0], dtype=torch.int32)
    passes(refresh, EVERY - 1)
    assert not later.waiting
    passes(refresh, 1)
    assert [layer.card.tolist() for layer in layers.values()] == [[-1, 1, -1, -1, -1, -1], [-1] * 6]
    passes(refresh, EVERY)  # still on its way: nothing else begins
    assert len(later.waiting) == 2
    later.run()
    passes(refresh, 1)
    assert [layer.card.tolist() for layer in layers.values()] == [[-1, 1, 0, -1, -1, -1], [0, -1, -1, -1, -1, -1]]
    for layer in layers.values():
        layer.check()
    counts[0] += torch.tensor([0, 0, 0, 500, 0, 0], dtype=torch.int32)
    passes(refresh, EVERY)
    later.run()
    passes(refresh, 1)
    layers[0].check()
    assert layers[0].table.slot_of(3) is not None
    assert layers[0].table.slot_of(2) == 0  # hotter than the one that left
    refresh.close()


def test_what_an_opened_session_used_comes_in() -> None:
    layer, counts, later = Layer(4, [0]), torch.zeros(1, 4, dtype=torch.int32), Later()
    refresh = Refresh({0: layer}, counts, later)
    refresh.expect(torch.tensor([[0.0, 0.0, 1e6, 0.0]]), 1e6)
    passes(refresh, EVERY)
    later.run()
    passes(refresh, 1)
    assert layer.table.slot_of(2) == 0
    for _ in range(3):  # a million of long ago weigh as much as what was remembered lately
        counts[0, 3] += 2 * EVERY
        passes(refresh, EVERY)
        later.run()
        passes(refresh, 1)
    assert layer.table.slot_of(3) == 0
    refresh.close()


def test_a_load_that_fails_leaves_its_experts_to_the_cpu() -> None:
    layer, counts, later = Layer(4, [0]), torch.zeros(1, 4, dtype=torch.int32), Later()
    refresh = Refresh({0: layer}, counts, later)
    layer.broken = True
    counts[0, 2] = 50
    passes(refresh, EVERY)
    assert refresh.failure is None
    later.run()
    passes(refresh, 1)
    assert refresh.failure == "the disk is gone"
    assert layer.card.tolist() == [-1] * 4
    layer.check()
    counts[0, 2] = 90
    refresh.refill([1])
    passes(refresh, EVERY)
    assert layer.table.empty_slots == [1]
    later.run()
    passes(refresh, EVERY)
    assert layer.table.slots() == []  # neither is tried again and again
    assert not later.waiting
    refresh.close()


def test_hits_are_booked_by_who_had_a_slot_when_a_token_came() -> None:
    layers = {1: Layer(3, [0])}
    counts, later = torch.zeros(2, 3, dtype=torch.int32), Later()
    hits = HitCounts(counts, {1: layers[1].table})
    refresh = Refresh(layers, counts, later, hits.book)
    counts[1] += torch.tensor([10, 0, 90], dtype=torch.int32)  # expert 2 is away
    passes(refresh, EVERY)
    counts[1] += torch.tensor([0, 0, 5], dtype=torch.int32)  # still on its way
    later.run()
    passes(refresh, 1)
    assert layers[1].table.held == [2]
    before = hits.totals()
    assert before.tolist() == [[0, 0], [10, 105]]
    counts[1] += torch.tensor([1, 0, 3], dtype=torch.int32)
    after = hits.totals()
    assert after.tolist() == [[0, 0], [13, 109]]
    assert rates(after - before, [0.25, 0.5]) == [0.25, 0.75]
    assert rates(before - before, [0.25, 0.5]) == [0.25, 0.5]


def test_what_is_under_way_arrives_before_a_slot_is_given_back() -> None:
    layer, counts, later = Layer(4, [0]), torch.zeros(1, 4, dtype=torch.int32), Later()
    refresh = Refresh({0: layer}, counts, later)
    counts[0, 2] = 50
    passes(refresh, EVERY)
    assert layer.table.held == []
    counts[0, 1] = 3
    assert refresh.recent().tolist() == [[0, 3, 50, 0]]
    arrives = threading.Timer(0.05, later.run)
    arrives.start()
    refresh.settle()  # waits for it
    assert layer.table.held == [2]
    layer.check()
    refresh.close()


def test_slots_that_come_back_are_filled_before_anybody_leaves() -> None:
    """The hottest of all layers get them, what was used earlier counts too, and a pass never waits."""
    layers = {0: Layer(6, [0]), 2: Layer(6, [0])}
    counts, later = torch.zeros(3, 6, dtype=torch.int32), Later()
    earlier = torch.zeros(3, 6, dtype=torch.float64)
    earlier[0], earlier[2, 1:3] = torch.tensor([0.0, 0.0, 6.0, 7.0, 0.0, 9.0]), torch.tensor([8.0, 5.0])
    refresh = Refresh(layers, counts, later, earlier=earlier)
    passes(refresh, EVERY - 1)
    counts[0, 4] = 50  # worth a swap too
    refresh.refill(range(10, 15))
    assert [layer.table.empty_slots for layer in layers.values()] == [[10, 11, 13, 14], [12]]
    assert [layer.card.tolist() for layer in layers.values()] == [[0, -1, -1, -1, -1, -1]] * 2
    passes(refresh, EVERY)
    assert [layer.table.held for layer in layers.values()] == [[0], [0]]  # nothing arrived, nobody left
    assert len(later.waiting) == 4
    later.run()
    assert [layer.memory for layer in layers.values()] == [{0: 0, 14: 4, 13: 5, 11: 3}, {0: 0, 12: 1}]
    passes(refresh, 1)
    for layer in layers.values():
        layer.check()
    assert layers[0].table.empty_slots == [10]
    passes(refresh, EVERY // 2)
    assert not any(layer.filled_with for layer in layers.values())
    later.run()
    passes(refresh, EVERY)
    assert [sorted(layer.table.held) for layer in layers.values()] == [[0, 2, 3, 4, 5], [0, 1]]
    assert [layer.filled_with for layer in layers.values()] == [[5], [2]]  # once
    for layer in layers.values():
        layer.check()
    counts[2, 2] = 50
    passes(refresh, EVERY)  # swaps are begun again
    later.run()
    passes(refresh, 1)
    assert sorted(layers[2].table.held) in ([0, 2], [1, 2])
    refresh.close()
