"""The architecture of a DeepSeek-style model, read from config.json and checked once.

Two spellings are read: the hub's (`rope_theta` beside `rope_scaling`) and that of files saved by
transformers 5 (both inside `rope_parameters`). Everything after this module may trust every field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from localmoe.errors import UnsupportedModelError
from localmoe.model.fields import Fields, refuse_unimplemented, unsupported


@dataclass(frozen=True)
class _Family:
    """What distinguishes one `model_type`; the defaults are those of its makers' configuration class."""

    scoring_func: str
    topk_methods: tuple[str, ...]  # the first is the default
    norm_topk_prob: bool
    rms_norm_eps: float = 1e-6


_FAMILIES = {
    "deepseek_v2": _Family("softmax", ("greedy", "group_limited_greedy"), norm_topk_prob=False),
    "deepseek_v3": _Family("sigmoid", ("noaux_tc",), norm_topk_prob=True),
    "kimi_k2": _Family("sigmoid", ("noaux_tc",), norm_topk_prob=True),
    "glm4_moe_lite": _Family("sigmoid", ("noaux_tc",), norm_topk_prob=True, rms_norm_eps=1e-5),
}

# Bounds against a config made to exhaust memory; each is several times what any published model uses.
_MOST_LAYERS = 512
_MOST_WIDTH = 1 << 18
_MOST_HEADS = 1024
_MOST_VOCABULARY = 1 << 22
_MOST_EXPERTS = 4096
_MOST_EXPERTS_IN_ALL = 1 << 17
_LONGEST_CONTEXT = 1 << 24

_READ = frozenset({
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "qk_head_dim", "v_head_dim", "n_routed_experts", "n_shared_experts",
    "num_experts_per_tok", "n_group", "topk_group", "scoring_func", "topk_method", "norm_topk_prob",
    "routed_scaling_factor", "first_k_dense_replace", "moe_layer_freq", "mlp_layer_types",
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "attention_bias", "tie_word_embeddings", "num_nextn_predict_layers", "num_mtp_layers",
    "quantization_config",
})  # fmt: skip
_YARN_FIELDS = frozenset({
    "type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim",
})  # fmt: skip


@dataclass(frozen=True)
class Yarn:
    """YaRN's parameters (https://arxiv.org/abs/2309.00071), with DeepSeek's two mscales."""

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class ModelConfig:
    """One model's sizes and choices. Names are config.json's; sizes are counts of numbers, never bytes.

    `q_lora_rank` is None where the query is one matrix; `moe_layers` says layer by layer whether it is MoE;
    `yarn` is None for plain RoPE; `num_nextn_predict_layers` counts the MTP layers after the last.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    scoring_func: str
    topk_method: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    moe_layers: tuple[bool, ...]
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    yarn: Yarn | None
    attention_bias: bool
    tie_word_embeddings: bool
    num_nextn_predict_layers: int

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_width(self) -> int:
        """Numbers the latent cache holds a token a layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read config.json's object.

        Raises UnsupportedModelError naming the field: an unknown `model_type`, a missing or malformed value,
        or a field that changes the maths in a way that is not implemented.
        """
        model_type = config.get("model_type")
        family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if not isinstance(model_type, str) or family is None:
            raise unsupported("model_type", model_type, f"but localmoe runs {', '.join(_FAMILIES)}")
        refuse_unimplemented(config, _READ)
        fields = Fields(config)
        layers = fields.integer("num_hidden_layers", 1, _MOST_LAYERS)
        context = fields.integer("max_position_embeddings", 1, _LONGEST_CONTEXT)
        rope_theta, yarn = _rope(fields, context)
        result = cls(
            model_type=model_type,
            vocab_size=fields.integer("vocab_size", 1, _MOST_VOCABULARY),
            hidden_size=fields.integer("hidden_size", 1, _MOST_WIDTH),
            intermediate_size=fields.integer("intermediate_size", 1, _MOST_WIDTH),
            moe_intermediate_size=fields.integer("moe_intermediate_size", 1, _MOST_WIDTH),
            num_hidden_layers=layers,
            num_attention_heads=fields.integer("num_attention_heads", 1, _MOST_HEADS),
            q_lora_rank=fields.integer("q_lora_rank", 1, _MOST_WIDTH) if "q_lora_rank" in fields else None,
            kv_lora_rank=fields.integer("kv_lora_rank", 1, _MOST_WIDTH),
            qk_nope_head_dim=fields.integer("qk_nope_head_dim", 1, 1 << 14),
            qk_rope_head_dim=fields.integer("qk_rope_head_dim", 2, 1 << 14),
            v_head_dim=fields.integer("v_head_dim", 1, 1 << 14),
            n_routed_experts=fields.integer("n_routed_experts", 1, _MOST_EXPERTS),
            n_shared_experts=fields.integer("n_shared_experts", 0, _MOST_EXPERTS, default=0),
            num_experts_per_tok=fields.integer("num_experts_per_tok", 1, _MOST_EXPERTS),
            n_group=fields.integer("n_group", 1, _MOST_EXPERTS, default=1),
            topk_group=fields.integer("topk_group", 1, _MOST_EXPERTS, default=1),
            scoring_func=fields.choice("scoring_func", (family.scoring_func,), family.scoring_func),
            topk_method=fields.choice("topk_method", family.topk_methods, family.topk_methods[0]),
            norm_topk_prob=fields.boolean("norm_topk_prob", family.norm_topk_prob),
            routed_scaling_factor=fields.number("routed_scaling_factor", 1e-6, 1e6),
            moe_layers=_moe_layers(config, fields, layers),
            max_position_embeddings=context,
            rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, default=family.rms_norm_eps),
            rope_theta=rope_theta,
            yarn=yarn,
            attention_bias=fields.boolean("attention_bias", False),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            num_nextn_predict_layers=_mtp_layers(fields),
        )
        _check_sizes_agree(result, fields)
        return result


def _mtp_layers(fields: Fields) -> int:
    """`num_nextn_predict_layers`, which transformers 5 also calls `num_mtp_layers`."""
    name = "num_nextn_predict_layers" if "num_nextn_predict_layers" in fields else "num_mtp_layers"
    return fields.integer(name, 0, 16, default=0)


def _moe_layers(config: Mapping[str, Any], fields: Fields, layers: int) -> tuple[bool, ...]:
    """Which layers are MoE: `first_k_dense_replace` with `moe_layer_freq`, or GLM's list `mlp_layer_types`.

    DeepSeek's modeling_deepseek.py: MoE from layer `first_k_dense_replace` on where the index is a multiple
    of `moe_layer_freq` (transformers ignores the frequency; every published model has 1).
    """
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        dense = fields.integer("first_k_dense_replace", 0, _MOST_LAYERS)
        every = fields.integer("moe_layer_freq", 1, _MOST_LAYERS, default=1)
        return tuple(index >= dense and index % every == 0 for index in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in ("dense", "sparse") for kind in kinds):
        raise unsupported("mlp_layer_types", kinds, f"but wanted {layers} times dense or sparse")
    result = tuple(kind == "sparse" for kind in kinds)
    if "first_k_dense_replace" in fields:
        dense = fields.integer("first_k_dense_replace", 0, _MOST_LAYERS)
        if result != tuple(index >= dense for index in range(layers)):
            raise unsupported("first_k_dense_replace", dense, "but mlp_layer_types says otherwise")
    return result


def _rope(fields: Fields, context: int) -> tuple[float, Yarn | None]:
    """RoPE's base and YaRN's parameters, from either spelling."""
    scaling, parameters = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    if scaling is not None and parameters is not None:
        raise UnsupportedModelError("config.json has both rope_scaling and rope_parameters: remove one of them")
    rope = scaling if parameters is None else parameters
    if rope is None:
        return fields.number("rope_theta", 2.0, 1e12, default=10000.0), None
    theta = (rope if "rope_theta" in rope else fields).number("rope_theta", 2.0, 1e12, default=10000.0)
    kind = rope.choice("rope_type" if "rope_type" in rope else "type", ("default", "yarn"), "default")
    if kind == "default":
        # old files repeat partial_rotary_factor here; 1 is neutral, as it is outside
        rope.number("partial_rotary_factor", 1.0, 1.0, default=1.0)
        rope.only({"type", "rope_type", "rope_theta", "partial_rotary_factor"})
        return theta, None
    rope.only(_YARN_FIELDS)
    yarn = Yarn(
        factor=rope.number("factor", 1e-3, 1e6),
        # transformers takes max_position_embeddings where it is missing, DeepSeek's class 4096: every real
        # file has it, so it is asked for
        original_context=rope.integer("original_max_position_embeddings", 1, _LONGEST_CONTEXT),
        beta_fast=rope.number("beta_fast", 1e-3, 1e6, default=32.0),
        beta_slow=rope.number("beta_slow", 1e-3, 1e6, default=1.0),
        mscale=rope.number("mscale", 0.0, 1e3, default=1.0),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0, 1e3, default=0.0),
    )
    if context < yarn.original_context:
        raise unsupported("max_position_embeddings", context, "less than YaRN's original context")
    return theta, yarn


def _check_sizes_agree(config: ModelConfig, fields: Fields) -> None:
    """Refuse sizes that contradict each other; each would otherwise fail far from its cause."""
    if config.qk_rope_head_dim % 2:
        raise unsupported("qk_rope_head_dim", config.qk_rope_head_dim, "but RoPE turns pairs: wanted an even number")
    heads = fields.integer("num_key_value_heads", 1, _MOST_HEADS, default=config.num_attention_heads)
    if heads != config.num_attention_heads:
        raise unsupported("num_key_value_heads", heads, "but MLA has as many as num_attention_heads")
    width = fields.integer("qk_head_dim", 1, 1 << 15, default=config.qk_head_dim)
    if width != config.qk_head_dim:
        raise unsupported("qk_head_dim", width, "but qk_nope_head_dim + qk_rope_head_dim is something else")
    if config.n_routed_experts * config.num_hidden_layers > _MOST_EXPERTS_IN_ALL:
        raise unsupported("n_routed_experts", config.n_routed_experts, "more than localmoe takes for so many layers")
    if config.num_experts_per_tok > config.n_routed_experts:
        raise unsupported("num_experts_per_tok", config.num_experts_per_tok, "more than n_routed_experts")
    if config.topk_method == "greedy":
        return  # expert groups play no part
    if config.n_routed_experts % config.n_group:
        raise unsupported("n_group", config.n_group, "which does not divide n_routed_experts")
    in_group = config.n_routed_experts // config.n_group
    if config.topk_method == "noaux_tc" and in_group < 2:
        raise unsupported("n_group", config.n_group, "but a group's score is the sum of two experts'")
    if config.topk_group > config.n_group:
        raise unsupported("topk_group", config.topk_group, "more than n_group")
    if config.num_experts_per_tok > config.topk_group * in_group:
        raise unsupported("num_experts_per_tok", config.num_experts_per_tok, "more than topk_group groups hold")
