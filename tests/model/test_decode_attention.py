"""Attention of a few tokens in one native call: the torch path's result, and the same bits in any batch.

Against the torch path on the same weights in bf16: both compute in float32, so only the order of additions is left
(1e-4 of the largest number). With int4 or int8 weights activations are rounded to 1/127 of the largest of 32, for two
matrices in a row: 2 % of the norm.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from localmoe.formats import int4, int8
from localmoe.formats.weights import DenseWeight, Int4Weight, Int8Weight, Weight
from localmoe.kernels import cpu
from localmoe.kernels.dispatch import Kernels
from localmoe.model.config import ModelConfig
from localmoe.model.kv_cache import LatentCache
from localmoe.model.mla import Attention, Positions
from localmoe.model.rope import Rope

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 8, "hidden_size": 96, "intermediate_size": 8,
    "moe_intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 11, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 64,
    "kv_lora_rank": 160, "qk_nope_head_dim": 24, "qk_rope_head_dim": 12, "v_head_dim": 32,
    "max_position_embeddings": 1024, "routed_scaling_factor": 1.0,
}  # fmt: skip


class Source:
    """Random attention weights in the forms of a recipe."""

    def __init__(self, config: ModelConfig, form: str) -> None:
        torch.manual_seed(3)
        heads, rank = config.num_attention_heads, config.kv_lora_rank
        expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
        hidden, query = config.hidden_size, heads * config.qk_head_dim
        low = config.q_lora_rank or hidden
        shapes = {
            "q_a_proj": (low, hidden), "q_b_proj": (query, low), "q_proj": (query, hidden),
            "kv_a_proj_with_mqa": (config.latent_width, hidden), "kv_b_proj": (expanded, rank),
            "o_proj": (hidden, heads * config.v_head_dim),
        }  # fmt: skip
        forms = dict.fromkeys(shapes, "bf16" if form == "even" else form)
        forms["kv_b_proj"] = "int8" if form == "int4" else form
        self.weights = {name: stored(shape, forms[name]) for name, shape in shapes.items()}
        self.norms = {"q_a_layernorm": low, "kv_a_layernorm": rank}

    def tensor(self, name: str) -> Tensor:
        return torch.linspace(0.5, 1.5, self.norms[name.split(".")[-2]])

    def weight(self, module: str) -> Weight:
        return self.weights[module.split(".")[-1]]

    def __contains__(self, name: str) -> bool:
        return False


def stored(shape: tuple[int, int], form: str) -> Weight:
    if form == "even":  # a query in the latents' space is as long in every direction
        return DenseWeight(torch.full(shape, 0.1).bfloat16())
    if form == "bf16":
        return DenseWeight((torch.randn(shape) * 1.5 / shape[1] ** 0.5).bfloat16())
    scale = (torch.rand(shape[0], shape[1] // 32) + 0.5) * 1.5 / shape[1] ** 0.5
    if form == "int4":
        return Int4Weight(int4.pack(torch.randint(-8, 8, shape, dtype=torch.int8)), (scale / 4.6).bfloat16(), 32)
    q = torch.randint(-128, 128, shape, dtype=torch.int16).to(torch.int8)
    return Int8Weight(int8.pack(q), (scale / 74).bfloat16(), 32)


class Layer:
    """One layer's attention with a cache of its own that holds `context` random tokens."""

    def __init__(self, form: str, tier: str, context: int, dtype: torch.dtype, **changes: Any) -> None:
        self.config = ModelConfig.from_dict(CONFIG | {"max_position_embeddings": max(1024, context + 16)} | changes)
        self.attention = Attention(self.config, Source(self.config, form), 0, Kernels.choose(tier, threads=2))
        self.cache = LatentCache(self.config, self.config.max_position_embeddings, dtype)
        self.rope = Rope(self.config)
        torch.manual_seed(5)
        self.cache.append(0, torch.randn(context, self.config.latent_width))
        self.cache.advance(context)

    def __call__(self, x: Tensor) -> Tensor:
        """Attention of the tokens `x` after those in the cache, which holds them then."""
        count = len(x)
        rotations = self.rope.rotations(self.cache.length, count)
        future = torch.ones(count, count, dtype=torch.bool).triu_(1) if count > 1 else None
        flat = torch.view_as_real(rotations).flatten(1)
        result = self.attention(x, Positions(rotations, flat, future, "absorbed"), self.cache)
        self.cache.advance(count)
        return result


def tokens(count: int) -> Tensor:
    torch.manual_seed(count)
    return torch.randn(count, int(CONFIG["hidden_size"]))


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the norm."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("rank", [64, None])
@pytest.mark.parametrize(("context", "count"), [(0, 1), (0, 8), (3, 1), (254, 5), (700, 1)])
def test_it_is_the_torch_path(tier: str, form: str, rank: int | None, context: int, count: int) -> None:
    ours = Layer(form, tier, context, torch.float32, q_lora_rank=rank)
    wanted = Layer(form, "reference", context, torch.float32, q_lora_rank=rank)
    found, expected = ours(tokens(count)), wanted(tokens(count))
    if form == "bf16":
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        rows = [layer.cache.reserve(0, 0) for layer in (ours, wanted)]
        torch.testing.assert_close(*rows, rtol=1e-5, atol=1e-5)
    else:
        assert error(found, expected) < 0.02


@pytest.mark.parametrize("tier", cpu.available_tiers())
def test_a_bf16_cache_costs_its_rounding(tier: str) -> None:
    """2^-9 a number at most, of which most cancels: 1 % of the norm is ample."""
    ours = Layer("bf16", tier, 300, torch.bfloat16)
    exact = Layer("bf16", "reference", 300, torch.float32)
    assert 0 < error(ours(tokens(4)), exact(tokens(4))) < 0.01


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize(("context", "count"), [(0, 1), (300, 4)])
def test_an_int8_cache_is_read_as_torch_reads_it(tier: str, context: int, count: int) -> None:
    """Both round the same rows: one that lies between two steps may go either way, so 1e-3 of the norm."""
    ours = Layer("bf16", tier, context, torch.int8)
    wanted = Layer("bf16", "reference", context, torch.int8)
    assert error(ours(tokens(count)), wanted(tokens(count))) < 1e-3
    rows, same = (layer.cache.reserve(0, 0) for layer in (ours, wanted))
    assert (rows != same).float().mean() < 0.01


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize(("context", "count"), [(0, 1), (1, 2), (300, 4), (700, 1), (9000, 2)])
@pytest.mark.parametrize("heads", [5, 8, 11, 19, 70])
def test_an_int8_cache_in_integers_costs_the_querys_rounding(tier: str, context: int, count: int, heads: int) -> None:
    """Ranks of whole 64s. AVX-512 rounds queries to 1/127 of the largest of 64, about what the cache's own rounding
    costs: 0.3 to 1.4 % of the norm; 2 % is a bound. AVX2 rounds them to 16 bits: what is left is rows that lie between
    two steps of the cache, 1e-3 as above."""
    changes = {"kv_lora_rank": 192, "qk_rope_head_dim": 32, "num_attention_heads": heads}
    ours = Layer("bf16", tier, context, torch.int8, **changes)
    wanted = Layer("bf16", "reference", context, torch.int8, **changes)
    assert error(ours(tokens(count)), wanted(tokens(count))) < (2e-2 if tier == "avx512" else 1e-3)


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize(("context", "count"), [(0, 1), (1, 2), (300, 4), (700, 1), (9000, 2)])
@pytest.mark.parametrize("heads", [5, 8, 11, 19, 70])
@pytest.mark.parametrize("outlier", [1, 30])
def test_a_bf16_cache_in_integers_is_read_as_torch_reads_it(
    tier: str, context: int, count: int, heads: int, outlier: int
) -> None:
    """Ranks of whole 64s, rotated keys of whole 32s, in 16 bits with AVX2 and AVX-512: a query's part for 192 latents
    has 19,000 steps in its length, of which rounding takes 4, 0.02 %, and a new row that lies between two steps of the
    cache may go either way. 1e-3 of the norm. With one latent 30 times the others, which all lose 2^-14 of it: 3e-3."""
    changes = {"kv_lora_rank": 192, "qk_rope_head_dim": 32, "num_attention_heads": heads}
    layers = [Layer("bf16", each, context, torch.bfloat16, **changes) for each in (tier, "reference")]
    for layer in layers:
        layer.cache.reserve(0, 0)[:context, 7] *= outlier
    found, expected = (layer(tokens(count)) for layer in layers)
    assert error(found, expected) < (1e-3 if outlier == 1 else 3e-3)


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_large_latents_that_all_weigh_the_same_leave_no_integer(tier: str, dtype: torch.dtype) -> None:
    """The largest sum there is: 256 rows of the largest latents, of one sign, and every weight the largest."""
    changes = {"kv_lora_rank": 192, "qk_rope_head_dim": 32}
    layers = [Layer("bf16", each, 0, dtype, **changes) for each in (tier, "reference")]
    for layer in layers:
        layer.cache.append(0, torch.full((511, layer.config.latent_width), 0.99609375))
        layer.cache.advance(511)
    found, expected = (layer(torch.zeros(1, 96)) for layer in layers)
    assert error(found, expected) < 1e-3


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("rank", [192, 512])
def test_a_query_along_the_largest_rows_leaves_no_integer(tier: str, dtype: torch.dtype, rank: int) -> None:
    """The largest products there are: one that wrapped would turn from the likeliest rows to the others."""
    changes = {"kv_lora_rank": rank, "qk_rope_head_dim": 32}
    layers = [Layer("even", each, 0, dtype, **changes) for each in (tier, "reference")]
    for layer in layers:
        same = torch.full((200, layer.config.latent_width), 0.99609375)
        same[::2] *= -1
        layer.cache.append(0, same)
        layer.cache.advance(200)
    assert error(*(layer(tokens(3)) for layer in layers)) < 1e-3


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("column", [3, 192], ids=["latent", "rotated key"])
def test_a_number_that_is_none_in_the_cache_shows(tier: str, dtype: torch.dtype, column: int) -> None:
    """It isn't rounded to one that is, and doesn't have all the weight."""
    layer = Layer("bf16", tier, 0, dtype, kv_lora_rank=192, qk_rope_head_dim=32)
    rows = torch.randn(300, layer.config.latent_width)
    rows[5, column] = torch.nan
    layer.cache.append(0, rows)
    layer.cache.advance(300)
    assert layer(tokens(1)).isnan().all()


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_token_that_is_none_shows_now_and_later(tier: str, dtype: torch.dtype) -> None:
    layer = Layer("bf16", tier, 300, dtype, kv_lora_rank=192, qk_rope_head_dim=32)
    assert layer(torch.full((1, 96), torch.nan)).isnan().all()
    assert layer(tokens(1)).isnan().all()


@pytest.mark.parametrize("tier", cpu.available_tiers())
def test_an_int8_cache_costs_its_rounding(tier: str) -> None:
    """Half of 1/127 of a row's largest number, of which most cancels: 3 % of the norm."""
    ours = Layer("bf16", tier, 300, torch.int8)
    exact = Layer("bf16", "reference", 300, torch.float32)
    assert 0 < error(ours(tokens(4)), exact(tokens(4))) < 0.03


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize("context", [0, 250, 8188])  # with 8,192 tokens a share of the context becomes two chunks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("rank", "heads"), [(160, 11), (192, 11), (192, 70)])  # whole 64s are attended to in integers
def test_a_token_has_the_same_bits_alone_or_with_others(
    tier: str, context: int, dtype: torch.dtype, rank: int, heads: int
) -> None:
    x, changes = tokens(8), {"kv_lora_rank": rank, "qk_rope_head_dim": 32, "num_attention_heads": heads}
    together = Layer("int4", tier, context, dtype, **changes)(x)
    alone = Layer("int4", tier, context, dtype, **changes)
    assert torch.equal(torch.cat([alone(x[i : i + 1]) for i in range(8)]), together)


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize("count", [9, 16, 20])
def test_a_short_prompt_is_computed_a_few_tokens_at_a_time(tier: str, count: int) -> None:
    """With the bits of one token after the other."""
    x = tokens(count)
    together, alone = (Layer("int4", tier, 300, torch.bfloat16) for _ in range(2))
    assert torch.equal(together(x), torch.cat([alone(x[i : i + 1]) for i in range(count)]))


def test_extreme_scores_stay_finite() -> None:
    layer = Layer("bf16", "auto", 300, torch.float32)
    layer.cache.reserve(0, 0)[:] *= 1e4
    assert layer(tokens(2) * 1e4).isfinite().all()


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e4, 1e16])
def test_latents_of_any_size_in_integers_stay_finite(tier: str, dtype: torch.dtype, size: float) -> None:
    layer = Layer("bf16", tier, 0, dtype, kv_lora_rank=192, qk_rope_head_dim=32)
    layer.cache.append(0, torch.randn(300, layer.config.latent_width) * size)
    layer.cache.advance(300)
    assert layer(tokens(2)).isfinite().all()
