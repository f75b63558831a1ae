"""Our logits and greedy tokens against transformers', on random models of every architecture."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

PROMPT = 70
GREEDY = 64
TOLERANCE = 1e-4  # largest difference over largest logit, float32

# 32 original positions: prompt and answer (134 tokens) go well beyond
YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}

V2 = {"model_type": "deepseek_v2", "norm_topk_prob": False, "n_group": 1, "topk_group": 1}
V2_CASES: dict[str, dict[str, Any]] = {
    "lite": {**V2, "q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 1.0,
             "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "n_shared_experts": 2},
    "groups": {**V2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
               "routed_scaling_factor": 16.0,
               "rope_scaling": {**YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "plain-rope": {**V2, "topk_method": "greedy", "num_experts_per_tok": 6, "rope_theta": 500.0},
    "three-dense": {**V2, "q_lora_rank": None, "topk_method": "greedy", "first_k_dense_replace": 3},
    "tied": {**V2, "tie_word_embeddings": True, "topk_method": "group_limited_greedy", "n_group": 2,
             "rope_scaling": {**YARN, "mscale": 1.0}},
    "two-mscales": {**V2, "topk_method": "greedy", "v_head_dim": 32, "num_experts_per_tok": 1,
                    "rope_scaling": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.6}},
    "biased": {**V2, "attention_bias": True, "topk_method": "greedy", "first_k_dense_replace": 0},
}  # fmt: skip
V3_CASES: dict[str, dict[str, Any]] = {
    "v3": {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "routed_scaling_factor": 2.5},
    "moonlight": {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2,
                  "rope_theta": 50000.0, "num_experts_per_tok": 6},
    "not-normalised": {"norm_topk_prob": False, "routed_scaling_factor": 0.8, "first_k_dense_replace": 2},
    "eight-groups": {"n_group": 8, "topk_group": 3, "num_experts_per_tok": 6,
                     "rope_scaling": {**YARN, "mscale": 0.8, "mscale_all_dim": 1.3}},
    "tied": {"tie_word_embeddings": True, "first_k_dense_replace": 3, "rms_norm_eps": 1e-3},
    "bare-yarn": {"rope_scaling": YARN, "topk_group": 1},
    "biased": {"attention_bias": True, "qk_nope_head_dim": 15, "kv_lora_rank": 23,
               "rope_theta": 200.0},
}  # fmt: skip
KIMI_CASES: dict[str, dict[str, Any]] = {
    "kimi": {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827,
             "rope_theta": 50000.0, "num_experts_per_tok": 8,
             "rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0,
                              "mscale_all_dim": 1.0}},
}  # fmt: skip
GLM = {"model_type": "glm4_moe_lite", "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5}
GLM_CASES: dict[str, dict[str, Any]] = {
    "flash": {**GLM, "routed_scaling_factor": 1.8, "rope_theta": 1000000.0, "v_head_dim": 32},
    "no-query-lora": {**GLM, "q_lora_rank": None, "n_shared_experts": 2},
    "groups": {**GLM, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 5},
    "three-dense": {**GLM, "mlp_layer_types": ["dense", "dense", "dense", "sparse"], "first_k_dense_replace": 3},
    "dense-between": {**GLM, "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"],
                      "first_k_dense_replace": None},
    "tied-yarn": {**GLM, "tie_word_embeddings": True, "norm_topk_prob": False,
                  "rope_scaling": {**YARN, "mscale": 0.9, "mscale_all_dim": 0.5}},
}  # fmt: skip
ALL = {
    f"{family}-{name}": case
    for family, cases in (("v2", V2_CASES), ("v3", V3_CASES), ("kimi", KIMI_CASES), ("glm", GLM_CASES))
    for name, case in cases.items()
}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", ALL)
def test_logits_and_greedy_tokens_equal_transformers(
    name: str, transformers_model: Callable[..., Any], record_property: Callable[[str, object], None]
) -> None:
    seed = list(ALL).index(name)
    opened = transformers_model(seed=seed, **ALL[name])
    model, cache = opened.ours(), opened.cache()
    chunks = random.Random(seed)
    token_ids = torch.randint(0, 211, (PROMPT,), generator=torch.Generator().manual_seed(seed))
    parts = []
    while cache.length < PROMPT:  # prefill in chunks of 1 to 23
        parts.append(model.forward(token_ids[cache.length :][: chunks.randint(1, 23)], cache))
    for _ in range(GREEDY):
        token_ids = torch.cat((token_ids, parts[-1][-1:].argmax(dim=1)))
        parts.append(model.forward(token_ids[-1:], cache, last_only=True))
    ours = torch.cat(parts)
    theirs = opened.their_logits(token_ids)
    error = relative_error(ours, theirs)
    record_property("relative_error", error)
    assert error < TOLERANCE
    # Each of our greedy tokens is their greedy choice after the same tokens: so theirs, one by one, too.
    assert theirs[PROMPT - 1 : -1].argmax(dim=1).tolist() == token_ids[PROMPT:].tolist()


@pytest.mark.parametrize("name", ["v2-lite", "v3-v3", "glm-flash"])
def test_greedy_tokens_equal_transformers_own_generate(name: str, transformers_model: Callable[..., Any]) -> None:
    opened = transformers_model(seed=99, **ALL[name])
    model, cache = opened.ours(), opened.cache()
    prompt = torch.randint(0, 211, (PROMPT,), generator=torch.Generator().manual_seed(99))
    theirs = opened.theirs.generate(
        prompt[None], max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, PROMPT:]
    logits = model.forward(prompt, cache, last_only=True)
    ours = []
    for _ in range(GREEDY):
        ours.append(int(logits.argmax()))
        logits = model.forward(torch.tensor(ours[-1:]), cache)
    assert ours == theirs.tolist()
