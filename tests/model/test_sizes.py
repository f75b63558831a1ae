"""Bytes from a config alone: equal to real files' to the byte, and to sums done by hand for the published models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import localmoe.errors
from localmoe.errors import UnsupportedModelError
from localmoe.formats.checkpoint import Checkpoint
from localmoe.memory import MemoryNeeds
from localmoe.model.config import ModelConfig
from localmoe.model.shapes import layer_modules, layer_tensors
from localmoe.model.sizes import ModelSizes, Storage, model_sizes
from quantize.pipeline import quantize
from quantize.recipes import RECIPES

DEMO = Path(localmoe.errors.__file__).parent / "data" / "demo"
CONFIGS = Path(__file__).parents[1] / "configs"


def published(name: str, recipe: str, group_size: int = 32) -> tuple[ModelConfig, ModelSizes]:
    values = json.loads((CONFIGS / f"{name}.json").read_text())
    config = ModelConfig.from_dict(values)
    storage = Storage.of(values, RECIPES[recipe].quantization_config(group_size))
    return config, model_sizes(config, storage)


def assert_equal_to_files(sizes: ModelSizes, directory: Path) -> None:
    """Every sum against the headers of the safetensors files."""
    with Checkpoint.open(directory) as checkpoint:
        config = ModelConfig.from_dict(checkpoint.config)
        tensors = checkpoint.tensors.values()
        assert sizes.nbytes == sum(info.nbytes for info in tensors)
        needs = MemoryNeeds.of(config, tensors, 1)
        assert (sizes.always, sizes.experts) == (needs.always, needs.experts)
        for index, layer in enumerate(sizes.layers):
            found = {
                part: sum(info.nbytes for info in tensors if info.name.startswith(f"model.layers.{index}.{part}"))
                for part in ("", "mlp.experts.", "mlp.experts.0.", "self_attn.", "input_layernorm.", "post_attention")
            }
            bias = sum(i.nbytes for i in tensors if i.name == f"model.layers.{index}.mlp.gate.e_score_correction_bias")
            assert layer.experts_nbytes == found["mlp.experts."]
            assert layer.expert.nbytes == found["mlp.experts.0."]
            assert layer.attention.nbytes == (
                found["self_attn."] + found["input_layernorm."] + found["post_attention"] + bias
            )
            assert layer.always + layer.experts_nbytes == found[""]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("group_size", [32, 128])
def test_the_demo_quantized_to_the_byte(tmp_path: Path, recipe: str, group_size: int) -> None:
    quantize(DEMO, tmp_path / "artifact", recipe, group_size=group_size, grid="absmax")
    source = json.loads((DEMO / "config.json").read_text())
    config = ModelConfig.from_dict(source)
    foreseen = model_sizes(config, Storage.of(source, RECIPES[recipe].quantization_config(group_size)))
    assert_equal_to_files(foreseen, tmp_path / "artifact")
    own = json.loads((tmp_path / "artifact" / "config.json").read_text())
    assert model_sizes(config, Storage.of(own)) == foreseen


def test_the_demo_as_it_ships_to_the_byte() -> None:
    source = json.loads((DEMO / "config.json").read_text())
    assert_equal_to_files(model_sizes(ModelConfig.from_dict(source), Storage.of(source)), DEMO)


BASE: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 96, "hidden_size": 160, "intermediate_size": 288,
    "moe_intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "n_shared_experts": 1,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5,
    "kv_lora_rank": 32, "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
    "first_k_dense_replace": 1, "max_position_embeddings": 64, "torch_dtype": "bfloat16",
}  # fmt: skip
V2 = {"model_type": "deepseek_v2", "topk_method": "greedy", "q_lora_rank": None, "n_shared_experts": 2}


def random_source(directory: Path, values: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(values)
    dtype = getattr(torch, values["torch_dtype"])
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    shapes["model.norm.weight"] = (config.hidden_size,)
    for layer, is_moe in enumerate((*config.moe_layers, *[True] * config.num_nextn_predict_layers)):
        shapes |= dict(layer_tensors(config, layer, is_moe))
        shapes |= {f"{module}.weight": shape for module, shape in layer_modules(config, layer, is_moe)}
        if layer >= config.num_hidden_layers:
            ends = dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (config.hidden_size,))
            shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in ends.items()}
            shapes[f"model.layers.{layer}.eh_proj.weight"] = (config.hidden_size, 2 * config.hidden_size)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    bias = [name for name in tensors if name.endswith("e_score_correction_bias")]
    tensors |= {name: tensors[name].float() for name in bias}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "recipe", "group_size"),
    [
        ({}, "balanced", 32),
        ({"num_nextn_predict_layers": 1}, "compact", 32),
        ({}, "compact", 64),  # 64 does not divide 160, 96, 288: much stays as it was
        ({}, "local", 32),
        ({}, "smallest", 32),
        ({"num_nextn_predict_layers": 1}, "int8", 32),
        ({"tie_word_embeddings": True}, "local", 32),
        ({}, "nf4", 32),  # nor does NF4's block
        (V2, "balanced", 32),
        (V2 | {"torch_dtype": "float32", "tie_word_embeddings": True}, "experts-only", 32),
        ({"model_type": "glm4_moe_lite", "torch_dtype": "float16", "attention_bias": True}, "compact", 32),
        ({"n_shared_experts": 0, "first_k_dense_replace": 0}, "balanced", 32),
    ],
)
def test_random_checkpoints_to_the_byte(tmp_path: Path, changes: dict[str, Any], recipe: str, group_size: int) -> None:
    values = BASE | changes
    random_source(tmp_path / "source", values)
    config = ModelConfig.from_dict(values)
    if not config.num_nextn_predict_layers:
        assert_equal_to_files(model_sizes(config, Storage.of(values)), tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "artifact", recipe, group_size=group_size, grid="absmax")
    stored = RECIPES[recipe].for_model(values).quantization_config(group_size)
    foreseen = model_sizes(config, Storage.of(values, stored))
    assert_equal_to_files(foreseen, tmp_path / "artifact")
    own = json.loads((tmp_path / "artifact" / "config.json").read_text())
    assert model_sizes(config, Storage.of(own)) == foreseen


def test_v3_by_hand() -> None:
    _, sizes = published("deepseek-v3", "balanced")
    # an expert is 3 x 7168 x 2048 weights of 4 bits and a bf16 scale for 32, and three weight_shapes of 16 bytes
    weights = 3 * 7168 * 2048
    assert sizes.expert == weights * 4 // 8 + weights // 32 * 2 + 3 * 16 == 24_772_656
    assert sizes.experts == 58 * 256 * 24_772_656
    assert sum(layer.experts for layer in sizes.layers) == 58 * 256
    # attention: q_a, q_b, kv_a, o in int8 (1.0625 bytes a weight), kv_b in bf16, four norms and the router's bias
    int8 = 1536 * 7168 + 128 * 192 * 1536 + 576 * 7168 + 7168 * 128 * 128
    norms = 2 * (2 * 7168 + 512 + 1536)
    attention = int8 * 17 // 16 + 4 * 16 + 2 * 128 * 256 * 512 + norms
    assert sizes.layers[0].attention.nbytes == attention
    assert sizes.layers[3].attention.nbytes == attention + 4 * 256
    assert sizes.layers[3].mlp.nbytes == weights * 17 // 16 + 48 + 2 * 256 * 7168  # shared expert, router
    dense = 3 * 7168 * 18432
    assert sizes.layers[0].mlp.nbytes == dense * 17 // 16 + 48
    assert sizes.head.nbytes == 2 * 129280 * 7168 + 2 * 7168
    assert sizes.embedding == 2 * 129280 * 7168
    assert 18.5e9 < sizes.always < 19.5e9
    assert 390e9 < sizes.nbytes < 400e9
    assert published("deepseek-r1", "balanced")[1] == sizes


def test_v3_as_its_makers_ship_it() -> None:
    values = json.loads((CONFIGS / "deepseek-v3.json").read_text())
    sizes = model_sizes(ModelConfig.from_dict(values), Storage.of(values))
    # 688,586,727,753 bytes on the hub, headers of 163 files among them (about 12 MB)
    assert 688.5e9 < sizes.nbytes < 688.7e9


def test_v2_lite_by_hand() -> None:
    _, sizes = published("deepseek-v2-lite", "compact")
    weights = 3 * 2048 * 1408
    assert sizes.expert == weights * 9 // 16 + 48
    head = 102400 * 2048 * 17 // 16 + 16 + 2 * 2048  # int8, and the final norm
    assert sizes.head.nbytes == head
    # int4 (9/16 bytes a weight), kv_b int8 and bf16 vectors; 4 or 3 matrices of 16 bytes besides
    attention = (16 * 192 * 2048 + 576 * 2048 + 2048 * 2048) * 9 // 16 + 3 * 16
    attention += 16 * 256 * 512 * 17 // 16 + 16 + 2 * (2 * 2048 + 512)
    mlp = 26 * (2 * weights * 9 // 16 + 48 + 2 * 64 * 2048) + 3 * 2048 * 10944 * 9 // 16 + 48
    assert sizes.always == head + 27 * attention + mlp
    assert sizes.embedding == 102400 * 2048 * 17 // 16 + 16
    assert sizes.nbytes == sizes.always + 26 * 64 * sizes.expert + sizes.embedding
    values = json.loads((CONFIGS / "deepseek-v2-lite.json").read_text())
    source = model_sizes(ModelConfig.from_dict(values), Storage.of(values))
    assert source.nbytes == 2 * 15_706_484_224  # the parameters of its model card, 15.7 B


def test_glm_by_hand() -> None:
    _, sizes = published("glm-4.7-flash", "balanced")
    assert sizes.expert == 3 * 2048 * 1536 * 9 // 16 + 48
    assert len(sizes.layers) == 47
    assert sizes.layers[0].experts == 0
    assert sizes.mtp > 64 * sizes.expert
    assert 17.5e9 < sizes.nbytes < 19.5e9


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"torch_dtype": "int8"}, "torch_dtype"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method"),
        ({"quantization_config": "yes"}, "not an object"),
    ],
)
def test_other_forms_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        Storage.of(values)
