"""How often each routed expert is chosen, counted where a layer's router hands over to its experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from localmoe.kernels.experts import ExpertProducts


class ExpertCounts:
    """Uses of every expert by layer. Nothing is counted, and nothing costs, unless a model is loaded with one."""

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._uses: dict[int, Tensor] = {}  # layer: int64 [E]

    def watching(self, layer: Callable[[int], ExpertProducts]) -> Callable[[int], ExpertProducts]:
        """`layer`, which hands out a layer's experts, with each of them counted from now on."""

        def handed_out(index: int) -> ExpertProducts:
            products = layer(index)
            products.uses = self._uses.setdefault(index, torch.zeros(self._experts, dtype=torch.int64))
            return products

        return handed_out

    def uses(self) -> dict[int, list[int]]:
        """How many tokens chose each expert, by layer."""
        return {index: uses.tolist() for index, uses in sorted(self._uses.items())}

    def reset(self) -> None:
        """Begin again at zero."""
        for uses in self._uses.values():
            uses.zero_()
