"""Experts on the CPU: computed where their weights are, straight from the mapped file."""

from __future__ import annotations

from localmoe.kernels.dispatch import Kernels
from localmoe.kernels.experts import ExpertProducts
from localmoe.model.config import ModelConfig
from localmoe.model.layers import WeightSource, expert_weights


class ExpertStore:
    """All experts of a model; `layer` hands out one layer's."""

    def __init__(self, source: WeightSource, config: ModelConfig, kernels: Kernels) -> None:
        self._source = source
        self._config = config
        self._kernels = kernels

    def layer(self, index: int) -> ExpertProducts:
        """The routed and shared experts of layer `index`, which must be an MoE layer."""
        module = f"model.layers.{index}.mlp"
        shared = expert_weights(self._source, f"{module}.shared_experts") if self._config.n_shared_experts else None
        return self._kernels.experts(
            self._config.n_routed_experts,
            lambda expert: expert_weights(self._source, f"{module}.experts.{expert}"),
            shared,
        )
