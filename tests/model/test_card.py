"""The model on a card against the model on the CPU's reference: on Triton's interpreter where there is no GPU.

The interpreter multiplies float32, so a difference is another order of summation: 1e-4 of the largest logit after two
layers. On a GPU prompts are multiplied in bfloat16, and 5 % are allowed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from typing import Any

import pytest
import torch
from torch import Tensor

from localmoe.errors import ContextOverflowError, DeviceError, InputError, UsageError
from localmoe.formats import int4, int8
from localmoe.formats.weights import DenseWeight, Int4Weight, Int8Weight, Weight
from localmoe.kernels.dispatch import Kernels
from localmoe.kernels.triton.weights import slot_bytes
from localmoe.model.card.arena import Arena
from localmoe.model.card.cache import CardLatents
from localmoe.model.card.model import CardLayout, CardModel
from localmoe.model.config import ModelConfig
from localmoe.model.deepseek import Model
from localmoe.model.kv_cache import LatentCache
from localmoe.model.layers import expert_weights
from localmoe.model.shapes import layer_modules, layer_tensors
from localmoe.model.sizes import card_cache_bytes
from localmoe.offload.card import CardExperts
from localmoe.offload.experts import ExpertStore
from localmoe.offload.refresh import EVERY, REMEMBERED, Refresh

BASE: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
V2 = {
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
    "rope_scaling": {
        "type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
        "mscale": 0.707, "mscale_all_dim": 0.707,
    },
}  # fmt: skip


class RandomSource:
    """Weights of a config: experts in int4, the others in int8, what recipes leave alone in bf16."""

    def __init__(self, config: ModelConfig) -> None:
        torch.manual_seed(5)
        self._weights: dict[str, Weight] = {}
        self._tensors: dict[str, Tensor] = {}
        for index, is_moe in enumerate(config.moe_layers):
            for module, (rows, columns) in layer_modules(config, index, is_moe):
                plain = module.endswith("kv_b_proj") and index == 0  # int8 in the other layers, as `compact` has it
                self._weights[module] = _matrix(rows, columns, ".experts." in module, plain)
            for name, shape in layer_tensors(config, index, is_moe):
                value = torch.randn(shape) * 0.2 + (1.0 if "norm" in name else 0.0)
                self._tensors[name] = value if "bias" in name else value.bfloat16()
                if name.endswith(".mlp.gate.weight"):
                    self._weights[name.removesuffix(".weight")] = DenseWeight(value.bfloat16())
        shape = (config.vocab_size, config.hidden_size)
        table = torch.randn(shape).bfloat16()
        self._weights["model.embed_tokens"] = (
            DenseWeight(table / 8) if config.tie_word_embeddings else _matrix(*shape, False, False)
        )
        self._tensors["model.norm.weight"] = torch.ones(config.hidden_size)
        self._weights["lm_head"] = DenseWeight((torch.randn(shape) / 8).bfloat16())

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def weight(self, module: str) -> Weight:
        return self._weights[module]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name.removesuffix(".weight") in self._weights


def _matrix(rows: int, columns: int, four_bits: bool, plain: bool) -> Weight:
    if plain:
        return DenseWeight((torch.randn(rows, columns) / columns**0.5).bfloat16())
    scale = ((torch.rand(rows, columns // 32) + 0.5) / columns**0.5).bfloat16()
    if four_bits:
        return Int4Weight(int4.pack(torch.randint(-8, 8, (rows, columns)).to(torch.int8)), scale / 4, 32)
    return Int8Weight(int8.pack(torch.randint(-128, 128, (rows, columns)).to(torch.int8)), scale / 64, 32)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def models(
    device: torch.device,
    *,
    changes: dict[str, Any] | None = None,
    layers: int = 2,
    head: bool = True,
    on_card: Sequence[int] = range(8),
    kernels: str = "reference",
    cache: str = "float32",
    stream_from: int | None = None,
) -> tuple[CardModel, Model]:
    config = ModelConfig.from_dict({**BASE, **(changes or {})})
    source = RandomSource(config)
    chosen, reference = Kernels.choose(kernels, 1, cache), Kernels.choose("reference", cache_dtype=cache)
    placed = CardExperts(source, config, chosen, [on_card] * 2, device, stream_from=stream_from)
    layout = CardLayout(device, layers, head, 48)
    ours = CardModel(config, source, chosen, layout, placed.layer, ExpertStore(source, config, chosen).layer)
    return ours, Model(config, source, reference, ExpertStore(source, config, reference).layer)


def assert_alike(ours: CardModel, wanted: Model, passes: Sequence[int], tolerance: float = 1e-4) -> None:
    if ours.device.type == "cuda":
        tolerance = max(tolerance, 5e-2)
    ids = torch.randint(0, 96, (sum(passes),), generator=torch.Generator().manual_seed(1))
    caches = ours.new_cache(48), LatentCache(wanted.config, 48, ours._kernels.cache_dtype)
    for part in ids.split(list(passes)):
        logits, expected = ours.forward(part, caches[0]), wanted.forward(part, caches[1])
        assert logits.device.type == "cpu"
        error = float((logits - expected).abs().max() / expected.abs().max())
        assert error <= tolerance, f"{len(part)} rows after {caches[0].length - len(part)}: off by {error:.2g}"
    assert caches[0].length == caches[1].length == sum(passes)


FEW_AND_MANY = (9, 2, 9)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        V2,
        {"attention_bias": True, "n_shared_experts": 0},
        {"tie_word_embeddings": True, "num_experts_per_tok": 1, "norm_topk_prob": False, "n_group": 1, "topk_group": 1},
    ],
    ids=["v3", "v2", "biases, no shared expert", "tied, one expert"],
)
def test_all_on_the_card(changes: dict[str, Any], device: torch.device) -> None:
    assert_alike(*models(device, changes=changes), FEW_AND_MANY)


@pytest.mark.parametrize(("on_card", "kernels"), [((), "portable"), ((0, 3, 5), "portable"), ((0, 3, 5), "reference")])
def test_experts_on_both_sides(on_card: Sequence[int], kernels: str, device: torch.device) -> None:
    # the native kernels round activations to int8
    tolerance = 1e-4 if kernels == "reference" else 3e-2
    assert_alike(*models(device, on_card=on_card, kernels=kernels), FEW_AND_MANY, tolerance)


@pytest.mark.parametrize("on_card", [(), (0, 3, 5)], ids=["none", "some"])
def test_experts_carried_to_the_card_for_a_prompt(on_card: Sequence[int], device: torch.device) -> None:
    assert_alike(*models(device, on_card=on_card, stream_from=9), (9, 9))


class AtOnce(Executor):
    """Runs what it is given before it returns."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def test_experts_that_change_places_change_nothing_else(device: torch.device) -> None:
    ours, wanted = models(device, on_card=(0, 1))
    placed = ours._layers[1]._mlp._experts  # type: ignore[union-attr]
    refresh = Refresh({1: placed}, placed.uses[None].expand(2, -1), AtOnce())
    before = placed.table.held
    placed.uses[:] = torch.tensor([0, 0, 0, 0, 0, 90, 80, 0])
    for _ in range(2 * EVERY + 1):
        refresh.between_passes()
        placed.uses[5:7] += 1
    assert sorted(before) == [0, 1]
    assert sorted(placed.table.held) == [5, 6]
    assert_alike(ours, wanted, (9, 2))


HEAT = [[], [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]


def in_one_arena(slots: int, tokens: int, device: torch.device) -> tuple[CardModel, CardExperts, Arena]:
    """A cache of `tokens`, of which 4 have room at first, and so many slots in all."""
    config = ModelConfig.from_dict(BASE)
    source, chosen = RandomSource(config), Kernels.choose("reference", 1, "float32")
    slot = slot_bytes(expert_weights(source, "model.layers.1.mlp.experts.0"))
    arena = Arena(slots * slot, device, taken=4 * card_cache_bytes(160, 2, 1))
    placed = CardExperts(source, config, chosen, [(), range(8)], device, arena=arena, heat=HEAT)
    layout = CardLayout(device, 2, True, tokens, arena=arena)
    store = ExpertStore(source, config, chosen)
    ours = CardModel(config, source, chosen, layout, placed.layer, store.layer, placed.between_passes)
    return ours, placed, arena


@pytest.mark.parametrize(("slots", "left"), [(9, 4), (8, 3), (5, 0)], ids=["all at first", "one away", "none at last"])
def test_slots_are_given_back_as_the_context_grows(
    slots: int, left: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of a cache that was reserved whole, step by step, and of the reference; the memory is the same all
    the time, what the cache has of it is no slot's, and the coldest leave."""
    monkeypatch.setattr("localmoe.model.card.cache.CACHE_STEP", 4)
    tokens = 48
    ours, placed, arena = in_one_arena(slots, tokens, device)
    slot, a_token, heat = placed._slot, card_cache_bytes(160, 2, 1), HEAT
    assert -(-tokens * a_token // slot) == 5
    whole, wanted = models(device)
    config = wanted.config
    layer = placed._layers[1]
    address = arena.memory.data_ptr()
    assert layer.both_sides == (slots < 9)
    assert layer.table.held == list(reversed(range(min(8, slots - 1))))
    ids = torch.randint(0, 96, (tokens,), generator=torch.Generator().manual_seed(1))
    caches = ours.new_cache(tokens), whole.new_cache(tokens), LatentCache(config, tokens)
    tolerance = 1e-4 if device.type == "cpu" else 5e-2
    for part in ids.split([3, 9, 2, 12, 1, 9, 8, 4]):
        held = {expert: float(placed._uses[1, expert]) for expert in layer.table.held}
        logits = ours.forward(part, caches[0])
        for model, cache in ((whole, caches[1]), (wanted, caches[2])):
            expected = model.forward(part, cache)
            assert float((logits - expected).abs().max() / expected.abs().max()) <= tolerance
        assert a_token * caches[0].length <= caches[0].nbytes == arena.taken <= len(arena.memory)
        assert all(number * slot >= arena.taken for number, _ in layer.table.slots())
        gone = set(held) - set(layer.table.held)
        warmth = {expert: uses + REMEMBERED * 3 * heat[1][expert] / 36 for expert, uses in held.items()}
        assert all(warmth[cold] <= warmth[warm] for cold in gone for warm in layer.table.held)
    assert arena.memory.data_ptr() == address
    assert (len(layer.table.held), layer.both_sides) == (left, True)
    with pytest.raises(ContextOverflowError, match="holds 48 tokens"):
        ours.forward(torch.arange(1), caches[0])


@pytest.mark.parametrize("slots", [9, 8], ids=["all at first", "one away"])
def test_slots_come_back_when_a_short_conversation_follows(
    slots: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference's logits all the time; the hottest experts come back, a layer that is whole again leaves the CPU
    out until it is not, and whenever it changes graphs are forgotten."""
    monkeypatch.setattr("localmoe.model.card.cache.CACHE_STEP", 4)
    monkeypatch.setattr("localmoe.model.card.cache._PATIENCE", 3)
    monkeypatch.setattr("localmoe.offload.refresh._FILL_EVERY", 1)
    ours, placed, arena = in_one_arena(slots, 48, device)
    placed.keep_fresh(AtOnce())
    _, wanted = models(device)
    layer, forgotten = placed._layers[1], []
    forget = ours._replay.forget
    monkeypatch.setattr(ours._replay, "forget", lambda: forgotten.append(layer.both_sides) or forget())
    everyone = slots == 9
    assert layer.both_sides == (not everyone)
    tolerance = 1e-4 if device.type == "cpu" else 5e-2

    def converse(passes: Sequence[int]) -> None:
        ids = torch.randint(0, 96, (sum(passes),), generator=torch.Generator().manual_seed(1))
        caches = ours.new_cache(48), LatentCache(wanted.config, 48)
        for part in ids.split(list(passes)):
            logits, expected = ours.forward(part, caches[0]), wanted.forward(part, caches[1])
            assert float((logits - expected).abs().max() / expected.abs().max()) <= tolerance
            assert all(number * placed._slot >= arena.taken for number, _ in layer.table.slots())
            assert arena.taken >= caches[0].length * card_cache_bytes(160, 2, 1)

    converse([40])
    assert (len(layer.table.held), layer.table.empty_slots, layer.both_sides) == (slots - 4, [], True)
    converse([1] * 3)
    assert (len(layer.table.held), layer.table.empty_slots) == (slots - 4, [1, 2, 3])
    converse([1] * 3)
    assert (len(layer.table.held), layer.both_sides) == (slots - 1, not everyone)
    assert forgotten == ([True, False] if everyone else [])
    converse([21, 1])
    assert (len(layer.table.held), layer.both_sides) == (slots - 3, True)
    assert forgotten == ([True, False, True] if everyone else [])
    placed.close()


def test_room_is_left_only_where_much_less_is_enough_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmoe.model.card.cache.CACHE_STEP", 4)
    monkeypatch.setattr("localmoe.model.card.cache._PATIENCE", 3)
    config, a_token = ModelConfig.from_dict(BASE), card_cache_bytes(160, 2, 1)
    device = torch.device("cpu")
    arena, left = Arena(100 * a_token, device, taken=8 * a_token), []
    arena.take_back = lambda before: left.append((before // a_token, arena.taken // a_token))
    latents = CardLatents(config, 96, torch.float32, range(2), device, arena)

    def passes(*tokens: int) -> None:
        for each in tokens:
            latents.make_room(each)
            latents.leave_room(each)

    passes(64, 60, 33, 64, 33, 33, 33, 33)  # a few tokens taken back, and up to half of all
    passes(16, 16, 33, 16, 16, 33, 16, 16, 64)  # not long enough, each time
    assert left == []
    passes(30, 31, 32)
    assert left == [(64, 32)]
    passes(17, 17, 17, 16, 16, 16)
    assert left == [(64, 32), (32, 16)]
    passes(*[1] * 9)
    assert left[2:] == [(16, 8)]  # never less than at the beginning
    whole = CardLatents(config, 96, torch.float32, range(2), device)
    for _ in range(9):
        whole.leave_room(1)
    assert whole.nbytes == 96 * a_token


@pytest.mark.parametrize(("layers", "head"), [(1, True), (2, False)])
def test_layers_on_the_cpu(layers: int, head: bool, device: torch.device) -> None:
    assert_alike(*models(device, layers=layers, head=head), FEW_AND_MANY)


@pytest.mark.parametrize(("cache", "tolerance"), [("bf16", 2e-2), ("int8", 5e-2)])
def test_rounded_caches(cache: str, tolerance: float, device: torch.device) -> None:
    # no router, which a rounding could make choose otherwise
    assert_alike(*models(device, changes={"first_k_dense_replace": 2}, cache=cache), FEW_AND_MANY, tolerance)


def test_rows_have_their_bits_alone_and_together(device: torch.device) -> None:
    ours, _ = models(device, on_card=(0, 3, 5), kernels="portable")
    ids = torch.arange(3, 8)

    def logits(passes: Sequence[int]) -> Tensor:
        cache = ours.new_cache(48)
        return torch.cat([ours.forward(part, cache) for part in ids.split(list(passes))])

    one_by_one = logits([1] * 5)
    assert torch.equal(logits([1, 4]), one_by_one)


def test_a_drafter_gets_the_last_states_of_a_long_pass(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = models(device)
    monkeypatch.setattr("localmoe.model.card.model._STATES", 4)
    logits, states = ours.forward_with_states(torch.arange(9), ours.new_cache(48))
    assert states.shape == (4, 64)
    torch.testing.assert_close(ours.logits(states), logits[-4:], rtol=0, atol=1e-5)


def test_tokens_taken_back_and_a_cache_that_lost_its_memory(device: torch.device) -> None:
    ours, _ = models(device)
    first = ours.new_cache(48)
    ids = torch.arange(3)
    wanted = ours.forward(ids, first)[-1]
    first.truncate(1)
    assert torch.equal(ours.forward(ids[1:], first)[-1], wanted)
    logits, states = ours.forward_with_states(ids[:1], first)
    assert states.shape == (1, 64)
    first.truncate(3)
    assert torch.equal(ours.forward(ids[:1], first), logits)
    assert torch.equal(ours.logits(states), logits)
    second = ours.new_cache(10)
    with pytest.raises(UsageError, match="another generation"):
        ours.forward(ids, first)
    with pytest.raises(ContextOverflowError):
        ours.forward(torch.arange(11), second)
    with pytest.raises(InputError, match="vocabulary of 96"):
        ours.forward(torch.tensor([96]), second)
    assert second.length == 0
    assert second.nbytes == 2 * 48 * 40 * 4


@pytest.mark.parametrize(
    ("changes", "layers", "on_card", "parts"),
    [
        ({}, 2, (0, 3, 5), {"dense", "router", "shared expert", "experts on GPU", "waiting", "head"}),
        ({"n_shared_experts": 0}, 2, (), {"dense", "router", "experts on GPU", "waiting", "head"}),
        ({}, 1, range(8), {"dense"}),  # the rest is the CPU's, which has a profile of its own
    ],
    ids=["experts on both sides", "all experts on the CPU", "a layer on the CPU"],
)
def test_a_tokens_time_by_part(
    changes: dict[str, Any], layers: int, on_card: Sequence[int], parts: set[str], device: torch.device
) -> None:
    """The parts are there and are a pass's time; the conversation and the counts are as before."""
    ours, wanted = models(device, changes=changes, layers=layers, on_card=on_card, kernels="portable")
    ids = torch.arange(4)
    cache, untouched = ours.new_cache(48), LatentCache(wanted.config, 48, ours._kernels.cache_dtype)
    ours.forward(ids, cache)
    counted = [layer.uses.clone() for layer in ours._layers if layer.uses is not None]
    started = time.perf_counter()
    split = ours.split([7, 8], cache)
    elapsed = time.perf_counter() - started
    assert cache.length == 4
    assert all(map(torch.equal, counted, [layer.uses for layer in ours._layers if layer.uses is not None]))
    away = layers == 2 and len(on_card) < 8
    if device.type == "cpu":  # nothing runs beside on the interpreter
        parts = parts | ({"experts on CPU"} if away else set())
        assert split.beside == {}
        assert 0 < 2 * sum(split.parts.values()) < elapsed
    else:
        assert set(split.beside) == ({"experts on CPU", "copies"} if away else set())
    assert set(split.parts) == parts | {"norms", "attention", "copies"}
    assert all(spent > 0 for spent in split.parts.values())
    wanted.forward(ids, untouched)
    found, expected = ours.forward(torch.tensor([9]), cache), wanted.forward(torch.tensor([9]), untouched)
    assert float((found - expected).abs().max() / expected.abs().max()) < 5e-2  # native kernels round activations
    cache.advance(cache.capacity - cache.length)
    with pytest.raises(ContextOverflowError):
        ours.split([7], cache)


def test_a_pass_that_finds_no_memory_is_done_in_halves(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, wanted = models(device, changes={"first_k_dense_replace": 2})
    layer, asked = ours._layers[0], []
    many = layer.many

    def short(x: Tensor, *rest: Any) -> Tensor:
        asked.append(len(x))
        if len(x) > most:
            raise torch.OutOfMemoryError
        return many(x, *rest)

    monkeypatch.setattr(layer, "many", short)
    monkeypatch.setattr("localmoe.model.card.model._LEAST_PASS", 4)
    most = 6
    assert_alike(ours, wanted, (11,))
    assert asked == [11, 5, 6]
    assert ours.prefill_chunk == 5
    most = 1
    cache = ours.new_cache(48)
    with pytest.raises(DeviceError, match="does not hold 4 tokens of a prompt"):
        ours.forward(torch.arange(9), cache)
    assert cache.length == 0
