"""Routed experts on the CPU: computed where their weights are, straight from the mapped file."""

from __future__ import annotations

import torch
from torch import Tensor

from localmoe.formats.weights import Weight
from localmoe.kernels.dispatch import Kernels
from localmoe.model.config import ModelConfig
from localmoe.model.layers import WeightSource

ExpertWeights = tuple[Weight, Weight, Weight]  # gate, up, down


class ExpertStore:
    """All routed experts of a model; `layer` hands out one layer's."""

    def __init__(self, source: WeightSource, config: ModelConfig, kernels: Kernels) -> None:
        self._source = source
        self._config = config
        self._kernels = kernels

    def layer(self, index: int) -> LayerExperts:
        """The experts of layer `index`, which must be an MoE layer."""
        module = f"model.layers.{index}.mlp.experts"
        return LayerExperts(self._source, module, self._config.n_routed_experts, self._kernels)


class LayerExperts:
    """One layer's routed experts.

    Tokens are grouped by expert, each expert runs once over its tokens, and experts go in ascending order of
    their number: a token's sum has the same order whatever else is in the batch.
    """

    def __init__(self, source: WeightSource, module: str, count: int, kernels: Kernels) -> None:
        self._source = source
        self._module = module
        self._kernels = kernels
        # Looked up when first used: a large model has over 40,000 matrices, and opening it should not wait
        self._weights: list[ExpertWeights | None] = [None] * count

    def __call__(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Sum of weight * expert(hidden): [T, H], int64 [T, k], float32 [T, k] -> [T, H]."""
        if len(hidden) == 1:
            return self._one_token(hidden, expert_ids[0], weights[0])
        out = torch.zeros_like(hidden)
        flat, order = expert_ids.flatten().sort(stable=True)
        tokens = order // expert_ids.shape[1]  # [T * k], grouped by expert
        scales = weights.flatten()[order].unsqueeze(1)  # [T * k, 1]
        start = 0
        for expert, count in enumerate(flat.bincount().tolist()):
            if count == 0:
                continue
            part = slice(start, start + count)
            rows = tokens[part]
            result = self._kernels.expert(hidden[rows], *self._expert(expert))  # [count, H]
            out.index_add_(0, rows, result * scales[part])
            start += count
        return out

    def _one_token(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Decode: no grouping to do, the same order of summation."""
        out = torch.zeros_like(hidden)
        for expert, weight in sorted(zip(expert_ids.tolist(), weights.tolist(), strict=True)):
            out += self._kernels.expert(hidden, *self._expert(expert)) * weight
        return out

    def _expert(self, index: int) -> ExpertWeights:
        held = self._weights[index]
        if held is None:
            module = f"{self._module}.{index}"
            held = (
                self._source.weight(f"{module}.gate_proj"),
                self._source.weight(f"{module}.up_proj"),
                self._source.weight(f"{module}.down_proj"),
            )
            self._weights[index] = held
        return held
