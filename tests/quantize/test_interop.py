"""What we write, transformers and compressed-tensors load unchanged: the same numbers, the same logits.

But for those whose embedding is packed (`local`, `compact`, `smallest`, `int8`): transformers 5.23 loads them only
after the fixture here lets it skip the first values of an embedding that has no plain weight.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig as TheirQuantizationConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

import localmoe
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.weights import dequantize

LAYERS, EXPERTS = 5, 16
RECIPES = ("balanced", "experts-only", "local", "compact", "smallest", "int8")
PACKED_EMBEDDING = ("local", "compact", "smallest", "int8")
first_values = PreTrainedModel._init_weights


def unless_packed(self: PreTrainedModel, module: torch.nn.Module) -> None:
    """`_init_weights`, which asks linears but no embeddings whether they have a weight at all."""
    if not (isinstance(module, torch.nn.Embedding) and getattr(module, "weight", None) is None):
        first_values(self, module)


@pytest.fixture(scope="module", params=RECIPES)
def loaded(request: pytest.FixtureRequest, demo_artifacts: Callable[..., Path]) -> tuple[Path, Any, dict[str, Any]]:
    """(our directory, transformers' model after a first forward pass, which decompresses it, what loading reported)."""
    directory = demo_artifacts(request.param)
    with pytest.MonkeyPatch.context() as patch:
        if request.param in PACKED_EMBEDDING:
            patch.setattr(PreTrainedModel, "_init_weights", unless_packed)
        model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    with torch.no_grad():
        model(torch.tensor([[0, 5, 6]]))
    return directory, model, report


def expert_matrices(checkpoint: Checkpoint, layer: int, expert: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(gate and up stacked, down), as transformers fuses them."""
    gate, up, down = (
        dequantize(checkpoint.weight(f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj"), dtype)
        for name in ("gate", "up", "down")
    )
    return torch.cat([gate, up]), down


def test_no_key_is_missing_and_only_the_mtp_layers_are_unexpected(loaded: tuple[Path, Any, dict[str, Any]]) -> None:
    report = loaded[2]
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert report["unexpected_keys"]
    assert all(key.startswith(f"model.layers.{LAYERS}.") for key in report["unexpected_keys"])


def test_weights_are_equal_to_the_bit(loaded: tuple[Path, Any, dict[str, Any]]) -> None:
    """Linears are float32 there; experts are held in the dtype of their scales, bfloat16: ours, rounded to it."""
    directory, model, _ = loaded
    compared = 0
    with Checkpoint.open(directory) as checkpoint:
        for module in checkpoint.modules():
            if ".mlp.experts." in module or module.startswith(f"model.layers.{LAYERS}."):
                continue
            found = model.get_submodule(module).weight
            if found.ndim == 2:
                assert torch.equal(found, dequantize(checkpoint.weight(module))), module
                compared += 1
        for layer in range(1, LAYERS):
            experts = model.model.layers[layer].mlp.experts
            for expert in range(EXPERTS):
                gate_up, down = expert_matrices(checkpoint, layer, expert, experts.down_proj.dtype)
                assert torch.equal(experts.gate_up_proj[expert], gate_up)
                assert torch.equal(experts.down_proj[expert], down)
                compared += 3
    assert compared == 2 + LAYERS * 5 + 3 + (LAYERS - 1) * (1 + 3 + 3 * EXPERTS)


def test_logits_equal_the_engines(loaded: tuple[Path, Any, dict[str, Any]]) -> None:
    """In float32 throughout: the experts that transformers rounded to bfloat16 are given back their last bits."""
    directory, model, _ = loaded
    with localmoe.load(directory, kernels="reference") as engine:
        ids = engine.tokenizer.encode("The goat sat on the drum. " * 12, add_bos=True)
        ours = engine.logits(ids)
    with Checkpoint.open(directory) as checkpoint, torch.no_grad():
        for layer in range(1, LAYERS):
            experts = model.model.layers[layer].mlp.experts
            pairs = [expert_matrices(checkpoint, layer, expert, torch.float32) for expert in range(EXPERTS)]
            experts.gate_up_proj.data = torch.stack([gate_up for gate_up, _ in pairs])
            experts.down_proj.data = torch.stack([down for _, down in pairs])
        theirs = model(torch.tensor([ids])).logits[0]
    assert len(ids) > 80
    assert (ours - theirs).abs().max() < 1e-3
    assert theirs.abs().max() > 5


@pytest.mark.parametrize("recipe", PACKED_EMBEDDING)
def test_as_it_is_transformers_does_not_load_a_packed_embedding(
    recipe: str, demo_artifacts: Callable[..., Path]
) -> None:
    """Once it does, what `show --serving`, the model card and the README say of these recipes can go."""
    with pytest.raises(AttributeError, match="'Embedding' object has no attribute 'weight'"):
        AutoModelForCausalLM.from_pretrained(demo_artifacts(recipe))


@pytest.mark.parametrize("recipe", ["local", "int8"])
def test_dequantized_at_loading_they_are_rounded_to_bfloat16(recipe: str, demo_artifacts: Callable[..., Path]) -> None:
    """`compact` does not load so: transformers takes one scheme for all that is no routed expert."""
    how = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(demo_artifacts(recipe), dtype=torch.float32, quantization_config=how)
    with Checkpoint.open(demo_artifacts(recipe)) as checkpoint:
        for module in ("model.embed_tokens", "lm_head", "model.layers.2.self_attn.o_proj"):
            ours = dequantize(checkpoint.weight(module), torch.bfloat16)
            assert torch.equal(model.get_submodule(module).weight, ours.float()), module


@pytest.mark.parametrize("recipe", RECIPES)
def test_compressed_tensors_reads_the_config_as_we_do(recipe: str, demo_artifacts: Callable[..., Path]) -> None:
    with Checkpoint.open(demo_artifacts(recipe)) as checkpoint:
        parsed = TheirQuantizationConfig.model_validate(checkpoint.config["quantization_config"])
        assert parsed.format == "pack-quantized"
        assert checkpoint.quantization is not None
        ours = [(group.scheme.bits, group.scheme.group_size) for group in checkpoint.quantization.groups]
    groups = parsed.config_groups.values()
    assert [(group.weights.num_bits, group.weights.group_size) for group in groups] == ours
    assert all(group.weights.symmetric and group.input_activations is None for group in groups)
