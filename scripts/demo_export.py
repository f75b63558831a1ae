"""Writes the trained demo model as DeepSeek ships V3."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from demo_model import Attention, Experts, Layer, Mlp, Model, Shape
from demo_text import BEGIN, CHAT_TEMPLATE, END, PAD
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

BLOCK = 128
LARGEST = 448.0  # of float8_e4m3fn


def export(model: Model, tokenizer: Tokenizer, out: Path) -> None:
    """A Hugging Face directory: FP8 e4m3 in blocks of 128 x 128 with `weight_scale_inv`; router, norms, embeddings,
    head and `eh_proj` in bf16; `e_score_correction_bias` in float32; the MTP layer after the last layer."""
    out.mkdir(exist_ok=True)
    shape = model.shape
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": half(model.embed_tokens),
        "model.norm.weight": half(model.norm.weight),
        "lm_head.weight": half(model.lm_head),
    }
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        tensors |= layer_tensors(f"model.layers.{index}", layer)
    prefix, mtp = f"model.layers.{len(model.layers)}", model.mtp
    tensors |= layer_tensors(prefix, mtp.layer) | {
        f"{prefix}.enorm.weight": half(mtp.enorm.weight),
        f"{prefix}.hnorm.weight": half(mtp.hnorm.weight),
        f"{prefix}.eh_proj.weight": half(mtp.eh_proj),
        f"{prefix}.shared_head.norm.weight": half(mtp.norm.weight),
        f"{prefix}.embed_tokens.weight": half(model.embed_tokens).clone(),
        f"{prefix}.shared_head.head.weight": half(model.lm_head).clone(),
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    write(out / "config.json", config(shape, tokenizer))
    write(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END, "pad_token": PAD,
            "add_bos_token": True, "add_eos_token": False, "model_max_length": shape.context,
            "chat_template": CHAT_TEMPLATE,
        },
    )  # fmt: skip
    special = {"bos_token_id": tokenizer.token_to_id(BEGIN), "eos_token_id": tokenizer.token_to_id(END)}
    # A small model that copies would fall into saying the same again and again
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.05}
    write(out / "generation_config.json", special | sampling)


def config(shape: Shape, tokenizer: Tokenizer) -> dict[str, object]:
    """config.json, with DeepSeek-V3's fields."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size, "moe_intermediate_size": shape.moe_intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers, "num_nextn_predict_layers": 1,
        "num_attention_heads": shape.num_attention_heads, "num_key_value_heads": shape.num_attention_heads,
        "n_shared_experts": 1, "n_routed_experts": shape.n_routed_experts,
        "routed_scaling_factor": shape.routed_scaling_factor, "kv_lora_rank": shape.kv_lora_rank,
        "q_lora_rank": shape.q_lora_rank, "qk_rope_head_dim": shape.qk_rope_head_dim,
        "v_head_dim": shape.v_head_dim, "qk_nope_head_dim": shape.qk_nope_head_dim,
        "n_group": shape.n_group, "topk_group": shape.topk_group,
        "num_experts_per_tok": shape.num_experts_per_tok, "moe_layer_freq": 1,
        "first_k_dense_replace": shape.first_k_dense_replace, "norm_topk_prob": True, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "hidden_act": "silu", "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.rms_norm_eps, "rope_theta": shape.rope_theta,
        "rope_scaling": {
            "type": "yarn", "factor": shape.rope_factor,
            "original_max_position_embeddings": shape.trained_context,
            "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
        "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
        "bos_token_id": tokenizer.token_to_id(BEGIN), "eos_token_id": tokenizer.token_to_id(END),
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        },
    }  # fmt: skip


def layer_tensors(prefix: str, layer: Layer) -> dict[str, Tensor]:
    found = {
        f"{prefix}.input_layernorm.weight": half(layer.input_layernorm.weight),
        f"{prefix}.post_attention_layernorm.weight": half(layer.post_attention_layernorm.weight),
    } | attention_tensors(f"{prefix}.self_attn", layer.self_attn)
    mlp = layer.mlp
    if isinstance(mlp, Mlp):
        return found | mlp_tensors(f"{prefix}.mlp", mlp.gate_up, mlp.down_proj)
    assert isinstance(mlp, Experts)
    found |= mlp_tensors(f"{prefix}.mlp.shared_experts", mlp.shared.gate_up, mlp.shared.down_proj)
    found |= {
        f"{prefix}.mlp.gate.weight": half(mlp.router),
        f"{prefix}.mlp.gate.e_score_correction_bias": mlp.correction_bias.detach().float().cpu().clone(),
    }
    for expert in range(len(mlp.gate_up)):
        found |= mlp_tensors(f"{prefix}.mlp.experts.{expert}", mlp.gate_up[expert], mlp.down_proj[expert])
    return found


def attention_tensors(prefix: str, attention: Attention) -> dict[str, Tensor]:
    found = {
        f"{prefix}.q_a_layernorm.weight": half(attention.q_a_layernorm.weight),
        f"{prefix}.kv_a_layernorm.weight": half(attention.kv_a_layernorm.weight),
    }
    for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
        found |= eight_bits(f"{prefix}.{name}", getattr(attention, name))
    return found


def mlp_tensors(prefix: str, gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    return (
        eight_bits(f"{prefix}.gate_proj", gate_up[0])
        | eight_bits(f"{prefix}.up_proj", gate_up[1])
        | eight_bits(f"{prefix}.down_proj", down)
    )


def eight_bits(name: str, weight: Tensor) -> dict[str, Tensor]:
    """[out, in] -> FP8 and one scale a block, edge blocks included: weight = quantized x scale."""
    weight = weight.detach().float().cpu()
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scale = (blocks.abs().amax(dim=(1, 3)) / LARGEST).clamp(min=1e-12)  # [rows, columns]
    quantized = (blocks / scale[:, None, :, None]).view_as(padded)[: weight.shape[0], : weight.shape[1]]
    return {
        f"{name}.weight": quantized.to(torch.float8_e4m3fn).contiguous(),
        f"{name}.weight_scale_inv": scale,
    }


def half(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.bfloat16).cpu().contiguous()


def write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
