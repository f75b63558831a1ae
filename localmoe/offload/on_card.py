"""What an engine has on a card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from localmoe.offload.hits import rates

if TYPE_CHECKING:
    from localmoe.offload.plan import Placement


@dataclass(frozen=True)
class OnCard:
    """Where everything is, and what the card tells and is told between passes."""

    placement: Placement
    uses: Callable[[], Tensor]
    """How often each expert fired since the model was opened, [L, E]."""
    hits: Callable[[], Tensor]
    """How many of them found their expert on the card, and how many there were, [L, 2]."""
    expect: Callable[[Tensor], None]
    """Place experts as if they had just been used so, [L, E], where places change."""
    troubles: Callable[[], list[str]]
    """What makes it slower than it need be: nothing, where all works."""
    close: Callable[[], None]

    def hit_rates(self, moe_layers: Sequence[bool], since: Tensor | None) -> list[float]:
        """The share of each MoE layer's uses that the card served, from when `hits` said `since` (None: from the
        beginning), and foreseen where nothing was counted."""
        counts, placed = self.hits(), [layer.gpu_hits for layer in self.placement.layers]
        measured = rates(counts if since is None else counts - since, placed)
        return [rate for rate, is_moe in zip(measured, moe_layers, strict=True) if is_moe]
