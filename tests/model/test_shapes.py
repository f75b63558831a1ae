"""A checkpoint's headers against the config: each defect names its tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.resources import as_file, files
from typing import Any

import pytest
import torch

from localmoe.errors import CheckpointError
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.scheme import QuantizationConfig, Scheme, SchemeGroup
from localmoe.model.config import ModelConfig
from localmoe.model.shapes import check_checkpoint, expected_modules, expected_tensors


@pytest.fixture
def demo() -> Iterator[Checkpoint]:
    with as_file(files("localmoe.data").joinpath("demo")) as directory, Checkpoint.open(directory) as checkpoint:
        yield checkpoint


def changed(demo: Checkpoint, name: str, **changes: Any) -> Checkpoint:
    tensors = {**demo.tensors, name: replace(demo.tensors[name], **changes)}
    return Checkpoint(demo.directory, demo.config, tensors)


def without(demo: Checkpoint, name: str) -> Checkpoint:
    tensors = {key: info for key, info in demo.tensors.items() if key != name}
    return Checkpoint(demo.directory, demo.config, tensors)


def test_the_demo_has_what_its_config_says_and_its_mtp_layer_besides(demo: Checkpoint) -> None:
    config = ModelConfig.from_dict(demo.config)
    check_checkpoint(config, demo)
    modules = expected_modules(config)
    expected = {f"{module}.weight" for module in modules} | set(expected_tensors(config))
    left = {name for name in demo.tensors if name not in expected and not name.endswith("_scale_inv")}
    assert left
    assert {name.split(".")[2] for name in left} == {str(config.num_hidden_layers)}
    assert modules["model.layers.0.mlp.gate_proj"] == (640, 256)
    assert modules["model.layers.1.mlp.experts.15.down_proj"] == (256, 128)
    assert modules["model.layers.4.self_attn.kv_b_proj"] == (384, 128)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.3.mlp.gate.e_score_correction_bias",
        "model.layers.3.mlp.experts.7.up_proj.weight",
        "model.layers.3.mlp.experts.7.up_proj.weight_scale_inv",
        "model.layers.4.self_attn.q_a_layernorm.weight",
    ],
)
def test_a_missing_tensor_is_named(demo: Checkpoint, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{name}\b.*missing"):
        check_checkpoint(ModelConfig.from_dict(demo.config), without(demo, name))


@pytest.mark.parametrize(
    ("name", "changes", "found", "wanted"),
    [
        ("model.norm.weight", {"shape": (255,)}, r"\[255\]", r"\[256\]"),
        ("model.norm.weight", {"dtype": torch.int64}, "int64", r"float32 \[256\]"),
        ("lm_head.weight", {"shape": (256, 4096)}, r"\[256, 4096\]", r"\[4096, 256\]"),
        ("lm_head.weight", {"dtype": torch.int8}, "int8", "float32"),
        ("model.layers.2.mlp.experts.0.gate_proj.weight", {"shape": (128, 128)}, r"\[128, 128\]", r"\[128, 256\]"),
        ("model.layers.2.mlp.experts.0.gate_proj.weight_scale_inv", {"shape": (2, 1)}, r"\[2, 1\]", r"\[1, 2\]"),
    ],
)
def test_a_wrong_shape_names_found_and_wanted(
    demo: Checkpoint, name: str, changes: dict[str, Any], found: str, wanted: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"{name} is .*{found}.*; config.json needs .*{wanted}"):
        check_checkpoint(ModelConfig.from_dict(demo.config), changed(demo, name, **changes))


def test_a_tensor_of_other_maths_is_refused(demo: Checkpoint) -> None:
    config = ModelConfig.from_dict(demo.config)
    some = demo.tensors["model.norm.weight"]
    for name in ("model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.o_proj.bias",
                 "model.layers.8.input_layernorm.weight", "vision.weight"):  # fmt: skip
        with pytest.raises(CheckpointError, match=f"{name} is not a tensor of"):
            check_checkpoint(config, Checkpoint(demo.directory, demo.config, {**demo.tensors, name: some}))
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.5.anything"):
        check_checkpoint(config, Checkpoint(demo.directory, demo.config, {**demo.tensors, name: some}))


def test_fewer_layers_than_the_files_hold_are_noticed(demo: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"model\.layers\.5\."):
        check_checkpoint(ModelConfig.from_dict({**demo.config, "num_hidden_layers": 4}), demo)


def test_packed_tensors_are_checked(demo: Checkpoint) -> None:
    config = ModelConfig.from_dict(demo.config)
    quantization = QuantizationConfig(
        (SchemeGroup(Scheme("int4", 32), (r"re:.*mlp\.experts\..*",)),), ("lm_head",)
    ).to_dict()
    some = demo.tensors["model.norm.weight"]
    tensors = {name: info for name, info in demo.tensors.items() if "_scale_inv" not in name}
    tensors = {
        name: replace(info, dtype=torch.bfloat16) if info.dtype == torch.float8_e4m3fn else info
        for name, info in tensors.items()
        if ".experts." not in name and not name.startswith("model.layers.5.")  # without the MTP layer
    }
    for module, shape in expected_modules(config).items():
        if ".experts." in module:
            for name, (dtype, stored) in Scheme("int4", 32).tensors(module, *shape).items():
                tensors[name] = replace(some, name=name, dtype=dtype, shape=stored)
    packed_config = {**demo.config, "quantization_config": quantization}
    check_checkpoint(config, Checkpoint(demo.directory, packed_config, tensors))
    name = "model.layers.1.mlp.experts.3.up_proj.weight_packed"
    tensors[name] = replace(tensors[name], shape=(128, 31))
    with pytest.raises(CheckpointError, match=rf"{name} is int32 \[128, 31\]; config.json needs int32 \[128, 32\]"):
        check_checkpoint(config, Checkpoint(demo.directory, packed_config, tensors))


def test_what_transformers_saves_passes(transformers_model: Callable[..., Any]) -> None:
    opened = transformers_model(attention_bias=True, tie_word_embeddings=True)
    check_checkpoint(opened.config, opened.checkpoint)


def test_an_mtp_layer_is_whole_or_not_there(demo: Checkpoint) -> None:
    config = ModelConfig.from_dict(demo.config)
    for name in ("model.layers.5.hnorm.weight", "model.layers.5.mlp.experts.3.up_proj.weight"):
        with pytest.raises(CheckpointError, match=rf"{name} .* is missing"):
            check_checkpoint(config, without(demo, name))
    for name in ("model.layers.5.embed_tokens.weight", "model.layers.5.shared_head.head.weight"):
        check_checkpoint(config, without(demo, name))  # the main model's are used
