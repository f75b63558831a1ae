"""One allocation of the card's memory for what grows against each other: the latent cache from its front, and behind it
expert slots, which are given back from there on as the cache needs their place and come back when it needs it no more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from localmoe.errors import DeviceError


class Arena:
    """Made once, so that memory never fails late, and nothing in it moves: a CUDA graph knows it by its address."""

    def __init__(self, nbytes: int, device: torch.device, taken: int = 0) -> None:
        self.memory: Tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.taken = taken
        """Bytes at the front that are not, or not now, expert slots'."""
        self._least = taken
        self.give_back: Callable[[int], None] = lambda nbytes: None
        """Called before the first so many bytes become the cache's: when it returns nothing else is in them."""
        self.take_back: Callable[[int], None] = lambda nbytes: None
        """Called when the cache had the first so many bytes and has fewer now, `taken`: slots may be between."""

    def take(self, nbytes: int) -> None:
        """Have the first `nbytes` for the cache. Between passes. Raises DeviceError for more than there is."""
        if nbytes <= self.taken:
            return
        if nbytes > len(self.memory):
            raise DeviceError(f"{nbytes} bytes of the card are wanted for the cache and {len(self.memory)} are there")
        self.give_back(nbytes)
        self.taken = nbytes

    def leave(self, nbytes: int) -> None:
        """The cache does with the first `nbytes`, but has never fewer than at the beginning. Between passes."""
        before = self.taken
        self.taken = min(before, max(nbytes, self._least))
        if self.taken < before:
            self.take_back(before)
