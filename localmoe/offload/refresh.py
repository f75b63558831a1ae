"""Experts change places while a model runs: what is used more than what has a slot gets the slot, in the background.

Between passes, every so often, the recent uses are looked at and a few swaps begun; a thread reads the weights and
sends them over a stream of their own, and a later pass finds them there. A token never waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from localmoe.offload.slots import SlotTable, best_swaps

EVERY = 32
"""Passes between two looks: uses are counted on the card and read back then."""
_MOST = 4  # swaps begun at a time
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


@dataclass(frozen=True)
class _Coming:
    layer: int
    slot: int
    generation: int
    expert: int
    loading: Future[None]


class Refresh:
    """Of one model: `counts` int32 [L, E] are its uses so far, on the card. `before_change` is called when an expert is
    about to leave or to come."""

    def __init__(
        self,
        layers: Mapping[int, Slots],
        counts: Tensor,
        executor: Executor | None = None,
        before_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._before_change = before_change
        self._layers = layers
        self._counts = counts
        self._seen = torch.zeros(counts.shape, dtype=torch.int64)
        self._recent = torch.zeros(counts.shape, dtype=torch.float64)
        self._coming: list[_Coming] = []
        self._passes = 0
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="localmoe-slots")

    def between_passes(self) -> None:
        """Publish what has arrived, and begin what is worth it. Nothing runs on the card or in the experts' job now."""
        self._receive()
        self._passes += 1
        if self._passes % EVERY or self._coming:
            return
        counts = self._counts.cpu().long()
        self._recent = self._recent * _FADE + (counts - self._seen)
        self._seen = counts
        tables = {index: layer.table for index, layer in self._layers.items()}
        for swap in best_swaps(self._recent, tables, _MOST):
            layer = self._layers[swap.layer]
            slot = layer.table.slot_of(swap.leaves)
            assert slot is not None
            self._before_change()
            generation = layer.table.empty(slot)
            layer.publish()  # before the first byte is overwritten
            loading = self._executor.submit(layer.load, slot, swap.comes)
            self._coming.append(_Coming(swap.layer, slot, generation, swap.comes, loading))

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
            elif coming.loading.exception() is None:
                layer = self._layers[coming.layer]
                self._before_change()
                if layer.table.fill(coming.slot, coming.generation, coming.expert):
                    layer.publish()
            # else the slot stays empty and its experts the CPU's: slower, and right
        self._coming = waiting
