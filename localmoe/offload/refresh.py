"""Experts change places while a model runs: what is used more than what has a slot gets the slot, in the background.

Between passes, every so often, the recent uses are looked at and a few swaps begun; a thread reads the weights and
sends them over a stream of their own, and a later pass finds them there. A token never waits for it. Empty slots that
the cache has left are filled in the same way, before any swap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from localmoe.offload.giving_back import who_gets_them
from localmoe.offload.slots import SlotTable, best_fills, best_swaps

EVERY = 32
"""Passes between two looks: uses are counted on the card and read back then."""
_FILL_EVERY = 4  # passes, while slots are empty: nobody has to leave, so little can be wrong about who comes
_MOST = 4  # experts that begin to come at a time
_FADE = 0.8  # of what was counted before the last look
REMEMBERED = EVERY / (1 - _FADE)
"""Tokens of decoding whose uses count as recent, in sum."""


class Slots(Protocol):
    """One layer's slots on the card: `localmoe.offload.card.LayerExperts`."""

    table: SlotTable

    def publish(self) -> None:
        """Have the card see the table as it is, from the next pass on."""
        ...

    def load(self, slot: int, expert: int) -> None:
        """Put an expert's weights into a slot that holds none, and wait until they are there. Called in a thread."""
        ...

    def filled(self) -> None:
        """All slots that had come back are filled, here and in the other layers."""
        ...


@dataclass(frozen=True)
class _Coming:
    layer: int
    slot: int
    generation: int
    expert: int
    loading: Future[None]


class Refresh:
    """Of one model: `counts` int32 [L, E] are its uses so far, on the card. `before_change` is called when an expert is
    about to leave or to come; `earlier` [L, E] are uses of earlier runs, which count too where a slot is empty."""

    def __init__(
        self,
        layers: Mapping[int, Slots],
        counts: Tensor,
        executor: Executor | None = None,
        before_change: Callable[[], None] = lambda: None,
        earlier: Tensor | None = None,
    ) -> None:
        self._before_change = before_change
        self._layers = layers
        self._counts = counts
        self._seen = torch.zeros(counts.shape, dtype=torch.int64)
        self._recent = torch.zeros(counts.shape, dtype=torch.float64)
        self._earlier = torch.zeros_like(self._recent) if earlier is None else earlier
        self._coming: list[_Coming] = []
        self._filling = False
        self._passes = 0
        self.failure: str | None = None
        """Why an expert could not be brought to the card, where one could not: the first time."""
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="localmoe-slots")

    def between_passes(self) -> None:
        """Publish what has arrived, and begin what is worth it. Nothing runs on the card or in the experts' job now."""
        self._receive()
        self._passes += 1
        if self._coming:
            return
        if self._passes % EVERY == 0:
            counts = self._counts.cpu().long()
            self._recent = self._recent * _FADE + (counts - self._seen)
            self._seen = counts
            if not self._filling:
                self._swap()
        if self._filling and self._passes % _FILL_EVERY == 0:
            self._fill()

    def refill(self, slots: Sequence[int]) -> None:
        """These have come back and are nobody's: from now on some layer's, and filled a few at a time. Between passes;
        it waits for the card."""
        tables = self._tables()
        for layer, slot in who_gets_them(tables, slots, self.recent() + self._earlier):
            tables[layer].add(slot)
        self._filling = True

    def _tables(self) -> dict[int, SlotTable]:
        return {index: layer.table for index, layer in self._layers.items()}

    def _swap(self) -> None:
        for swap in best_swaps(self._recent, self._tables(), _MOST):
            layer = self._layers[swap.layer]
            slot = layer.table.slot_of(swap.leaves)
            assert slot is not None
            self._before_change()
            generation = layer.table.empty(slot)
            layer.publish()  # before the first byte is overwritten
            self._begin(swap.layer, slot, generation, swap.comes)

    def _fill(self) -> None:
        fills = best_fills(self.recent() + self._earlier, self._tables(), _MOST)
        for fill in fills:
            generation = self._layers[fill.layer].table.empty(fill.slot)
            self._begin(fill.layer, fill.slot, generation, fill.comes)
        if not fills:
            self._filling = False
            for layer in self._layers.values():
                layer.filled()

    def _begin(self, layer: int, slot: int, generation: int, expert: int) -> None:
        loading = self._executor.submit(self._layers[layer].load, slot, expert)
        self._coming.append(_Coming(layer, slot, generation, expert, loading))

    def expect(self, uses: Tensor, tokens: float) -> None:
        """Count the uses [L, E] by so many tokens of an earlier time as recent ones: by as many as are remembered."""
        self._recent += uses.double() * min(1.0, REMEMBERED / tokens)

    def settle(self) -> None:
        """Wait for what is under way and publish it: nothing writes into a slot then. Between passes."""
        for coming in self._coming:
            coming.loading.exception()
        self._receive()

    def recent(self) -> Tensor:
        """float64 [L, E]: how much each expert was used lately. It waits for the card."""
        return self._recent + (self._counts.cpu().long() - self._seen)

    def close(self) -> None:
        """Wait for what is under way; slots that were being filled stay empty."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._coming.clear()

    def _receive(self) -> None:
        waiting = []
        for coming in self._coming:
            if not coming.loading.done():
                waiting.append(coming)
                continue
            layer = self._layers[coming.layer]
            error = coming.loading.exception()
            if error is None:
                self._before_change()
                if layer.table.fill(coming.slot, coming.generation, coming.expert):
                    layer.publish()
                continue
            self.failure = self.failure or str(error) or type(error).__name__
            if coming.slot in layer.table.empty_slots:
                layer.table.retire(coming.slot)  # not to be tried again: its experts are the CPU's, slower, and right
        self._coming = waiting
