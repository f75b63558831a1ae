"""The whole model: the demo against transformers, the cache's life, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from localmoe.errors import ContextOverflowError, InputError
from localmoe.formats import int8
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.weights import DenseWeight, Int8Weight, Weight, dequantize
from localmoe.kernels.dispatch import Kernels
from localmoe.model.config import ModelConfig
from localmoe.model.deepseek import Model
from localmoe.model.kv_cache import LatentCache
from localmoe.offload.experts import ExpertStore


@pytest.fixture(scope="module")
def demo() -> Iterator[Checkpoint]:
    with as_file(files("localmoe.data").joinpath("demo")) as directory, Checkpoint.open(directory) as checkpoint:
        yield checkpoint


class Changed:
    """A checkpoint with some tensors and weights replaced."""

    def __init__(self, checkpoint: Checkpoint, *, tensors: Any = (), weights: Any = ()) -> None:
        self.checkpoint, self.tensors, self.weights = checkpoint, dict(tensors), dict(weights)

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name] if name in self.tensors else self.checkpoint.tensor(name)

    def weight(self, module: str) -> Weight:
        return self.weights[module] if module in self.weights else self.checkpoint.weight(module)

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint


def tokens(count: int, vocabulary: int = 211, seed: int = 0) -> Tensor:
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


def test_the_demo_equals_transformers_on_independently_dequantized_weights(
    demo: Checkpoint, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    from transformers import AutoModelForCausalLM

    dense = {}
    for name in demo.tensors:
        if name.startswith("model.layers.5.") or name.endswith("_scale_inv"):
            continue
        value = demo.read(name)
        if value.dtype == torch.float8_e4m3fn:
            scale = demo.read(f"{name}_scale_inv").repeat_interleave(128, 0).repeat_interleave(128, 1)
            value = value.float() * scale[: value.shape[0], : value.shape[1]]
        dense[name] = value.float().contiguous()
    save_file(dense, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in demo.config.items() if key != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    token_ids = tokens(200, 4096)
    with torch.no_grad():
        wanted = theirs(token_ids[None]).logits[0]

    model_config = ModelConfig.from_dict(demo.config)
    kernels = Kernels.choose("reference")
    model = Model(model_config, demo, kernels, ExpertStore(demo, model_config, kernels).layer)
    cache = LatentCache(model_config, 512)
    parts = [model.forward(token_ids[start : start + 61], cache) for start in range(0, 183, 61)]
    parts += [model.forward(token_ids[i : i + 1], cache) for i in range(183, 200)]
    ours = torch.cat(parts)
    error = float((ours - wanted).abs().max() / wanted.abs().max())
    record_property("relative_error", error)
    assert error < 1e-4
    assert torch.equal(ours.argmax(dim=1), wanted.argmax(dim=1))


def test_truncate_then_continue_equals_a_fresh_run(transformers_model: Callable[..., Any]) -> None:
    opened = transformers_model(seed=1)
    model, cache = opened.ours(), opened.cache()
    common, wrong, right = tokens(40, seed=1), tokens(30, seed=2), tokens(25, seed=3)
    model.forward(common, cache)
    model.forward(wrong, cache)
    cache.truncate(40)
    resumed = model.forward(right, cache)
    fresh_cache = opened.cache()
    model.forward(common, fresh_cache)
    fresh = model.forward(right, fresh_cache)
    assert torch.equal(resumed, fresh)
    # Passes of other lengths: BLAS may add the same products in another order, on some machines
    cache.truncate(0)
    model.forward(torch.cat((common, wrong)), cache)
    cache.truncate(40)
    inside = model.forward(right, cache)
    whole = model.forward(torch.cat((common, right)), opened.cache())[40:]
    for other in (inside, whole):
        assert float((resumed - other).abs().max() / other.abs().max()) < 1e-5


def test_last_only_is_the_last_row(transformers_model: Callable[..., Any]) -> None:
    opened = transformers_model(seed=2)
    model = opened.ours()
    every = model.forward(tokens(20), opened.cache())
    last = model.forward(tokens(20), opened.cache(), last_only=True)
    assert every.shape == (20, 211)
    assert every.dtype == torch.float32
    torch.testing.assert_close(last, every[-1:], rtol=1e-5, atol=1e-5)


def test_an_interrupted_pass_leaves_the_cache_as_it_was(transformers_model: Callable[..., Any]) -> None:
    opened = transformers_model(seed=3)
    kernels = Kernels.choose("reference")
    store = ExpertStore(opened.checkpoint, opened.config, kernels)
    stop_in: list[int] = []

    def stoppable(layer: int) -> Any:
        experts = store.layer(layer)

        def run(*args: Tensor) -> Tensor:
            if layer in stop_in:
                raise KeyboardInterrupt
            return experts(*args)

        return run

    model, cache = Model(opened.config, opened.checkpoint, kernels, stoppable), opened.cache()
    model.forward(tokens(30, seed=4), cache)
    stop_in.append(2)
    with pytest.raises(KeyboardInterrupt):
        model.forward(tokens(300, seed=5), cache)  # layers 0 to 2 have grown, layer 3 has not
    stop_in.clear()
    assert cache.length == 30
    resumed = model.forward(tokens(9, seed=6), cache)
    fresh_cache = opened.cache()
    model.forward(tokens(30, seed=4), fresh_cache)
    assert torch.equal(resumed, model.forward(tokens(9, seed=6), fresh_cache))


@pytest.mark.parametrize(("ids", "message"), [([], "no token"), ([5, 211], "vocabulary of 211"), ([-1], "vocabulary")])
def test_bad_tokens_are_refused(transformers_model: Callable[..., Any], ids: list[int], message: str) -> None:
    opened = transformers_model()
    cache = opened.cache()
    with pytest.raises(InputError, match=message):
        opened.ours().forward(torch.tensor(ids, dtype=torch.int64), cache)
    assert cache.length == 0


def test_a_full_cache_is_refused(transformers_model: Callable[..., Any]) -> None:
    opened = transformers_model()
    model, cache = opened.ours(), opened.cache(capacity=10)
    model.forward(tokens(8), cache)
    with pytest.raises(ContextOverflowError, match="10 tokens and 11"):
        model.forward(tokens(3), cache)
    assert cache.length == 8


def test_bf16_weights_are_computed_in_float32(transformers_model: Callable[..., Any], tmp_path: Path) -> None:
    """A bf16 checkpoint gives what a float32 one with the same numbers gives, bias and norms included."""
    opened = transformers_model(seed=8)
    with torch.no_grad():
        for name, parameter in opened.theirs.named_parameters():
            assert "e_score" not in name
            parameter.copy_(parameter.bfloat16().float())
    logits = opened.their_logits(tokens(40))
    half = tmp_path / "half"
    opened.theirs.bfloat16().save_pretrained(half)
    checkpoint = Checkpoint.open(half)
    assert checkpoint.tensors["lm_head.weight"].dtype == torch.bfloat16
    # transformers' own cast also rounded the bias, which published checkpoints keep in float32: use the original
    biases = {name: opened.checkpoint.tensor(name) for name in checkpoint.tensors if name.endswith("correction_bias")}

    source, kernels = Changed(checkpoint, tensors=biases), Kernels.choose("reference")
    model = Model(opened.config, source, kernels, ExpertStore(source, opened.config, kernels).layer)
    ours = model.forward(tokens(40), opened.cache())
    assert float((ours - logits).abs().max() / logits.abs().max()) < 1e-4


def test_an_int8_kv_b_is_used_with_the_numbers_it_stands_for(transformers_model: Callable[..., Any]) -> None:
    opened = transformers_model(seed=9, kv_lora_rank=32)
    packed, dense = {}, {}
    for layer in range(opened.config.num_hidden_layers):
        module = f"model.layers.{layer}.self_attn.kv_b_proj"
        matrix = opened.checkpoint.tensor(f"{module}.weight")
        scale = (matrix.abs().amax(dim=1, keepdim=True) / 127).bfloat16()  # one group of 32 a row
        packed[module] = Int8Weight(int8.pack(int8.quantize(matrix, scale, 32)), scale, 32)
        dense[module] = DenseWeight(dequantize(packed[module]))
        assert not torch.equal(dense[module].tensor, matrix)
    kernels = Kernels.choose("reference")
    logits = []
    for weights in (packed, dense):
        source = Changed(opened.checkpoint, weights=weights)
        model = Model(opened.config, source, kernels, ExpertStore(source, opened.config, kernels).layer)
        cache = opened.cache()
        parts = [model.forward(tokens(20), cache), model.forward(tokens(1), cache)]  # both paths
        logits.append(torch.cat(parts))
    assert torch.equal(logits[0], logits[1])
