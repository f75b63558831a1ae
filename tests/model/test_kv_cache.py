"""The latent cache: what it holds, what it costs, and what it refuses."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch

from localmoe.errors import ContextOverflowError
from localmoe.formats import mapping
from localmoe.model.config import ModelConfig
from localmoe.model.kv_cache import LatentCache, pack_int8, row_bytes, unpack_int8


@pytest.fixture
def config(base_config: dict[str, Any]) -> ModelConfig:
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": 3}
    return ModelConfig.from_dict({**base_config, **sizes})


def fill(cache: LatentCache, config: ModelConfig, count: int) -> None:
    for layer in range(config.num_hidden_layers):
        rows = torch.full((count, 576), float(layer + 1)) + torch.arange(cache.length, cache.length + count)[:, None]
        cache.append(layer, rows)
    cache.advance(count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_costs_576_numbers_a_layer_and_nothing_more(config: ModelConfig, dtype: torch.dtype) -> None:
    cache = LatentCache(config, capacity=1000, dtype=dtype)
    assert cache.nbytes == 0
    while cache.length < 1000:
        fill(cache, config, min(37, 1000 - cache.length))
    assert cache.nbytes == 1000 * 576 * 3 * dtype.itemsize
    assert config.latent_width == 576


def test_a_long_context_is_paid_for_as_it_fills(config: ModelConfig) -> None:
    cache = LatentCache(config, capacity=131072)
    fill(cache, config, 10)
    assert cache.nbytes == 256 * 576 * 3 * 4
    fill(cache, config, 990)
    assert cache.nbytes <= 1.5 * 1024 * 576 * 3 * 4


def test_rows_survive_growth(config: ModelConfig) -> None:
    cache = LatentCache(config, capacity=700)
    for _ in range(7):
        fill(cache, config, 100)
    cache.truncate(699)
    for layer in range(3):
        rows = cache.append(layer, torch.zeros(1, 576))
        assert torch.equal(rows[:699, 5], torch.arange(699) + float(layer + 1))
        assert rows.shape == (700, 576)


def test_overflow_names_both_sizes_and_changes_nothing(config: ModelConfig) -> None:
    cache = LatentCache(config, capacity=20)
    fill(cache, config, 18)
    with pytest.raises(ContextOverflowError, match=r"20 tokens and 21"):
        cache.append(0, torch.zeros(3, 576))
    assert cache.length == 18


@pytest.mark.parametrize("length", [-1, 19])
def test_truncate_only_forgets(config: ModelConfig, length: int) -> None:
    cache = LatentCache(config, capacity=20)
    fill(cache, config, 18)
    with pytest.raises(ValueError, match="18"):
        cache.truncate(length)


def test_int8_is_within_half_a_step_and_keeps_keys_in_bf16(config: ModelConfig) -> None:
    rows = torch.randn(5, 576) * torch.tensor([1.0, 100.0, 1e-6, 0.0, 1e30])[:, None]
    found = unpack_int8(pack_int8(rows, 512), 512)
    step = rows[:, :512].abs().amax(dim=1, keepdim=True) / 127
    assert ((found - rows)[:, :512].abs() <= 0.501 * step).all()
    assert torch.equal(found[:, 512:], rows[:, 512:].bfloat16().float())


def test_an_int8_cache_gives_back_floats_and_costs_644_bytes_a_token(config: ModelConfig) -> None:
    cache = LatentCache(config, capacity=100, dtype=torch.int8)
    fill(cache, config, 60)
    held = cache.append(1, torch.ones(40, 576))
    assert held.dtype == torch.float32
    assert held.shape == (100, 576)
    torch.testing.assert_close(held[:60, 0], 2.0 + torch.arange(60), rtol=0.005, atol=0)
    fill(cache, config, 40)
    assert row_bytes(config, torch.int8) == 644
    assert cache.nbytes == 100 * 3 * 644


def test_int8_rows_are_packed_where_they_are() -> None:
    assert pack_int8(torch.empty(3, 24, device="meta"), 16).device.type == "meta"


def test_a_long_context_asks_for_large_pages_within_its_own_memory(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whole pages of 2 MiB, which hold nothing of anybody else's; a short context asks for none."""
    asked: list[tuple[int, int, int]] = []

    def advised(*what: int) -> int:
        asked.append(what)  # type: ignore[arg-type]
        return 0

    monkeypatch.setattr(mapping, "_madvise", advised)
    cache = LatentCache(config, capacity=10_000, dtype=torch.bfloat16)
    cache.reserve(0, 7000)
    assert not asked  # 8.06 MB, less than 8 MiB
    rows = cache.reserve(0, 9500)
    ((start, size, advice),) = asked
    assert advice == mmap.MADV_HUGEPAGE
    assert start % (2 << 20) == size % (2 << 20) == 0
    assert rows.data_ptr() <= start < start + size <= rows.data_ptr() + cache.nbytes
    assert size > cache.nbytes - (4 << 20)
