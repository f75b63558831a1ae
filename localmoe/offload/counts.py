"""How often each routed expert is chosen, counted where a layer's router hands over to its experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from localmoe.model.moe import Experts


class ExpertCounts:
    """Uses of every expert by layer. Nothing is counted, and nothing costs, unless a model is loaded with one."""

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._uses: dict[int, Tensor] = {}  # layer: int64 [E]

    def watching(self, layer: Callable[[int], Experts]) -> Callable[[int], Experts]:
        """`layer`, which hands out a layer's experts, with each of them counted from now on."""

        def handed_out(index: int) -> Experts:
            uses = self._uses.setdefault(index, torch.zeros(self._experts, dtype=torch.int64))
            return _Counted(layer(index), uses)

        return handed_out

    def uses(self) -> dict[int, list[int]]:
        """How many tokens chose each expert, by layer."""
        return {index: uses.tolist() for index, uses in sorted(self._uses.items())}

    def reset(self) -> None:
        """Begin again at zero."""
        for uses in self._uses.values():
            uses.zero_()


class _Counted:
    """One layer's experts, whose uses are added to `uses` [E]."""

    def __init__(self, experts: Experts, uses: Tensor) -> None:
        self._experts = experts
        self._uses = uses

    def __call__(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        self._uses += torch.bincount(expert_ids.flatten(), minlength=len(self._uses))
        return self._experts(hidden, expert_ids, weights)
