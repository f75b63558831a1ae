from __future__ import annotations

from pathlib import Path

import pytest
import torch

import localmoe.errors
from localmoe.errors import DeviceError, UsageError
from localmoe.formats.checkpoint import Checkpoint
from localmoe.memory import MemoryNeeds, available_memory, choose_context
from localmoe.model.config import ModelConfig
from localmoe.model.kv_cache import LatentCache

DEMO = Path(localmoe.errors.__file__).parent / "data" / "demo"
# 1,000 bytes for every token, 9,000 of experts, 1 a token of context
NEEDS = MemoryNeeds(always=1000, experts=9000, cache_per_token=1)


@pytest.mark.parametrize(
    ("maximum", "asked", "budget", "context"),
    [
        (50_000, None, None, 50_000),  # memory unknown
        (50_000, 7, None, 7),
        (50_000, None, 1_000_000, 50_000),  # all of it fits
        (50_000, None, 20_000, 8_000),  # 0.9 * 20,000 - 10,000
        (50_000, None, 12_000, 4_096),  # beside all weights 800: rather fewer experts in memory
        (50_000, None, 6_000, 4_096),  # less than the experts
        (512, None, 2_000, 512),
        (50_000, 30_000, 40_000, 30_000),
        (50_000, 30_000, 35_000, 30_000),  # asked for: experts give way
        (50_000, 1, 1_200, 1),
    ],
)
def test_context_that_fits(maximum: int, asked: int | None, budget: int | None, context: int) -> None:
    assert choose_context(NEEDS, maximum, asked, budget) == context


def test_a_model_fits_what_may_be_used_of_memory() -> None:
    assert NEEDS.fit(10_000 / 0.9 + 1)
    assert not NEEDS.fit(10_000 / 0.9 - 1)


def test_too_little_memory_names_what_would_do() -> None:
    needs = MemoryNeeds(always=2 << 30, experts=8 << 30, cache_per_token=1 << 20)
    with pytest.raises(DeviceError, match=r"need 13\.33 GiB of memory and there are 4\.00; --ctx 1638 would fit"):
        choose_context(needs, 50_000, 10_240, 4 << 30)
    with pytest.raises(DeviceError, match=r"need 6\.67 GiB of memory and there are 1\.00$"):
        choose_context(needs, 50_000, None, 1 << 30)
    assert choose_context(needs, 50_000, 1638, 4 << 30) == 1638


@pytest.mark.parametrize(("asked", "message"), [(0, "at least one"), (-5, "at least one"), (513, "at most 512")])
def test_a_context_the_model_cannot_have_is_refused(asked: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_context(NEEDS, 512, asked, None)


def test_needs_of_the_demo_add_up_to_its_headers() -> None:
    with Checkpoint.open(DEMO) as checkpoint:
        config = ModelConfig.from_dict(checkpoint.config)
        needs = MemoryNeeds.of(config, checkpoint.tensors.values(), 4 * config.latent_width)
        left_out = ("model.layers.5.", "model.embed_tokens.")
        counted = [info for info in checkpoint.tensors.values() if not info.name.startswith(left_out)]
        experts = sum(info.nbytes for info in counted if ".experts." in info.name)
        assert needs.experts == experts > 4 * 16 * 3 * 128 * 256  # FP8 bytes, and scales
        assert needs.always == sum(info.nbytes for info in counted) - experts
        guessing = MemoryNeeds.of(config, checkpoint.tensors.values(), 4 * config.latent_width, mtp=True)
        layer = [info for info in checkpoint.tensors.values() if info.name.startswith("model.layers.5.")]
        own = sum(info.nbytes for info in layer if ".experts." in info.name)
        copy = sum(info.nbytes for info in layer if "embed_tokens" in info.name)
        assert own > 0
        assert guessing.experts - needs.experts == own
        assert guessing.always - needs.always == sum(info.nbytes for info in layer) - own - copy
        assert (needs.mtp, guessing.mtp) == (0, sum(info.nbytes for info in layer) - copy)
        assert guessing.cache_per_token == needs.cache_per_token // 5 * 6
    cache = LatentCache(config, 256)
    cache.append(0, torch.zeros(1, config.latent_width))
    assert needs.cache_per_token == cache.nbytes // 256 * config.num_hidden_layers


def test_available_memory_is_read_from_the_kernel(tmp_path: Path) -> None:
    found = available_memory()
    assert found is not None
    assert 1 << 28 < found < 1 << 45
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  10 kB\nMemAvailable:       7 kB\n", encoding="ascii")
    assert available_memory(meminfo) == 7168
    meminfo.write_text("MemTotal:  10 kB\n", encoding="ascii")
    assert available_memory(meminfo) is None
    assert available_memory(tmp_path / "none") is None
