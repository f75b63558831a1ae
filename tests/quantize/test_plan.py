import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from localmoe.errors import CheckpointError, UnsupportedModelError, UsageError
from localmoe.formats.scheme import QuantizationConfig, Scheme
from localmoe.model.config import ModelConfig
from quantize.plan import MODEL_TYPES, Plan, plan
from quantize.recipes import RECIPES, part_of, recipe_named
from quantize.sources import SourceReader, open_source

INT4, INT8, NF4 = Scheme("int4", 32), Scheme("int8", 32), Scheme("nf4", 64)

# What each recipe makes of a module: DESIGN's table, spelled out.
DENSE = {"balanced": INT8, "local": INT8, "compact": INT4, "smallest": INT4, "int8": INT8, "nf4": INT8}
KV_B = {"local": INT8, "compact": INT8, "smallest": INT8, "int8": INT8}
ENDS = {**KV_B, "smallest": INT4}
EXPERTS = dict.fromkeys(("balanced", "experts-only", "local", "compact", "smallest"), INT4) | {"int8": INT8, "nf4": NF4}
EXPECTED: dict[str, dict[str, Scheme]] = {
    "model.layers.1.mlp.experts.3.gate_proj": EXPERTS,
    "model.layers.2.mlp.experts.0.down_proj": EXPERTS,
    "model.layers.1.mlp.shared_experts.up_proj": DENSE,
    "model.layers.0.mlp.down_proj": DENSE,
    "model.layers.0.self_attn.q_proj": DENSE,
    "model.layers.0.self_attn.q_a_proj": DENSE,
    "model.layers.0.self_attn.q_b_proj": DENSE,
    "model.layers.0.self_attn.kv_a_proj_with_mqa": DENSE,
    "model.layers.2.self_attn.o_proj": DENSE,
    "model.layers.0.self_attn.kv_b_proj": KV_B,
    "lm_head": ENDS,
    "model.layers.2.shared_head.head": ENDS,
    "model.embed_tokens": ENDS,
    "model.layers.2.embed_tokens": ENDS,
    "model.layers.1.mlp.gate": {},
    "model.layers.2.eh_proj": {},
}


def planned(source: Path, recipe: str, group_size: int = 32) -> Plan:
    with open_source(source) as checkpoint, SourceReader(checkpoint) as reader:
        return plan(reader, recipe_named(recipe), group_size)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("module", EXPECTED)
def test_recipes_give_each_part_its_bits(recipe: str, module: str) -> None:
    expected = EXPECTED[module].get(recipe)
    part = part_of(module)
    assert (RECIPES[recipe].scheme(part, 32) if part else None) == expected
    config = RECIPES[recipe].quantization_config(32)
    assert config.scheme_for(module) == expected
    assert QuantizationConfig.from_dict(config.to_dict()).scheme_for(module) == expected


@pytest.mark.parametrize("recipe", ["balanced", "experts-only", "local", "compact", "smallest", "int8"])
def test_groups_keep_to_what_other_engines_need(recipe: str) -> None:
    config = RECIPES[recipe].quantization_config(64)
    assert config.groups[-1].targets == ("Linear",)
    for group in config.groups[:-1]:
        assert all(target.startswith("re:") and "experts" not in target for target in group.targets)
    assert ("lm_head" in config.ignore) == (recipe in ("balanced", "experts-only"))
    assert {group.scheme.group_size for group in config.groups} == {64}


def test_unknown_recipe() -> None:
    with pytest.raises(
        UsageError, match="unknown recipe 'q4_k_m': the recipes are balanced, experts-only, local, compact, smallest"
    ):
        recipe_named("q4_k_m")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_config_says_of_every_matrix_what_was_planned(
    make_source: Callable[..., Path], recipe: str, group_size: int
) -> None:
    decided = planned(make_source(), recipe, group_size)
    config = QuantizationConfig.from_dict(decided.config["quantization_config"])
    for job in decided.jobs:
        if len(job.source.shape) == 2:
            assert config.scheme_for(job.source.name.removesuffix(".weight")) == job.scheme


def test_rows_that_the_group_does_not_divide_stay_and_are_named(make_source: Callable[..., Path]) -> None:
    decided = planned(make_source(), "balanced", 64)
    jobs = {job.source.name: job for job in decided.jobs}
    stays, goes = "model.layers.1.mlp.experts.0.down_proj.weight", "model.layers.1.self_attn.q_b_proj.weight"
    assert jobs[stays].action == "copy"  # rows of 96
    assert jobs[goes].scheme == Scheme("int8", 64)  # rows of 64
    assert (
        "model.layers.*.mlp.experts.*.down_proj (8 of them) stays unquantized: its rows of 96 are not a multiple of 64"
        in decided.notes
    )
    ignored = decided.config["quantization_config"]["ignore"]
    assert r"re:model\.layers\.\d+\.mlp\.experts\.\d+\.down_proj$" in ignored


def test_what_other_engines_cannot_load_packed_stays(make_source: Callable[..., Path]) -> None:
    module = "model.layers.0.mlp.down_proj"  # rows of 288 = 2.25 x 128
    source = make_source()
    kept = {recipe: {job.unit.name: job.scheme for job in planned(source, recipe).jobs} for recipe in RECIPES}
    assert kept["balanced"][f"{module}.weight"] is None
    assert kept["compact"][module] == Scheme("int4", 32)
    assert all(kept[recipe][module] == INT8 for recipe in ("local", "int8", "nf4"))
    assert kept["balanced"]["model.layers.1.mlp.shared_experts.down_proj"] == Scheme("int8", 32)
    note = "model.layers.*.mlp.down_proj (1 of them) stays unquantized: its rows of 288 are not a multiple of 128"
    assert f"{note}, which SGLang needs" in planned(source, "balanced").notes
    assert RECIPES["balanced"].for_model({"intermediate_size": 18432}) == RECIPES["balanced"]


def test_equal_copies_of_embedding_and_head_are_dropped(make_source: Callable[..., Path]) -> None:
    decided = planned(make_source(), "balanced")
    names = {job.source.name for job in decided.jobs}
    assert "model.layers.2.embed_tokens.weight" not in names
    assert "model.layers.2.shared_head.head.weight" not in names
    assert "model.layers.2.eh_proj.weight" in names
    assert "model.layers.2.embed_tokens.weight equals model.embed_tokens.weight and is left out" in decided.notes


def test_other_embeddings_of_the_mtp_layer_are_kept(make_source: Callable[..., Path]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.2.embed_tokens.weight"][-1, -1] += 1
        tensors["model.layers.2.shared_head.head.weight"][0, 0] += 1

    actions = {job.source.name: job for job in planned(make_source(change=change), "compact").jobs}
    assert actions["model.layers.2.embed_tokens.weight"].scheme == INT8
    assert actions["model.layers.2.shared_head.head.weight"].scheme == INT8


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_embedding_and_head_in_one_stays(make_source: Callable[..., Path], recipe: str) -> None:
    decided = planned(make_source(tie_word_embeddings=True), recipe)
    jobs = {job.source.name: job for job in decided.jobs}
    config = QuantizationConfig.from_dict(decided.config["quantization_config"])
    for module in ("lm_head", "model.embed_tokens"):
        assert jobs[f"{module}.weight"].action == "copy"
        assert config.scheme_for(module) is None
        assert not any(note.startswith(module) for note in decided.notes)


def test_only_int4_is_calibrated() -> None:
    calibrated = {name for name, recipe in RECIPES.items() if recipe.calibrates}
    assert calibrated == {"balanced", "experts-only", "local", "compact", "smallest"}


def test_unknown_matrices_are_carried_and_ignored(make_source: Callable[..., Path]) -> None:
    source = make_source(change=lambda tensors: tensors.update({"model.adapter.weight": torch.ones(8, 32)}))
    decided = planned(source, "balanced")
    assert "model.adapter" in decided.config["quantization_config"]["ignore"]


def test_config_keeps_the_source_but_for_what_no_longer_holds(make_source: Callable[..., Path]) -> None:
    source = make_source(dtype="fp8", torch_dtype="float8_e4m3fn")
    before = json.loads((source / "config.json").read_text())
    after = planned(source, "balanced").config
    assert after["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "auto_map" not in after
    assert after["torch_dtype"] == "bfloat16"
    same = before.keys() - {"auto_map", "quantization_config", "torch_dtype"}
    assert {key: after[key] for key in same} == {key: before[key] for key in same}
    assert ModelConfig.from_dict(after).num_hidden_layers == 2


def test_model_types_are_those_the_engine_runs(make_source: Callable[..., Path]) -> None:
    source = make_source()
    config = json.loads((source / "config.json").read_text())
    with pytest.raises(UnsupportedModelError, match=f"localmoe runs {', '.join(MODEL_TYPES)}"):
        ModelConfig.from_dict(config | {"model_type": "mixtral"})
    (source / "config.json").write_text(json.dumps(config | {"model_type": "mixtral"}))
    with pytest.raises(UnsupportedModelError, match="model_type 'mixtral' is not supported"):
        planned(source, "balanced")


def test_layout_is_in_model_order(make_source: Callable[..., Path]) -> None:
    names = [job.source.name for job in planned(make_source(), "balanced").jobs]
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)


def test_a_name_that_patterns_cannot_tell_apart_is_refused(make_source: Callable[..., Path]) -> None:
    name = "model.layers.1.mlp.experts.0.gate_proj\n.weight"
    source = make_source(change=lambda tensors: tensors.update({name: torch.ones(8, 32)}))
    with pytest.raises(CheckpointError, match="is not a tensor name"):
        planned(source, "balanced")
