"""SwiGLU experts of one layer, in one call: router output in, weighted sum out.

The native kernels do all experts of a call together; the reference groups the tokens by expert, in the same
order of summation: ascending experts, the shared one last.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from localmoe.formats.weights import Weight
from localmoe.kernels import _cpu, cpu, reference

ExpertWeights = tuple[Weight, Weight, Weight]
"""gate, up and down: [I, H], [I, H] and [H, I]."""


class ExpertProducts:
    """One layer's routed experts, looked up when first used, and the shared expert that every token uses."""

    def __init__(
        self,
        backend: cpu.Backend | None,
        count: int,
        look_up: Callable[[int], ExpertWeights],
        shared: ExpertWeights | None,
    ) -> None:
        self._backend = backend
        self._look_up = look_up
        self._shared = shared
        # A large model has over 40,000 matrices, and opening it should not wait for them
        self._held: list[ExpertWeights | None] = [None] * count
        self.native = None if backend is None else self._native_experts(backend, count)
        """What the kernels know of the experts; None where they do not compute them."""
        self.uses: Tensor | None = None
        """int64 [E], how many tokens chose each expert: counted where there is one."""

    def __call__(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Sum of weight * expert(hidden), plus shared(hidden).

        hidden float32 [T, H], expert_ids int64 [T, k] (distinct in a row), weights float32 [T, k] -> [T, H]. An id of
        -1 is somebody else's to add.
        """
        self.count(expert_ids)
        return self.compute(hidden, expert_ids, weights)

    def compute(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """The same, without counting."""
        self.hold(expert_ids)
        if self.native is not None and self._backend is not None:
            return self._backend.experts(self.native, hidden, expert_ids, weights)
        return self._grouped(hidden, expert_ids, weights)

    def hold(self, expert_ids: Tensor) -> None:
        """Look up those of int64 [T, k] that are not yet."""
        for expert in set(expert_ids.flatten().tolist()):
            if expert >= 0 and self._held[expert] is None:
                self._hold(expert)

    def count(self, expert_ids: Tensor) -> None:
        """Add int64 [T, k], none of them -1, to `uses`, if anybody wants them."""
        if self.uses is not None:
            self.uses += torch.bincount(expert_ids.flatten(), minlength=len(self.uses))

    def complete(self) -> bool:
        """Look up all experts that are not yet; whether native kernels have every one of them."""
        for expert, held in enumerate(self._held):
            if held is None:
                self._hold(expert)
        return self.native is not None

    def job(
        self, hidden: Tensor, expert_ids: Tensor, weights: Tensor, slots: Tensor, result: Tensor
    ) -> _cpu.ExpertJob | None:
        """The same for the routed experts without a slot, as a job over this very memory, to be run again and again.

        hidden and result float32 [T, H], expert_ids int32 [T, k], weights float32 [T, k], slots int32 [E], -1 for the
        experts that the job computes. None where there is no native kernel.
        """
        if not self.complete() or self.native is None or self._backend is None:
            return None
        return self._backend.job(self.native, hidden, expert_ids, weights, slots, result)

    def _native_experts(self, backend: cpu.Backend, count: int) -> _cpu.Experts | None:
        """None where the shared expert's form has no native kernel."""
        native = _cpu.Experts(count)
        if self._shared is not None:
            matrices = backend.matrices(self._shared)
            if matrices is None:
                return None
            native.set_shared(*matrices)
        return native

    def _hold(self, expert: int) -> ExpertWeights:
        weights = self._held[expert] = self._look_up(expert)
        if self.native is not None and self._backend is not None:
            matrices = self._backend.matrices(weights)
            if matrices is None:
                self.native = None
            else:
                self.native.set(expert, *matrices)
        return weights

    def _grouped(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Each expert runs once over its tokens."""
        out = torch.zeros_like(hidden)
        flat, order = expert_ids.flatten().sort(stable=True)
        start = int((flat < 0).sum())
        flat, order = flat[start:], order[start:]
        tokens = order // max(expert_ids.shape[1], 1)  # grouped by expert, those that are elsewhere left out
        scales = weights.flatten()[order].unsqueeze(1)
        start = 0
        for expert, count in enumerate(flat.bincount().tolist()):
            if count == 0:
                continue
            part = slice(start, start + count)
            rows = tokens[part]
            result = reference.expert(hidden[rows], *(self._held[expert] or self._hold(expert)))  # [count, H]
            out.index_add_(0, rows, result * scales[part])
            start += count
        return out if self._shared is None else out + reference.expert(hidden, *self._shared)
