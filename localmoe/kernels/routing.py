"""Choosing experts from router logits in one native call; `localmoe.model.moe` has the same in torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.kernels import _cpu
from localmoe.kernels.cpu import array


@dataclass(frozen=True)
class RouterRule:
    """How a router chooses: E = experts, in `groups` of the same size."""

    sigmoid: bool  # scores, or else a softmax over all experts
    bias: Tensor | None  # float32 [E], for choosing only
    groups: int
    kept_groups: int  # that a token may choose from
    group_best: int  # a group counts by the sum of its best so many scores
    outside: float  # the score that experts of other groups get
    experts_per_token: int
    normalised: bool  # weights sum up to 1, before `factor`
    factor: float


class NativeRouting:
    """One layer's choice."""

    def __init__(self, rule: RouterRule) -> None:
        self.experts_per_token = rule.experts_per_token
        self.native = _cpu.Router(
            rule.sigmoid,
            [] if rule.bias is None else rule.bias.tolist(),
            rule.groups,
            rule.kept_groups,
            rule.group_best,
            rule.outside,
            rule.experts_per_token,
            rule.normalised,
            rule.factor,
        )

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 [T, E] -> expert ids int64 [T, k], weights float32 [T, k]; a row does not depend on the others."""
        expert_ids = torch.empty(len(logits), self.experts_per_token, dtype=torch.int64)
        weights = torch.empty(len(logits), self.experts_per_token)
        self.native.route(array(logits), array(expert_ids), array(weights))
        return expert_ids, weights
