"""What was computed once is not computed again, whichever way a conversation goes; and it is the same to the bit."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import localmoe
from localmoe.branches import Branch, Branches, common
from localmoe.load import Engine, load
from localmoe.model.config import ModelConfig
from localmoe.model.kv_cache import LatentCache
from localmoe.session import CachedTokens

DEMO = Path(localmoe.__file__).parent / "data" / "demo"


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_common_beginnings() -> None:
    assert common(ids(), ids(1)) == 0
    assert common(ids(1, 2), ids(1, 2, 3)) == 2
    assert common(ids(1, 2, 4), ids(1, 2, 3)) == 2
    assert common(ids(5), ids(1)) == 0


def test_branches_are_found_shortened_and_forgotten_the_oldest_first() -> None:
    def branch(start: int, *values: int) -> Branch:
        count = len(values)
        rows = torch.arange(start, count)[:, None].float()
        return Branch(ids(*values), start, {0: rows}, torch.arange(max(start, 1) - 1, count - 1)[:, None])

    branches = Branches()
    branches.add(branch(2, 1, 2, 3, 4, 5))
    branches.add(branch(0, 7, 8))
    assert branches.longest([1, 2, 3, 4, 9], 1) is None  # its first rows are not in use
    found = branches.longest([1, 2, 3, 4, 9], 2)
    assert found is not None
    left, known = found
    assert known == 4
    assert left.rows_of(0, 2, 4).tolist() == [[2], [3]]
    assert branches.longest([1, 2, 9], 2) is None
    assert branches.tokens == 5
    branches.give(left, 4)
    assert branches.tokens == 3
    again = branches.longest([1, 2, 3, 4, 5], 4)
    assert again is not None
    assert again[1] == 5
    assert again[0].rows_of(0, 4, 5).tolist() == [[4]]
    rest = again[0].drafted_of(3, 4)
    assert rest is not None
    assert rest.tolist() == [[3]]
    branches.keep_within(1)
    assert branches.longest([7, 8], 0) is None
    assert branches.longest([1, 2, 3, 4, 5], 4) is not None
    branches.keep_within(0)
    assert (branches.tokens, branches.nbytes) == (0, 0)


CONFIG = ModelConfig.from_dict(
    {
        "model_type": "deepseek_v3",
        **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank"), 8),
        **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 4),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_shared_experts", "n_group"), 1),
        **dict.fromkeys(("num_experts_per_tok", "routed_scaling_factor", "topk_group"), 1),
        "num_hidden_layers": 2,
        "first_k_dense_replace": 0,
        "n_routed_experts": 4,
        "q_lora_rank": None,
        "vocab_size": 50,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
)


class Recorder:
    """A model whose latents are the token and its place, so that a wrong row shows."""

    def __init__(self) -> None:
        self.computed = 0

    def forward(self, token_ids: Tensor, cache: LatentCache, *, last_only: bool = False) -> Tensor:
        self.computed += len(token_ids)
        places = torch.arange(cache.length, cache.length + len(token_ids))
        for layer in cache.layers:
            rows = torch.zeros(len(token_ids), CONFIG.latent_width)
            rows[:, 0], rows[:, 1], rows[:, 2] = token_ids, places, layer
            cache.append(layer, rows)
        cache.advance(len(token_ids))
        return torch.zeros(1, 50)


def use(cached: CachedTokens, model: Recorder, wanted: Sequence[int]) -> int:
    """Compute `wanted`; returns how many tokens that took. Every row is checked."""
    before = model.computed
    known, turn = cached.begin(wanted)
    cached.extend(model, list(wanted[known:]), turn)
    assert cached.token_ids == tuple(wanted)
    for layer in cached.cache.layers:
        rows = cached.cache.reserve(layer, 0)
        assert rows[:, 0].tolist() == list(wanted)
        assert rows[:, 1].tolist() == list(range(len(wanted)))
        assert (rows[:, 2] == layer).all()
    return model.computed - before


def test_any_walk_has_the_right_rows_and_computes_only_what_is_new() -> None:
    dice = random.Random(3)
    cached, model = CachedTokens(LatentCache(CONFIG, 4000)), Recorder()
    texts = [[dice.randrange(50) for _ in range(40)]]
    seen: set[tuple[int, ...]] = set()
    for _ in range(300):
        if dice.random() < 0.5:
            text = dice.choice(texts)
        else:  # fork off an old text
            old = dice.choice(texts)
            text = old[: dice.randrange(len(old))] + [dice.randrange(50) for _ in range(dice.randrange(20, 60))]
            texts.append(text[:150])
            text = texts[-1]
        known = max((n for n in range(len(text) + 1) if tuple(text[:n]) in seen), default=0)
        took = use(cached, model, text)
        if cached._branches.tokens + len(text) < 3800:  # nothing was forgotten
            # An end of up to 15 tokens is not kept, and the last token is always computed
            assert took <= len(text) - known + 16
        seen |= {tuple(text[:n]) for n in range(len(text) + 1)}
        assert cached._branches.tokens + len(text) <= 4000
    assert len(texts) > 100


def test_two_conversations_in_turn_are_each_computed_once() -> None:
    cached, model = CachedTokens(LatentCache(CONFIG, 400)), Recorder()
    system, first, second = [1] * 30, [2] * 50, [3] * 60
    assert use(cached, model, [*system, *first]) == 80
    assert use(cached, model, [*system, *second]) == 60
    first += [4] * 20
    assert use(cached, model, [*system, *first]) == 20
    assert use(cached, model, [*system, *second]) == 1
    assert cached.nbytes > cached.cache.nbytes


def test_what_is_kept_and_what_is_used_fit_the_capacity_together() -> None:
    cached, model = CachedTokens(LatentCache(CONFIG, 100)), Recorder()
    use(cached, model, [1] * 60)
    use(cached, model, [2] * 30)
    assert cached._branches.tokens == 60
    use(cached, model, [2] * 50)
    assert cached._branches.tokens == 0
    assert use(cached, model, [1] * 60) == 60


class TestWithAModel:
    """Counts of tokens computed, and the same tokens as from an empty cache."""

    @pytest.fixture(scope="class")
    @classmethod
    def artifact(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        from quantize.pipeline import quantize

        directory = tmp_path_factory.mktemp("branches") / "compact"
        quantize(DEMO, directory, "compact", grid="absmax")
        return directory

    @pytest.fixture(scope="class", params=[0, 2], ids=["plain", "mtp"])
    @classmethod
    def engine(cls, request: pytest.FixtureRequest, artifact: Path) -> Iterator[Engine]:
        with load(artifact, ctx=512, threads=1, mtp=request.param) as engine:
            yield engine

    @pytest.fixture(scope="class", params=[0, 2], ids=["plain", "mtp"])
    @classmethod
    def reference(cls, request: pytest.FixtureRequest, artifact: Path) -> Iterator[Engine]:
        """Its passes of any length round alike."""
        with load(artifact, ctx=512, kernels="reference", mtp=request.param) as engine:
            yield engine

    def ask(self, engine: Engine, messages: list[dict[str, str]], count: int = 24) -> tuple[str, int, int]:
        """(answer, tokens computed of the prompt, tokens of the prompt). Each token's logprob is what an empty cache
        gives the same text, but for the order of float32 sums."""
        options = {"max_tokens": count, "temperature": 0.8, "seed": 40 + len(messages)}
        steps = list(engine.generate(messages, reuse_prefix=True, **options))
        prompt, drawn = engine.prompt_ids(messages), [step.token_id for step in steps]
        cold = engine.logits([*prompt, *drawn])[len(prompt) - 1 : -1].log_softmax(-1)  # [T, V]
        wanted = cold.gather(1, torch.tensor(drawn)[:, None])[:, 0]
        apart = (torch.tensor([step.logprob for step in steps]) - wanted).abs()
        assert float(apart.max()) < 1e-4  # found: 6e-6; one other token in the prompt makes 0.015 to 0.15
        assert float(apart.max()) < 0.15
        stats = steps[-1].stats
        assert stats is not None
        return "".join(step.text for step in steps), stats.prompt_tokens - stats.reused_tokens, stats.prompt_tokens

    def test_every_way_a_chat_goes(self, reference: Engine) -> None:
        reference._cached = None
        more = 1 if reference._mtp is not None else 0  # its state at the fork is computed again

        def new(messages: list[dict[str, str]], old: list[dict[str, str]]) -> int:
            """Tokens of a prompt behind what it has in common with another."""
            wanted = np.array(reference.prompt_ids(messages))
            return len(wanted) - min(common(wanted, np.array(reference.prompt_ids(old))), len(wanted) - 1)

        system = {"role": "system", "content": "You tell stories of animals to small children, slowly and kindly. " * 3}
        first = [system, {"role": "user", "content": "Tell me a story about a fox and a drum in the forest"}]
        answer, computed, asked = self.ask(reference, first)
        assert computed == asked

        second = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "And what then?"}]
        reply, computed, _ = self.ask(reference, second)  # a second turn
        assert computed <= new(second, first) + more
        assert computed < new(second, first) or not answer  # the answer too is known, as far as it reads the same
        assert self.ask(reference, second)[1] <= 1 + more  # /regen
        assert self.ask(reference, first)[1] <= 1 + more  # /undo, and the same question
        third = [*second, {"role": "assistant", "content": reply}, {"role": "user", "content": "Go on"}]
        assert self.ask(reference, third)[1] <= new(third, second) + more  # back again: nothing was lost
        edited = [*first[:1], {"role": "user", "content": "Tell me a story about a fox and a drum in the city"}]
        assert self.ask(reference, edited)[1] <= new(edited, first) + more  # /edit
        other = [system, {"role": "user", "content": "What does a boat do?"}]
        assert self.ask(reference, other)[1] <= new(other, first) + more  # another chat of the same system prompt
        assert self.ask(reference, third)[1] <= 1 + more

        rewritten = [*third[:2], {"role": "assistant", "content": "Short."}, *third[3:]]  # a template drops thinking
        assert self.ask(reference, rewritten)[1] <= new(rewritten, third) + more

    def test_logits_behind_a_known_beginning_are_a_cold_ones_to_the_bit(self, engine: Engine) -> None:
        """Where the passes have the same lengths, as the kernels do not depend on what else is in a pass."""
        text = engine.prompt_ids("Once upon a time a fox and a boat went down the river, and the drum said nothing")
        model = engine.model

        def passes(cached: CachedTokens, wanted: Sequence[int], start: int, turn: int) -> Tensor:
            parts = [wanted[place : place + 4] for place in range(start, len(wanted), 4)]
            return torch.cat([cached.extend(model, list(part), turn, every=True) for part in parts])

        cold = engine._new_cache()
        _, turn = cold.begin(text)
        wanted = passes(cold, text, 0, turn)
        warm = engine._new_cache()
        _, turn = warm.begin(text)
        passes(warm, text, 0, turn)
        other = [*text[:4], *[9] * 20]
        known, turn = warm.begin(other)
        passes(warm, other, known, turn)
        known, turn = warm.begin(text)  # back to the first
        assert known >= len(text) - 2
        found = passes(warm, text, known, turn)
        assert torch.equal(found, wanted[known:])
