"""Every tensor that a model of a given config has, with its shape, and the check that a checkpoint has them.

The check reads headers only. After it, a malformed checkpoint cannot reach a kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from localmoe.errors import CheckpointError
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.fp8 import scale_shape
from localmoe.formats.safetensors import TensorInfo
from localmoe.formats.scheme import TensorSpec
from localmoe.model.config import ModelConfig
from localmoe.model.mtp import has_matrix, has_mtp, mtp_module

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
EMBEDDING = "model.embed_tokens"
_LAYER = re.compile(r"model\.layers\.(\d{1,4})\.")


def expected_modules(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every linear module with its [out, in], the embedding and the router apart (`expected_tensors`)."""
    return dict(_modules(config))


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every other tensor, with its shape: the embedding, and what is never quantized (norms, biases, routers)."""
    return {f"{EMBEDDING}.weight": (config.vocab_size, config.hidden_size)} | dict(_plain_tensors(config))


def check_checkpoint(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError, naming the tensor, for one that is missing, misshapen, or not of this model.

    A tensor that the architecture does not have is an error too: it belongs to maths that would be left out.
    Allowed beyond the expected ones are the MTP layers (`model.layers.{num_hidden_layers}.*`), a head beside
    tied embeddings, and old rotary tables.
    """
    known = set(_check_embedding(config, checkpoint, EMBEDDING))
    for name, shape in _plain_tensors(config):
        _check_float(checkpoint, name, shape)
        known.add(name)
    for module, shape in _modules(config):
        known.update(_check_module(checkpoint, module, shape))
    if has_mtp(config, checkpoint):
        known.update(_check_mtp(config, checkpoint))
    for name, info in checkpoint.tensors.items():
        if name not in known and not _is_extra(config, name):
            raise CheckpointError(f"{info.file.name}: {name} is not a tensor of a {config.model_type} of this config")


def layer_modules(config: ModelConfig, layer: int, is_moe: bool) -> Iterator[tuple[str, tuple[int, int]]]:
    """One layer's linear modules with their [out, in]; of MTP layers too, which follow the last."""
    hidden, module = config.hidden_size, f"model.layers.{layer}"
    for name, shape in _attention(config):
        yield f"{module}.self_attn.{name}", shape
    if not is_moe:
        yield from _mlp(f"{module}.mlp", hidden, config.intermediate_size)
        return
    if config.n_shared_experts:
        shared = config.n_shared_experts * config.moe_intermediate_size
        yield from _mlp(f"{module}.mlp.shared_experts", hidden, shared)
    for expert in range(config.n_routed_experts):
        yield from _mlp(f"{module}.mlp.experts.{expert}", hidden, config.moe_intermediate_size)


def layer_tensors(config: ModelConfig, layer: int, is_moe: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """One layer's tensors that are never quantized; of MTP layers those that other layers have too."""
    hidden, module = config.hidden_size, f"model.layers.{layer}"
    yield f"{module}.input_layernorm.weight", (hidden,)
    yield f"{module}.post_attention_layernorm.weight", (hidden,)
    yield f"{module}.self_attn.kv_a_layernorm.weight", (config.kv_lora_rank,)
    if config.q_lora_rank is not None:
        yield f"{module}.self_attn.q_a_layernorm.weight", (config.q_lora_rank,)
    if config.attention_bias:
        yield f"{module}.self_attn.kv_a_proj_with_mqa.bias", (config.latent_width,)
        yield f"{module}.self_attn.o_proj.bias", (hidden,)
        if config.q_lora_rank is not None:
            yield f"{module}.self_attn.q_a_proj.bias", (config.q_lora_rank,)
    if is_moe:
        yield f"{module}.mlp.gate.weight", (config.n_routed_experts, hidden)
        if config.topk_method == "noaux_tc":
            yield f"{module}.mlp.gate.e_score_correction_bias", (config.n_routed_experts,)


def _modules(config: ModelConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    for layer, is_moe in enumerate(config.moe_layers):
        yield from layer_modules(config, layer, is_moe)
    if not config.tie_word_embeddings:
        yield "lm_head", (config.vocab_size, config.hidden_size)


def _attention(config: ModelConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.q_lora_rank is None:
        yield "q_proj", (heads * config.qk_head_dim, hidden)
    else:
        yield "q_a_proj", (config.q_lora_rank, hidden)
        yield "q_b_proj", (heads * config.qk_head_dim, config.q_lora_rank)
    yield "kv_a_proj_with_mqa", (config.latent_width, hidden)
    yield "kv_b_proj", (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
    yield "o_proj", (hidden, heads * config.v_head_dim)


def _mlp(module: str, hidden: int, intermediate: int) -> Iterator[tuple[str, tuple[int, int]]]:
    yield f"{module}.gate_proj", (intermediate, hidden)
    yield f"{module}.up_proj", (intermediate, hidden)
    yield f"{module}.down_proj", (hidden, intermediate)


def _plain_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    for layer, is_moe in enumerate(config.moe_layers):
        yield from layer_tensors(config, layer, is_moe)
    yield "model.norm.weight", (config.hidden_size,)


def _check_mtp(config: ModelConfig, checkpoint: Checkpoint) -> Iterator[str]:
    """Check the MTP layer, which is there; yields its tensors' names. Its embedding and head may be left out."""
    hidden, module = config.hidden_size, mtp_module(config)
    layer, is_moe = config.num_hidden_layers, f"{mtp_module(config)}.mlp.gate.weight" in checkpoint
    plain: dict[str, tuple[int, ...]] = {
        f"{module}.{name}.weight": (hidden,) for name in ("enorm", "hnorm", "shared_head.norm")
    }
    plain |= dict(layer_tensors(config, layer, is_moe))
    if has_matrix(checkpoint, f"{module}.embed_tokens"):
        yield from _check_embedding(config, checkpoint, f"{module}.embed_tokens")
    for name, plain_shape in plain.items():
        _check_float(checkpoint, name, plain_shape)
        yield name
    modules = dict(layer_modules(config, layer, is_moe)) | {f"{module}.eh_proj": (hidden, 2 * hidden)}
    head = f"{module}.shared_head.head"
    if has_matrix(checkpoint, head):
        modules[head] = (config.vocab_size, hidden)
    for name, shape in modules.items():
        yield from _check_module(checkpoint, name, shape)


def _check_embedding(config: ModelConfig, checkpoint: Checkpoint, module: str) -> Iterator[str]:
    """As `_check_module`, of an embedding, which is not in FP8."""
    shape = config.vocab_size, config.hidden_size
    if checkpoint.scheme_of(module) is None:
        _check_float(checkpoint, f"{module}.weight", shape)
    yield from _check_module(checkpoint, module, shape)


def _check_module(checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> Iterator[str]:
    """Check the tensors that store one matrix, in the form its metadata says; yields their names."""
    scheme = checkpoint.scheme_of(module)
    if scheme is not None:
        if not scheme.divides(shape[1]):
            raise CheckpointError(
                f"config.json: {module} has rows of {shape[1]}, which groups of {scheme.group_size} do not divide"
            )
        for name, spec in scheme.tensors(module, *shape).items():
            _check(checkpoint, name, spec)
            yield name
        return
    name = f"{module}.weight"
    info = _info(checkpoint, name, shape)
    yield name
    if info.dtype != torch.float8_e4m3fn:
        _check_float(checkpoint, name, shape)
        return
    _check(checkpoint, name, (info.dtype, shape))
    if checkpoint.fp8_block is None:
        raise CheckpointError(f"{info.file.name}: {name} is FP8, but config.json has no fp8 quantization_config")
    scale = f"{module}.weight_scale_inv"
    if scale not in checkpoint:
        raise CheckpointError(f"{info.file.name}: {name} is FP8 but its scale {scale} is missing")
    _check_float(checkpoint, scale, scale_shape(*shape, checkpoint.fp8_block))
    yield scale


def _check_float(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    """Check a tensor that may be of any float dtype."""
    info = _info(checkpoint, name, shape)
    _check(checkpoint, name, (info.dtype if info.dtype in _FLOATS else torch.float32, shape))


def _check(checkpoint: Checkpoint, name: str, spec: TensorSpec) -> None:
    info = _info(checkpoint, name, spec[1])
    if (info.dtype, info.shape) != spec:
        raise CheckpointError(
            f"{info.file.name}: {name} is {_shown((info.dtype, info.shape))}; config.json needs {_shown(spec)}"
        )


def _info(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> TensorInfo:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise CheckpointError(
            f"{checkpoint.directory.name}: {name} {list(shape)} is missing from the checkpoint; pull it again"
        )
    return info


def _shown(spec: TensorSpec) -> str:
    return f"{str(spec[0]).removeprefix('torch.')} {list(spec[1])}"


def _is_extra(config: ModelConfig, name: str) -> bool:
    """Whether a tensor may be there although the main model does not use it."""
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return True
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    layer = _LAYER.match(name)
    if layer is None:
        return False
    # some configs say nothing of the one MTP layer that their checkpoint carries
    past_last = int(layer[1]) - config.num_hidden_layers
    return 0 <= past_last < max(1, config.num_nextn_predict_layers)
