"""Routers against loops over tokens and experts, written from DeepSeek's description."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from localmoe.formats.weights import DenseWeight
from localmoe.kernels.dispatch import Kernels
from localmoe.kernels.routing import NativeRouting
from localmoe.model.config import ModelConfig
from localmoe.model.moe import Router

V2 = {"model_type": "deepseek_v2", "norm_topk_prob": False, "topk_method": "group_limited_greedy"}


class Source:
    """A router's tensors, in the dtypes that checkpoints have."""

    def __init__(self, experts: int, hidden: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tensors = {
            "gate.weight": (torch.randn(experts, hidden, generator=generator) / 4).bfloat16(),
            "gate.e_score_correction_bias": torch.randn(experts, generator=generator) * 0.4,
        }

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def weight(self, module: str) -> DenseWeight:
        return DenseWeight(self.tensors[f"{module}.weight"])

    def __contains__(self, name: str) -> bool:
        return name in self.tensors


def by_definition(config: ModelConfig, source: Source, x: list[float]) -> dict[int, float]:
    """Expert -> weight for one token, in Python floats."""
    rows = source.tensors["gate.weight"].double().tolist()
    logits = [sum(a * b for a, b in zip(row, x, strict=True)) for row in rows]
    if config.scoring_func == "softmax":
        total = sum(math.exp(logit) for logit in logits)
        scores = [math.exp(logit) / total for logit in logits]
        choice = scores
    else:
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
        bias = source.tensors["gate.e_score_correction_bias"].tolist()
        choice = [score + b for score, b in zip(scores, bias, strict=True)]
    allowed = set(range(len(scores)))
    if config.topk_method != "greedy":
        size = len(scores) // config.n_group
        groups = [range(start, start + size) for start in range(0, len(scores), size)]
        best_of = 2 if config.topk_method == "noaux_tc" else 1
        ranked = sorted(groups, key=lambda g: -sum(sorted((choice[e] for e in g), reverse=True)[:best_of]))
        allowed = set(itertools.chain(*ranked[: config.topk_group]))
    chosen = sorted(allowed, key=lambda e: -choice[e])[: config.num_experts_per_tok]
    weights = {expert: scores[expert] for expert in chosen}
    normalise = config.norm_topk_prob and len(chosen) > 1
    total = sum(weights.values()) if normalise else 1.0
    scale = config.routed_scaling_factor if config.scoring_func == "sigmoid" or not normalise else 1.0
    return {expert: weight / total * scale for expert, weight in weights.items()}


CASES: dict[str, dict[str, Any]] = {
    "v2-greedy": {**V2, "topk_method": "greedy", "routed_scaling_factor": 16.0},
    "v2-groups": V2,
    "v2-one-group": {**V2, "topk_group": 1},
    "v2-normalised": {**V2, "norm_topk_prob": True, "routed_scaling_factor": 3.0},
    "v2-normalised-one": {**V2, "norm_topk_prob": True, "num_experts_per_tok": 1},
    "v3": {},
    "v3-one-group-of-four": {"topk_group": 1},
    "v3-all-groups": {"topk_group": 4, "num_experts_per_tok": 7},
    "v3-every-expert-of-a-group": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 8},
    "v3-not-normalised": {"norm_topk_prob": False},
    "v3-one-expert": {"num_experts_per_tok": 1},
}


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_routers_follow_the_definition(name: str, kernels: str, base_config: dict[str, Any]) -> None:
    config = ModelConfig.from_dict({**base_config, **CASES[name]})
    source = Source(16, 64, seed=list(CASES).index(name))
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(7))
    expert_ids, weights = Router(config, source, "gate", Kernels.choose(kernels))(x)
    assert expert_ids.dtype == torch.int64
    assert weights.dtype == torch.float32
    for token in range(40):
        wanted = by_definition(config, source, x[token].tolist())
        found = dict(zip(expert_ids[token].tolist(), weights[token].tolist(), strict=True))
        assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_native_choice_is_torchs(name: str, base_config: dict[str, Any]) -> None:
    config = ModelConfig.from_dict({**base_config, **CASES[name]})
    router = Router(config, Source(16, 64, seed=5), "gate", Kernels.choose("portable"))
    logits = 3 * torch.randn(300, 16, generator=torch.Generator().manual_seed(11))
    logits[0] = 0.0  # all the same: torch and we choose differently, but only there
    native = NativeRouting(router.rule())
    expert_ids, weights = native(logits)
    wanted_ids, wanted_weights = router.choose(logits)
    assert torch.equal(expert_ids[1:], wanted_ids[1:])
    torch.testing.assert_close(weights[1:], wanted_weights[1:], rtol=1e-6, atol=0)
    alone = native(logits[7:8])
    assert torch.equal(alone[0], expert_ids[7:8])
    assert torch.equal(alone[1], weights[7:8])  # to the bit, whatever is computed beside it


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_negative_biases_never_let_an_expert_of_another_group_in(kernels: str, base_config: dict[str, Any]) -> None:
    config = ModelConfig.from_dict({**base_config, "topk_group": 1, "num_experts_per_tok": 4})
    source = Source(16, 64, seed=3)
    source.tensors["gate.e_score_correction_bias"] -= 5.0  # every biased score is below 0, the masked value of old
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
    expert_ids, _ = Router(config, source, "gate", Kernels.choose(kernels))(x)
    assert all(len(set((row // 4).tolist())) == 1 for row in expert_ids)


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_the_bias_keeps_float32_precision(kernels: str, base_config: dict[str, Any]) -> None:
    config = ModelConfig.from_dict({**base_config, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1})
    source = Source(16, 64, seed=1)
    source.tensors["gate.weight"].zero_()
    bias = torch.full((16,), 8.0)
    bias[11] = 8.0 + 2**-18  # lost in bfloat16 and float16; 0.5 + it is exact in float32
    source.tensors["gate.e_score_correction_bias"] = bias
    expert_ids, _ = Router(config, source, "gate", Kernels.choose(kernels))(torch.ones(1, 64))
    assert expert_ids.tolist() == [[11]]
