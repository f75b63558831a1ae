"""Placements and speeds on the published models, with machines whose figures are round numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from localmoe.errors import DeviceError, UsageError
from localmoe.model.config import ModelConfig
from localmoe.model.sizes import Storage, model_sizes
from localmoe.offload.machine import GIB, CpuSpeed, Figure, GpuSpeed, Machine, assumed_cpu, assumed_disk, assumed_gpu
from localmoe.offload.plan import Budgets, gpu_workspace, make_plan, place
from localmoe.offload.predict import CONTEXT, CPU_MEMORY, DISK, EVICTION, Residence, Subject, decode, stream_from
from quantize.recipes import RECIPES

CONFIGS = Path(__file__).parents[1] / "configs"
MACHINE = Machine(assumed_cpu(8), assumed_disk(), assumed_gpu())


@cache
def subject(name: str, recipe: str = "balanced") -> Subject:
    values = json.loads((CONFIGS / f"{name}.json").read_text())
    config = ModelConfig.from_dict(values)
    sizes = model_sizes(config, Storage.of(values, RECIPES[recipe].quantization_config(32)))
    return Subject(config, sizes, 2 * config.latent_width)


def simple(rate: float) -> CpuSpeed:
    """A CPU whose every rate is the same and whose layers cost nothing besides."""
    figure = Figure(rate, "measured")
    forms = dict.fromkeys(("int4", "int8", "bf16", "float32"), figure)
    return CpuSpeed(1, figure, forms, figure, figure, forms, Figure(1e18, "measured"), figure, Figure(0.0, "measured"))


def test_latent_cache_against_a_plain_one() -> None:
    v3 = subject("deepseek-v3")
    assert v3.cache_per_token == 61 * 576 * 2 == 70_272
    assert v3.plain_cache_per_token == 61 * 128 * (192 + 128) * 2 == 4_997_120


def test_decode_on_a_cpu_is_bytes_over_bandwidth() -> None:
    lite = subject("deepseek-v2-lite", "compact")
    plan = make_plan(lite, Machine(simple(10e9), assumed_disk()), Budgets(ram=64 * GIB, context=4096))
    read = lite.sizes.always + 26 * 6 * lite.sizes.expert
    assert plan.decode.tokens_per_second == pytest.approx(10e9 / read)
    assert plan.decode.bound == CPU_MEMORY
    assert plan.placement.nbytes("disk") == 0
    assert plan.placement.nbytes("ram") == lite.sizes.nbytes + 4096 * lite.cache_per_token
    assert plan.advice == ()


def test_few_heads_attend_in_the_time_of_a_block() -> None:
    lite = subject("deepseek-v2-lite")  # 16 heads
    layers = [Residence(False)] * 27
    cpu = replace(simple(10e9), latents=Figure(1e9, "measured"))

    def seconds(heads: int) -> float:
        config = replace(lite.config, num_attention_heads=heads)
        model = replace(lite, config=config)
        return decode(model, Machine(cpu, assumed_disk()), layers, False, 4096).seconds[CONTEXT]

    assert seconds(16) == pytest.approx(27 * 16 * 4096 * (576 + 512) / 1e9)
    assert seconds(4) == seconds(16)
    assert seconds(17) == pytest.approx(2 * seconds(16))


def test_experts_that_memory_does_not_hold_wait_for_the_disk() -> None:
    lite = subject("deepseek-v2-lite", "compact")
    budgets = Budgets(ram=6 * GIB, context=4096)
    plan = make_plan(lite, Machine(simple(10e9), Figure(1e9, "measured")), budgets)
    room = int(6 * GIB * 0.9) - lite.sizes.always - 4096 * lite.cache_per_token
    kept = room // lite.sizes.expert
    assert sum(layer.disk_experts for layer in plan.placement.layers) == 26 * 64 - kept
    assert plan.decode.bound == DISK
    nbytes = 6 * sum(h.disk_experts for h in place(lite, budgets, 0).layers) / 64 * lite.sizes.expert
    assert plan.decode.seconds[DISK] == pytest.approx(nbytes / 1e9 + nbytes / EVICTION)
    assert "which holds every expert" in plan.advice[0].change
    assert plan.advice[0].decode_tokens_per_second > 2 * plan.decode.tokens_per_second


@pytest.mark.parametrize("gib", [4, 6, 8, 12, 24, 32])
@pytest.mark.parametrize("name", ["deepseek-v2-lite", "glm-4.7-flash", "deepseek-v3"])
@pytest.mark.parametrize("context", [None, 4096, 32768])
def test_the_card_is_never_asked_for_more_than_its_budget(name: str, gib: int, context: int | None) -> None:
    model = subject(name)
    budgets = Budgets(ram=512 * GIB, vram=gib * GIB, context=context)
    for held in (0, None):
        placement = place(model, budgets, held)
        assert placement.nbytes("gpu") <= gib * GIB
        tokens = 0 if held == 0 else placement.context
        total = sum(share.nbytes for share in placement.shares)
        extra = gpu_workspace(model.config, gib * GIB) + (128 << 20)
        assert total == model.sizes.nbytes + tokens * model.cache_per_token + extra
    full, empty = place(model, budgets), place(model, budgets, 0)
    assert sum(h.gpu_experts for h in full.layers) <= sum(h.gpu_experts for h in empty.layers)
    assert [h.on_gpu for h in full.layers] == [h.on_gpu for h in empty.layers]
    slot = model.sizes.expert
    assert full.arena == empty.arena  # made once: what the cache takes of it, the experts have had before
    every = sum(size.experts for size, home in zip(model.sizes.layers, full.layers, strict=True) if home.on_gpu)
    for tokens in (0, full.context // 3, full.context):
        placement = place(model, budgets, tokens)
        cache = tokens * model.cache_row * sum(home.on_gpu for home in full.layers)
        unused = full.arena - cache - placement.gpu_experts * slot
        assert unused >= 0
        assert unused < 2 * slot or placement.gpu_experts == every
    assert max(full.nbytes("gpu"), empty.nbytes("gpu")) <= full.vram == empty.vram <= gib * GIB


def test_v3_always_active_part_moves_to_the_cpu_layer_by_layer() -> None:
    v3 = subject("deepseek-v3")
    plan = make_plan(v3, MACHINE, Budgets(ram=512 * GIB, vram=12 * GIB, context=4096))
    assert 0 < plan.placement.cpu_layers < 61
    on_gpu = [layer.on_gpu for layer in plan.placement.layers]
    assert on_gpu == sorted(on_gpu, reverse=True)  # the last ones leave
    assert plan.without_cpu_layers is not None
    assert plan.without_cpu_layers > plan.decode.tokens_per_second
    whole = make_plan(v3, MACHINE, Budgets(ram=512 * GIB, vram=24 * GIB, context=4096))
    assert whole.placement.cpu_layers == 0
    assert whole.decode.tokens_per_second > plan.decode.tokens_per_second


def test_less_than_a_layer_is_refused_with_what_would_do() -> None:
    v3 = subject("deepseek-v3")
    with pytest.raises(DeviceError, match=r"cannot hold one layer .* of 4096 tokens; (\d+\.\d\d) GiB would do") as told:
        place(v3, Budgets(ram=512 * GIB, vram=1 * GIB, context=4096))
    named = float(str(told.value).split("tokens; ")[1].split(" GiB")[0])
    assert place(v3, Budgets(ram=512 * GIB, vram=int(named * GIB), context=4096)).layers[0].on_gpu
    with pytest.raises(DeviceError, match="of CPU memory"):
        place(v3, Budgets(ram=4 * GIB, vram=3 * GIB, context=4096))
    with pytest.raises(UsageError, match="1 to 163840"):
        place(v3, Budgets(vram=24 * GIB, context=163841))


def test_heat_decides_who_is_on_the_card() -> None:
    lite = subject("deepseek-v2-lite")
    zipf = [1 / (rank + 1) for rank in range(64)]
    heat = [[] if not layer.experts else [6 * each / sum(zipf) for each in zipf] for layer in lite.sizes.layers]
    budgets = Budgets(ram=64 * GIB, vram=6 * GIB, context=4096)
    alike, skewed = place(lite, budgets), place(replace(lite, heat=heat), budgets)
    assert sum(h.gpu_experts for h in alike.layers) == sum(h.gpu_experts for h in skewed.layers)
    assert skewed.layers[5].gpu_hits > alike.layers[5].gpu_hits
    slots = [h.gpu_experts for h in alike.layers[1:]]
    assert max(slots) - min(slots) <= 1  # spread evenly where all are alike


def test_one_more_gib_of_vram_is_worth_something() -> None:
    plan = make_plan(subject("deepseek-v2-lite"), MACHINE, Budgets(ram=64 * GIB, vram=6 * GIB, context=4096))
    (advice,) = plan.advice
    assert advice.change == "1 GiB more of --vram"
    assert advice.decode_tokens_per_second > plan.decode.tokens_per_second


def test_streaming_pays_from_the_batch_where_carrying_beats_computing() -> None:
    lite = subject("deepseek-v2-lite")
    gpu = GpuSpeed("x", *(Figure(value, "measured") for value in (1e12, 1e15, 10e9, 0.0, 0.0)))
    machine = Machine(simple(100e9), assumed_disk(), gpu)
    layers = [Residence(True)] * 27
    found = stream_from(lite, machine, layers)
    # carrying 64 experts at 10 GB/s against reading them at 100 GB/s and computing 6 x T experts' weights at 100 G/s
    carry = 64 * lite.sizes.expert * (1 / 10e9 - 1 / 100e9)
    assert found == pytest.approx(carry / (6 * 3 * 2048 * 1408 / 100e9), abs=1)
    assert stream_from(lite, machine, [Residence(True, gpu_experts=64, gpu_hits=1.0)] * 27) is None
