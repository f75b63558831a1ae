"""Mixture of experts: the routers of DeepSeek-V2 and V3, and the layer around experts that live elsewhere.

DeepSeekMoE: https://arxiv.org/abs/2401.06066. Routers: `MoEGate` in modeling_deepseek.py of
deepseek-ai/DeepSeek-V2 (softmax) and deepseek-ai/DeepSeek-V3 (sigmoid, `noaux_tc`:
https://arxiv.org/abs/2412.19437, section 2.1.2).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from localmoe.kernels.dispatch import Kernels
from localmoe.kernels.routing import RouterRule
from localmoe.model.config import ModelConfig
from localmoe.model.layers import WeightSource


class Experts(Protocol):
    """One layer's routed and shared experts, wherever they are."""

    def __call__(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Sum over a token's routed experts of weight * expert(hidden), plus the shared experts' output.

        hidden float32 [T, H], expert_ids int64 [T, k] (distinct in a row), weights float32 [T, k] -> [T, H].
        """
        ...


class Router:
    """Chooses each token's experts and their weights, always in float32.

    The matrix and the correction bias are never quantized: rounding either changes which experts are chosen.
    """

    def __init__(self, config: ModelConfig, source: WeightSource, module: str, kernels: Kernels) -> None:
        self._config = config
        self.weight = source.weight(module)  # [E, H]
        self._logits = kernels.product(self.weight)  # never rounded, nor are its activations
        self._bias = None
        if config.topk_method == "noaux_tc":
            self._bias = source.tensor(f"{module}.e_score_correction_bias").float()  # [E]
        self.native = kernels.routing(self.rule())

    def rule(self) -> RouterRule:
        """What `_route_v2` and `_route_v3` do, as numbers."""
        config = self._config
        is_v3, normalised = self._bias is not None, config.norm_topk_prob and config.num_experts_per_tok > 1
        grouped = config.topk_method != "greedy"
        return RouterRule(
            sigmoid=config.scoring_func == "sigmoid",
            bias=self._bias,
            groups=config.n_group if grouped else 1,
            kept_groups=config.topk_group if grouped else 1,
            group_best=2 if is_v3 else 1,
            outside=float("-inf") if is_v3 else 0.0,
            experts_per_token=config.num_experts_per_tok,
            normalised=normalised,
            factor=1.0 if normalised and not is_v3 else config.routed_scaling_factor,
        )

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x float32 [T, H] -> expert ids int64 [T, k], weights float32 [T, k]."""
        logits = self._logits(x)  # [T, E]
        return self.choose(logits) if self.native is None else self.native(logits)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """From float32 logits [T, E], in torch: the truth that the native choice is tested against."""
        scores = logits.softmax(dim=1) if self._config.scoring_func == "softmax" else logits.sigmoid()
        if self._bias is None:
            return self._route_v2(scores)
        return self._route_v3(scores, self._bias)

    def _route_v2(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """V2: the highest scores, `group_limited_greedy` only in groups with the highest single score."""
        config = self._config
        if config.topk_method == "group_limited_greedy":
            group_scores = scores.view(len(scores), config.n_group, -1).amax(dim=2)  # [T, groups]
            scores = scores.masked_fill(self._outside(group_scores), 0.0)
        weights, expert_ids = scores.topk(config.num_experts_per_tok, dim=1)
        if config.norm_topk_prob and config.num_experts_per_tok > 1:
            # As DeepSeek-V2's code: the scaling factor is instead of normalising, not after it.
            # transformers' V2 ignores norm_topk_prob; no published V2 sets it.
            return expert_ids, weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
        return expert_ids, weights * config.routed_scaling_factor

    def _route_v3(self, scores: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """V3 `noaux_tc`: chosen by score + bias among the groups with the best two; weighted by score alone."""
        config = self._config
        biased = scores + bias
        if config.topk_group < config.n_group:
            group_scores = biased.view(len(biased), config.n_group, -1).topk(2, dim=2).values.sum(dim=2)
            # -inf, as in DeepSeek's present code and in transformers. The first release filled in 0, by which
            # an expert outside the groups wins over one inside whose biased score is negative.
            biased = biased.masked_fill(self._outside(group_scores), float("-inf"))
        expert_ids = biased.topk(config.num_experts_per_tok, dim=1).indices  # [T, k]
        weights = scores.gather(1, expert_ids)
        # One expert a token is not normalised (to the constant 1) by DeepSeek's code; by transformers it is.
        if config.norm_topk_prob and config.num_experts_per_tok > 1:
            weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
        return expert_ids, weights * config.routed_scaling_factor

    def _outside(self, group_scores: Tensor) -> Tensor:
        """True for the experts outside each token's best `topk_group` groups: bool [T, E]."""
        config = self._config
        best = group_scores.topk(config.topk_group, dim=1).indices  # [T, topk_group]
        outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)  # [T, groups]
        return outside.repeat_interleave(config.n_routed_experts // config.n_group, dim=1)


class MoE:
    """The router and the experts it chooses, among them the shared ones, which every token uses."""

    def __init__(
        self, config: ModelConfig, source: WeightSource, module: str, kernels: Kernels, experts: Experts
    ) -> None:
        self.router = Router(config, source, f"{module}.gate", kernels)
        self.experts = experts
        self._routing_time = kernels.profile.part("router")
        self._experts_time = kernels.profile.part("experts")

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 [T, H] -> [T, H]."""
        with self._routing_time:
            expert_ids, weights = self.router(x)
        with self._experts_time:
            return self.experts(x, expert_ids, weights)
