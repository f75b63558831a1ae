"""Layers in one native call: the same as their parts one by one, and the same bits in any batch.

Norms differ from torch's in the order of additions (1e-6 of a number), and by that a rounded activation may land a
step of 1/127 away; so 1 % of the norm of what a layer adds is allowed, and the experts chosen are the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from localmoe.formats import int4, int8
from localmoe.formats.weights import DenseWeight, Int4Weight, Int8Weight, Weight
from localmoe.kernels import cpu, layer
from localmoe.kernels.dispatch import Kernels
from localmoe.kernels.experts import ExpertProducts
from localmoe.model.config import ModelConfig
from localmoe.model.deepseek import Block, Blocks, positions
from localmoe.model.kv_cache import LatentCache
from localmoe.model.rope import Rope
from localmoe.model.shapes import layer_modules, layer_tensors
from localmoe.offload.counts import ExpertCounts
from localmoe.offload.experts import ExpertStore

V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 128, "intermediate_size": 160,
    "moe_intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "max_position_embeddings": 256, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}  # fmt: skip
V2 = V3 | {
    "model_type": "deepseek_v2", "q_lora_rank": None, "n_shared_experts": 2, "n_group": 1, "topk_group": 1,
    "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0,
}  # fmt: skip


class Source:
    """Random weights of one layer: attention and a dense MLP int8, experts int4, one of them float32 if wanted."""

    def __init__(self, config: ModelConfig, layer: int, dense_expert: int | None = None) -> None:
        torch.manual_seed(11)
        self.weights = {
            name: self._stored(name, shape, dense_expert)
            for name, shape in layer_modules(config, layer, bool(config.moe_layers[layer]))
        }
        self.tensors = {
            name: self._plain(name, shape)
            for name, shape in layer_tensors(config, layer, bool(config.moe_layers[layer]))
        }

    @staticmethod
    def _plain(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith(".gate.weight"):
            return (torch.randn(shape) / shape[1] ** 0.5).bfloat16()
        return torch.randn(shape) * 0.1 + (0 if "correction" in name else 1)

    @staticmethod
    def _stored(name: str, shape: tuple[int, int], dense_expert: int | None) -> Weight:
        weight = torch.randn(shape) / shape[1] ** 0.5
        if f".experts.{dense_expert}." in name:
            return DenseWeight(weight)  # float32 has no native kernel
        scale = (torch.rand(shape[0], shape[1] // 32) + 0.5) / shape[1] ** 0.5
        if "experts" in name:
            return Int4Weight(int4.pack(torch.randint(-8, 8, shape, dtype=torch.int8)), (scale / 4.6).bfloat16(), 32)
        q = torch.randint(-128, 128, shape, dtype=torch.int16).to(torch.int8)
        return Int8Weight(int8.pack(q), (scale / 74).bfloat16(), 32)

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def weight(self, module: str) -> Weight:
        if module.endswith(".gate"):  # the router's matrix is a plain tensor
            return DenseWeight(self.tensors[f"{module}.weight"])
        return self.weights[module]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or name.removesuffix(".weight") in self.weights


class Layers:
    """Layers `indices` of a random model, over a cache of `context` tokens."""

    def __init__(
        self,
        fields: dict[str, Any],
        indices: tuple[int, ...],
        tier: str,
        *,
        context: int = 40,
        dense_expert: int | None = None,
    ) -> None:
        self.config = ModelConfig.from_dict(fields)
        self.indices = indices
        sources = {index: Source(self.config, index, dense_expert) for index in indices}
        self.kernels = Kernels.choose(tier, threads=2)
        self.counts = ExpertCounts(self.config.n_routed_experts)

        def block(index: int) -> Block:
            experts = self.counts.watching(ExpertStore(sources[index], self.config, self.kernels).layer)
            return Block(self.config, sources[index], index, self.kernels, experts)

        self.each = [block(index) for index in indices]
        self.blocks = Blocks(self.each, self.kernels)
        self.cache = LatentCache(self.config, 512)
        self.rope = Rope(self.config)
        for index in indices:
            self.cache.append(index, torch.randn(context, self.config.latent_width, generator=seeded(4 + index)))
        self.cache.advance(context)

    def __call__(self, x: Tensor) -> Tensor:
        """What the layers add to `x`, one pass after another."""
        places = positions(self.config, self.rope, self.cache.length, len(x), "absorbed")
        after = self.blocks(x.clone(), places, self.cache)
        self.cache.advance(len(x))
        return after - x

    def rows(self) -> Tensor:
        """What is in the caches."""
        return torch.cat([self.cache.reserve(index, 0) for index in self.indices])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(count: int) -> Tensor:
    return torch.randn(count, int(V3["hidden_size"]), generator=seeded(count))


LAYERS = [pytest.param(fields, indices, id=f"{name} {what}")
          for name, fields in (("v3", V3), ("v2", V2))
          for what, indices in (("dense", (0,)), ("moe", (1,)), ("both", (0, 1)), ("more", (0, 1, 2)))]  # fmt: skip


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize(("fields", "indices"), LAYERS)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_they_are_their_parts(
    tier: str, fields: dict[str, Any], indices: tuple[int, ...], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = Layers(fields, indices, tier), Layers(fields, indices, tier)
    assert whole.blocks._native is not None
    monkeypatch.setattr(parts.blocks, "_native", None)
    for _ in range(2):  # the second time every expert is known
        found, expected = whole(tokens(count)), parts(tokens(count))
        assert float((found - expected).norm() / expected.norm()) < 0.01 * len(indices)
    assert whole.counts.uses() == parts.counts.uses()
    chosen = sum(index > 0 for index in indices) * 2 * count * whole.config.num_experts_per_tok
    assert sum(map(sum, whole.counts.uses().values())) == chosen
    atol = 0.02 * len(indices) * float(parts.rows().abs().max())
    torch.testing.assert_close(whole.rows(), parts.rows(), rtol=0, atol=atol)


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize(("fields", "indices"), LAYERS)
def test_a_row_has_the_same_bits_in_any_batch(tier: str, fields: dict[str, Any], indices: tuple[int, ...]) -> None:
    together, alone = Layers(fields, indices, tier), Layers(fields, indices, tier)
    x = tokens(8)
    found = together(x)
    assert torch.equal(found, torch.cat([alone(x[i : i + 1]) for i in range(8)]))
    assert torch.equal(together.rows(), alone.rows())


def test_layers_together_have_the_bits_of_one_after_the_other() -> None:
    """Also across the place where the caches' memory moves."""
    together, single = Layers(V3, (0, 1, 2), "portable", context=250), Layers(V3, (0, 1, 2), "portable", context=250)
    single_blocks = [Blocks([block], single.kernels) for block in single.each]
    for count in (1, 8, 3, 1):
        x = tokens(count)
        places = positions(single.config, single.rope, single.cache.length, count, "absorbed")
        after = x.clone()
        for blocks in single_blocks:
            after = blocks(after, places, single.cache)
        single.cache.advance(count)
        assert torch.equal(together(x), after - x)
    assert single.cache.length > 256
    assert torch.equal(together.rows(), single.rows())


def test_a_pass_may_be_interrupted_between_any_two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where time is over after each layer, the bits are those of one call."""
    once, often = Layers(V3, (0, 1, 2), "portable"), Layers(V3, (0, 1, 2), "portable")
    found = once(tokens(3))
    calls = []
    native = often.blocks._native
    assert native is not None

    class Counting:
        def layers(self, *arguments: Any) -> tuple[int, bool]:
            calls.append(arguments[1])
            return once.kernels.backend.kernels.layers(*arguments)  # type: ignore[union-attr]

    monkeypatch.setattr(native, "_kernels", Counting())
    monkeypatch.setattr(layer, "LONGEST_CALL", 0.0)
    assert torch.equal(often(tokens(3)), found)
    assert set(calls) == {0, 1, 2}


def test_more_rows_than_eight_go_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = Layers(V3, (0, 1), "portable")
    monkeypatch.setattr(type(layers.blocks._native), "__call__", lambda *_: pytest.fail("called"))
    assert layers(tokens(9)).shape == (9, V3["hidden_size"])


def test_an_expert_in_a_form_without_a_kernel_is_computed_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found when the router first names it, in the middle of the call: the result is right, then and later."""
    layers, parts = (Layers(V3, (0, 1, 2), "portable", dense_expert=5) for _ in range(2))
    monkeypatch.setattr(parts.blocks, "_native", None)
    for _ in range(12):
        x = torch.randn(1, int(V3["hidden_size"]), generator=seeded(100 + layers.cache.length))
        found, expected = layers(x), parts(x)
        assert float((found - expected).norm() / expected.norm()) < 0.03
    experts = layers.each[1]._mlp.experts
    assert isinstance(experts, ExpertProducts)
    assert experts.native is None
    assert layers.counts.uses()[1][5] > 0
    assert layers.counts.uses() == parts.counts.uses()


def test_their_parts_are_timed() -> None:
    layers = Layers(V3, (1,), "portable")
    layers(tokens(1))
    seconds = layers.kernels.profile.seconds()
    assert all(seconds[name] > 0 for name in ("attention", "router", "experts"))
    assert seconds.get("dense", 0) == 0
    layers.kernels.profile.reset()
    assert set(layers.kernels.profile.seconds().values()) == {0.0}


def test_parts_that_do_not_fit_are_refused() -> None:
    layers = Layers(V3, (1,), "portable")
    native, rows = layers.blocks._native, (layers.cache.reserve(1, 1),)
    assert native is not None
    with pytest.raises(ValueError, match="too small"):
        native(tokens(1), torch.zeros(1, 16), rows, 300)
    with pytest.raises(ValueError, match="rotations"):
        native(tokens(1), torch.zeros(1, 12), rows, 40)
    with pytest.raises(ValueError, match="another shape"):
        native(torch.zeros(1, 96), torch.zeros(1, 16), rows, layers.cache.length)
    with pytest.raises(ValueError, match="one cache a layer"):
        native(tokens(1), torch.zeros(1, 16), rows * 2, 40)
