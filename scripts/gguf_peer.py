#!/usr/bin/env python3
"""llama.cpp's part of scripts/kld_curve: run by a Python that has `gguf`, `numpy` and `llama-cpp-python`, nothing else.

    pip install gguf numpy llama-cpp-python
    python gguf_peer.py SCRATCH

SCRATCH holds what kld_curve wrote: config.json, tokens.json (windows of token ids) and weights/NAME.npy, float32.
Writes a GGUF file in float32, has llama.cpp quantize it, and writes SCRATCH/NAME.logits.npy, float32 [tokens,
vocabulary] of all windows, for each kind of number. Prints one JSON object: by kind, the bytes of its tensors.

The names and shapes are those of llama.cpp's convert_hf_to_gguf.py for DeepseekV2ForCausalLM and DeepseekV3ForCausalLM;
what that converter would need and this does not do (YaRN, a query without q_lora outside V2-Lite) is refused.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as lib
import numpy as np

FTYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17}  # enum llama_ftype
THREADS = len(os.sched_getaffinity(0))


def main() -> None:
    scratch = Path(sys.argv[1])
    config = json.loads((scratch / "config.json").read_text())
    windows = json.loads((scratch / "tokens.json").read_text())
    lib.llama_backend_init()
    plain = scratch / "F32.gguf"
    write_gguf(config, scratch / "weights", plain)
    made = {"F32": plain}
    for kind, ftype in FTYPES.items():
        made[kind] = scratch / f"{kind}.gguf"
        params = lib.llama_model_quantize_default_params()
        params.ftype, params.nthread = ftype, THREADS
        if lib.llama_model_quantize(str(plain).encode(), str(made[kind]).encode(), params) != 0:
            raise SystemExit(f"llama.cpp could not quantize to {kind}")
    sizes = {}
    for kind, path in made.items():
        np.save(scratch / f"{kind}.logits.npy", logits(path, windows, config["vocab_size"]))
        sizes[kind] = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    print(json.dumps(sizes))


def write_gguf(config: dict[str, Any], weights: Path, path: Path) -> None:
    out = gguf.GGUFWriter(path, "deepseek2")
    heads, rank, rope = config["num_attention_heads"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    out.add_block_count(config["num_hidden_layers"])
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(1)
    out.add_rope_freq_base(config.get("rope_theta", 10000.0))
    if scaling := config.get("rope_scaling"):
        add_yarn(out, scaling)
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_vocab_size(config["vocab_size"])
    if config.get("q_lora_rank"):
        out.add_q_lora_rank(config["q_lora_rank"])
    out.add_kv_lora_rank(rank)
    out.add_key_length(rank + rope)
    out.add_value_length(rank)
    out.add_key_length_mla(nope + rope)
    out.add_value_length_mla(value)
    out.add_rope_dimension_count(rope)
    out.add_leading_dense_block_count(config["first_k_dense_replace"])
    out.add_expert_feed_forward_length(config["moe_intermediate_size"])
    out.add_expert_count(config["n_routed_experts"])
    out.add_expert_used_count(config["num_experts_per_tok"])
    out.add_expert_shared_count(config["n_shared_experts"])
    out.add_expert_weights_scale(config["routed_scaling_factor"])
    out.add_expert_weights_norm(bool(config["norm_topk_prob"]))
    sigmoid = config.get("scoring_func") == "sigmoid"
    out.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX)
    if config.get("n_group", 1) > 1:
        out.add_expert_group_count(config["n_group"])
        out.add_expert_group_used_count(config["topk_group"])
    out.add_file_type(0)
    out.add_tokenizer_model("no_vocab")
    for name, tensor in tensors(config, weights):
        out.add_tensor(name, np.ascontiguousarray(tensor))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def add_yarn(out: gguf.GGUFWriter, scaling: dict[str, Any]) -> None:
    """As llama.cpp's own converter writes DeepSeek's, which takes a tenth of `mscale_all_dim`."""
    if scaling.get("type", scaling.get("rope_type")) != "yarn":
        raise SystemExit("this converter knows plain RoPE and YaRN only")
    out.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    out.add_rope_scaling_factor(scaling["factor"])
    out.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    out.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])


def tensors(config: dict[str, Any], weights: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values as llama.cpp has them."""

    def stored(name: str) -> np.ndarray:
        return np.load(weights / f"{name}.npy")

    yield "token_embd.weight", stored("model.embed_tokens.weight")
    tied = config.get("tie_word_embeddings")
    if not tied:
        yield "output.weight", stored("lm_head.weight")
    yield "output_norm.weight", stored("model.norm.weight")
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        names = {
            "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
            "self_attn.kv_a_layernorm": "attn_kv_a_norm", "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
            "self_attn.o_proj": "attn_output",
        }  # fmt: skip
        if config.get("q_lora_rank"):
            names |= {"self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_a_proj": "attn_q_a",
                      "self_attn.q_b_proj": "attn_q_b"}  # fmt: skip
        else:
            names["self_attn.q_proj"] = "attn_q"
        dense = layer < config["first_k_dense_replace"]
        for part in ("gate", "up", "down"):
            if dense:
                names[f"mlp.{part}_proj"] = f"ffn_{part}"
            else:
                names[f"mlp.shared_experts.{part}_proj"] = f"ffn_{part}_shexp"
        if not dense:
            names["mlp.gate"] = "ffn_gate_inp"
        for name, other in names.items():
            yield f"{theirs}{other}.weight", stored(f"{ours}{name}.weight")
        heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
        both = stored(f"{ours}self_attn.kv_b_proj.weight").reshape(heads, -1, config["kv_lora_rank"])
        yield f"{theirs}attn_k_b.weight", both[:, :nope].transpose(0, 2, 1)
        yield f"{theirs}attn_v_b.weight", both[:, nope:]
        if dense:
            continue
        for part in ("gate", "up", "down"):
            each = [stored(f"{ours}mlp.experts.{e}.{part}_proj.weight") for e in range(config["n_routed_experts"])]
            yield f"{theirs}ffn_{part}_exps.weight", np.stack(each)
        if (weights / f"{ours}mlp.gate.e_score_correction_bias.npy").is_file():
            yield f"{theirs}exp_probs_b.bias", stored(f"{ours}mlp.gate.e_score_correction_bias")


def logits(path: Path, windows: list[list[int]], vocabulary: int) -> np.ndarray:
    """float32 [tokens, vocabulary] of all windows, each from an empty cache."""
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp could not load {path}")
    longest = max(map(len, windows))
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = longest
    params.n_threads = params.n_threads_batch = THREADS
    context = lib.llama_init_from_model(model, params)
    batch = lib.llama_batch_init(longest, 0, 1)
    rows = []
    for window in windows:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        batch.n_tokens = len(window)
        for place, token in enumerate(window):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        if lib.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")
        found = ctypes.cast(lib.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        rows.append(np.ctypeslib.as_array(found, (len(window), vocabulary)).copy())
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return np.concatenate(rows)


if __name__ == "__main__":
    main()
