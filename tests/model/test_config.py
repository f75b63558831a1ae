"""config.json: real files are read, both spellings agree, and what would change the maths is refused by name."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from typing import Any

import pytest

from localmoe.errors import UnsupportedModelError
from localmoe.model.config import ModelConfig, Yarn
from localmoe.model.rope import inverse_frequencies, rotation_scale, softmax_scale

# The fields of the published files, bookkeeping included.
V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "aux_loss_alpha": 0.001,
    "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
    "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707,
    "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000,
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
    "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
V3 = {
    **V2_LITE, "model_type": "deepseek_v3", "ep_size": 1, "first_k_dense_replace": 3, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc",
    "vocab_size": 129280, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip
KIMI = {
    **V3, "model_type": "kimi_k2", "first_k_dense_replace": 1, "max_position_embeddings": 131072, "n_group": 1,
    "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64, "topk_group": 1,
    "num_nextn_predict_layers": 0, "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "vocab_size": 163840,
    "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn"},
}  # fmt: skip
MOONLIGHT = {
    **V3, "aux_loss_alpha": 0.001, "bos_token_id": 163584, "eos_token_id": 163586, "first_k_dense_replace": 1,
    "hidden_size": 2048, "intermediate_size": 11264, "max_position_embeddings": 8192, "moe_intermediate_size": 1408,
    "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": None,
    "rms_norm_eps": 1e-05, "rope_theta": 50000.0, "rope_scaling": None, "routed_scaling_factor": 2.446,
    "topk_group": 1, "vocab_size": 163840, "quantization_config": None,
}  # fmt: skip
GLM_FLASH = {
    "architectures": ["Glm4MoeLiteForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "pad_token_id": 154820, "eos_token_id": [154820, 154827, 154829], "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 10240, "max_position_embeddings": 202752, "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 1536, "topk_method": "noaux_tc", "norm_topk_prob": True, "num_attention_heads": 20,
    "n_group": 1, "topk_group": 1, "n_routed_experts": 64, "n_shared_experts": 1, "routed_scaling_factor": 1.8,
    "num_experts_per_tok": 4, "first_k_dense_replace": 1, "num_hidden_layers": 47, "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 1000000, "tie_word_embeddings": False, "dtype": "bfloat16", "transformers_version": "5.0.0rc0",
    "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256,
    "vocab_size": 154880,
}  # fmt: skip


def test_published_configs_are_read() -> None:
    lite, v3 = ModelConfig.from_dict(V2_LITE), ModelConfig.from_dict(V3)
    kimi, glm = ModelConfig.from_dict(KIMI), ModelConfig.from_dict(GLM_FLASH)
    moonlight = ModelConfig.from_dict(MOONLIGHT)
    assert [config.latent_width for config in (lite, v3, kimi, glm, moonlight)] == [576] * 5
    assert (moonlight.q_lora_rank, moonlight.yarn, moonlight.n_group, moonlight.vocab_size) == (None, None, 1, 163840)
    assert (lite.q_lora_rank, lite.topk_method, lite.scoring_func) == (None, "greedy", "softmax")
    assert lite.yarn == Yarn(40.0, 4096, 32.0, 1.0, 0.707, 0.707)
    assert (v3.n_group, v3.topk_group, v3.num_nextn_predict_layers, v3.qk_head_dim) == (8, 4, 1, 192)
    assert v3.moe_layers == (False,) * 3 + (True,) * 58
    assert kimi.yarn is not None
    assert (kimi.yarn.beta_fast, kimi.rope_theta) == (1.0, 50000.0)
    assert (glm.yarn, glm.rms_norm_eps, glm.scoring_func) == (None, 1e-5, "sigmoid")


def test_the_demo_config_is_read() -> None:
    demo = ModelConfig.from_dict(json.loads(files("localmoe.data").joinpath("demo/config.json").read_text()))
    assert (demo.num_hidden_layers, demo.latent_width) == (5, 160)
    assert demo.yarn is not None
    assert (demo.yarn.factor, demo.max_position_embeddings) == (4, 4096)


@pytest.mark.parametrize(
    "config", [V2_LITE, V3, KIMI, GLM_FLASH, MOONLIGHT], ids=["v2", "v3", "kimi", "glm", "moonlight"]
)
def test_both_spellings_mean_the_same(config: dict[str, Any]) -> None:
    new = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling", "rope_type")}
    scaling = dict(config["rope_scaling"] or {"type": "default"})
    new["rope_parameters"] = {"rope_type": scaling.pop("type"), "rope_theta": config["rope_theta"], **scaling}
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(config)


def test_moe_layers_follow_frequency_or_list() -> None:
    every_second = ModelConfig.from_dict({**V2_LITE, "num_hidden_layers": 7, "moe_layer_freq": 2})
    assert every_second.moe_layers == (False, False, True, False, True, False, True)
    kinds = ["sparse", "dense", "sparse"]
    config = {**GLM_FLASH, "num_hidden_layers": 3, "mlp_layer_types": kinds, "first_k_dense_replace": None}
    assert ModelConfig.from_dict(config).moe_layers == (True, False, True)


def test_bookkeeping_of_other_versions_passes() -> None:
    extra = {"bogus_note": "x", "use_cache": False, "_attn_implementation_autoset": True, "head_dim": 64,
             "attention_dropout": 0.1, "sliding_window": None, "index_topk": 0, "mlp_bias": False,
             "rope_interleave": True, "chunk_size_feed_forward": 0, "temperature": 0.3}  # fmt: skip
    assert ModelConfig.from_dict({**V3, **extra}) == ModelConfig.from_dict(V3)


REFUSED: list[tuple[str, object]] = [
    ("model_type", "deepseek_v32"),
    ("model_type", "deepseek_v4"),
    ("model_type", "glm_moe_dsa"),
    ("model_type", "llama"),
    ("model_type", None),
    ("model_type", ["deepseek_v3"]),
    ("hidden_act", "gelu"),
    ("rope_interleave", False),
    ("partial_rotary_factor", 0.5),
    ("pretraining_tp", 4),
    ("mlp_bias", True),
    ("use_mla", False),
    ("sliding_window", 4096),
    ("use_sliding_window", True),
    ("index_topk", 2048),
    ("attention_sink", True),
    ("final_logit_softcapping", 30.0),
    ("embedding_multiplier", 12.0),
    ("use_qk_norm", True),
    ("lm_head_bias", True),
    ("linear_attn_config", {"num_heads": 4}),
    ("layer_types", ["full_attention", "linear_attention"]),
    ("rope_ratio", 500),
    ("scale_emb", 12),
    ("scoring_func", "softmax"),
    ("scoring_func", "sqrtsoftplus"),
    ("topk_method", "greedy"),
    ("num_key_value_heads", 8),
    ("qk_head_dim", 128),
    ("rope_parameters", {"rope_type": "default"}),  # beside rope_scaling: which one holds?
    # values of a wrong type or size
    ("hidden_size", "7168"),
    ("hidden_size", 7168.0),
    ("hidden_size", True),
    ("hidden_size", -1),
    ("hidden_size", 1 << 40),
    ("hidden_size", None),
    ("vocab_size", 10**30),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", [61]),
    ("num_hidden_layers", 10**9),
    ("n_routed_experts", 4096),  # 61 layers of them
    ("n_routed_experts", 255),
    ("n_group", 256),
    ("n_group", 0),
    ("topk_group", 9),
    ("num_experts_per_tok", 300),
    ("num_experts_per_tok", 129),  # 4 groups hold 128
    ("qk_rope_head_dim", 63),
    ("q_lora_rank", 0),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", -1e-6),
    ("rope_theta", float("inf")),
    ("rope_theta", "10000"),
    ("rope_theta", 1.0),
    ("routed_scaling_factor", None),
    ("routed_scaling_factor", 0),
    ("norm_topk_prob", 1),
    ("tie_word_embeddings", "no"),
    ("max_position_embeddings", 1 << 30),
    ("max_position_embeddings", 100),
    ("rope_scaling", "yarn"),
    ("moe_layer_freq", 0),
    ("moe_layer_freq", [0, 1]),
    ("mlp_layer_types", ["dense"]),
    ("mlp_layer_types", ["dense"] * 61),  # contradicts first_k_dense_replace
    ("num_nextn_predict_layers", -1),
]


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=[f"{f}-{str(v)[:20]}" for f, v in REFUSED])
def test_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        ModelConfig.from_dict({**V3, field: value})
    message = str(caught.value)
    assert field in message
    assert "\n" not in message
    assert len(message) < 250


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"type": "linear", "factor": 2.0}, "rope_scaling.type"),
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_scaling.rope_type"),
        ({"type": "yarn", "factor": 40}, "rope_scaling.original_max_position_embeddings"),
        ({"type": "yarn", "original_max_position_embeddings": 4096}, "rope_scaling.factor"),
        ({"type": "yarn", "factor": 0, "original_max_position_embeddings": 4096}, "rope_scaling.factor"),
        ({"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "attention_factor": 1.2},
         "rope_scaling.attention_factor"),
        ({"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "truncate": False},
         "rope_scaling.truncate"),
        ({"type": "default", "factor": 4}, "rope_scaling.factor"),
        ({"type": "default", "partial_rotary_factor": 0.5}, "rope_scaling.partial_rotary_factor"),
    ],
)  # fmt: skip
def test_rope_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named.replace(".", r"\.")):
        ModelConfig.from_dict({**V3, "rope_scaling": change})


JUNK = [None, True, False, 0, -1, 1, 2, 3, 10**400, -(10**400), 1e308, -0.5, 1e-300, float("nan"), float("-inf"), "",
        "8", "x" * 10_000, [], [1], [[]], {}, {"a": {}}, 4096]  # fmt: skip


@pytest.mark.parametrize("config", [V2_LITE, KIMI, GLM_FLASH], ids=["v2", "kimi", "glm"])
def test_no_value_of_any_field_raises_anything_else(config: dict[str, Any]) -> None:
    scaling = config["rope_scaling"] or KIMI["rope_scaling"]
    for junk in JUNK:
        variants = [{**config, field: junk} for field in [*config, "mlp_layer_types", "rope_parameters", "unheard_of"]]
        variants += [{**config, "rope_scaling": {**scaling, field: junk}} for field in [*scaling, "rope_theta"]]
        for variant in variants:
            try:
                read = ModelConfig.from_dict(variant)
            except UnsupportedModelError:
                continue
            assert bool(inverse_frequencies(read).isfinite().all())
            assert math.isfinite(softmax_scale(read) * rotation_scale(read.yarn))


@pytest.mark.parametrize("field", ["vocab_size", "kv_lora_rank", "n_routed_experts", "first_k_dense_replace"])
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"lacks {field}"):
        ModelConfig.from_dict({key: value for key, value in V3.items() if key != field})
