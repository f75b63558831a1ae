from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import localmoe.errors
from localmoe.errors import ContextOverflowError, InputError, UsageError
from localmoe.generate import Settings, Stats, Step, StopStrings, generate
from localmoe.model.config import ModelConfig
from localmoe.model.kv_cache import LatentCache
from localmoe.sampling import SamplingParams
from localmoe.session import CachedTokens
from localmoe.text import Tokenizer

DEMO = Path(localmoe.errors.__file__).parent / "data" / "demo"
VOCABULARY = 50
CONFIG = ModelConfig.from_dict(
    {
        "model_type": "deepseek_v3",
        **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank"), 8),
        **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 4),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_shared_experts", "n_group", "topk_group"), 1),
        **dict.fromkeys(("num_experts_per_tok", "routed_scaling_factor", "num_hidden_layers"), 1),
        "first_k_dense_replace": 0,
        "n_routed_experts": 4,
        "q_lora_rank": None,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
)


class FakeModel:
    """Predicts a function of all tokens so far, which it reads back from the cache it is given, as a model does."""

    def __init__(
        self, predict: Callable[[list[int]], int] = lambda ids: (sum(ids) * 7 + len(ids)) % VOCABULARY
    ) -> None:
        self.predict = predict
        self.passes: list[int] = []
        self.fail_at: int | None = None

    def forward(self, token_ids: Tensor, cache: LatentCache, *, last_only: bool = False) -> Tensor:
        rows = torch.zeros(len(token_ids), CONFIG.latent_width)
        rows[:, 0] = token_ids
        held = cache.append(0, rows)[:, 0]
        if self.fail_at == len(self.passes):
            raise KeyboardInterrupt
        self.passes.append(len(token_ids))
        cache.advance(len(token_ids))
        ids = [int(id_) for id_ in held]
        ends = range(len(ids) - len(token_ids) + 1, len(ids) + 1)
        logits = torch.zeros(len(ends), VOCABULARY)
        for row, end in enumerate(ends):
            if not last_only or end == len(ids):
                logits[row, self.predict(ids[:end])] = 5.0
        return logits[-1:] if last_only else logits


def new_cache(capacity: int = 64) -> CachedTokens:
    return CachedTokens(LatentCache(CONFIG, capacity))


def expected(prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(FakeModel().predict(ids))
    return ids[len(prompt) :]


def run(
    prompt: Sequence[int], *, cached: CachedTokens | None = None, model: FakeModel | None = None, **settings
) -> list[Step]:
    extras = {name: settings.pop(name) for name in ("end_ids", "detokenizer", "prefill_chunk") if name in settings}
    return list(generate(model or FakeModel(), cached or new_cache(), prompt, Settings(**settings), **extras))


def test_greedy_steps_and_the_last_ones_statistics() -> None:
    steps = run([3, 1, 4], max_tokens=5)
    assert [step.token_id for step in steps] == expected([3, 1, 4], 5)
    assert [step.finish_reason for step in steps] == [None] * 4 + ["length"]
    assert [step.stats is None for step in steps] == [True] * 4 + [False]
    assert steps[0].logprob == pytest.approx(5 - math.log(math.exp(5) + VOCABULARY - 1), rel=1e-5)
    stats = steps[-1].stats
    assert stats is not None
    assert (stats.prompt_tokens, stats.completion_tokens, stats.reused_tokens) == (3, 5, 0)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_chunks_do_not_change_the_answer(chunk: int) -> None:
    model, prompt = FakeModel(), list(range(11))
    steps = run(prompt, model=model, max_tokens=4, prefill_chunk=chunk)
    assert [step.token_id for step in steps] == expected(prompt, 4)
    assert model.passes[:-3] == [min(chunk, 11 - start) for start in range(0, 11, chunk)]
    assert model.passes[-3:] == [1, 1, 1]  # the last token drawn is never computed


def test_an_end_token_stops_and_is_not_text() -> None:
    wanted = expected([5], 20)
    end = wanted[3]
    steps = run([5], end_ids={end})
    assert [step.token_id for step in steps] == wanted[: wanted.index(end) + 1]
    assert (steps[-1].finish_reason, steps[-1].text) == ("stop", "")


@pytest.mark.parametrize(("max_tokens", "count"), [(None, 4), (3, 3), (4, 4), (100, 4)])
def test_the_answer_ends_where_the_context_does(max_tokens: int | None, count: int) -> None:
    cached = new_cache(10)
    steps = run(range(6), cached=cached, max_tokens=max_tokens)
    assert len(steps) == count
    assert steps[-1].finish_reason == "length"
    assert len(cached.token_ids) == 6 + count - 1


@pytest.mark.parametrize("length", [10, 11, 500])
def test_a_prompt_without_room_for_an_answer_is_refused_before_any_work(length: int) -> None:
    model = FakeModel()
    with pytest.raises(ContextOverflowError, match=f"prompt has {length} tokens and the context holds 10"):
        generate(model, new_cache(10), [1] * length, Settings())
    assert model.passes == []


def test_requests_that_cannot_be_met_are_refused_at_the_call() -> None:
    with pytest.raises(InputError, match="empty"):
        generate(FakeModel(), new_cache(), [], Settings())
    with pytest.raises(UsageError, match="tokenizer"):
        generate(FakeModel(), new_cache(), [1], Settings(stop=("x",)))
    for wrong in ({"max_tokens": 0}, {"seed": -1}, {"seed": 1 << 63}, {"stop": ("",)}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Settings(**wrong)


class TestPrefixReuse:
    def test_only_what_is_new_is_computed(self) -> None:
        model, cached = FakeModel(), new_cache()
        first = run([1, 2, 3], cached=cached, model=model, max_tokens=3)
        answer = [step.token_id for step in first]
        assert cached.token_ids == (1, 2, 3, *answer[:-1])
        model.passes.clear()
        prompt = [1, 2, 3, *answer, 9, 9]
        steps = run(prompt, cached=cached, model=model, max_tokens=2)
        assert model.passes[0] == 3  # the answer's last token and the two new ones
        assert [step.token_id for step in steps] == expected(prompt, 2)
        assert steps[-1].stats is not None
        assert steps[-1].stats.reused_tokens == 5

    @pytest.mark.parametrize("prompt", [[1, 2, 3, 4], [1, 2, 9], [9], [1, 2], [1, 2, 3, 4, 5, 6, 7]])
    def test_any_next_prompt_gets_the_answer_of_a_fresh_cache(self, prompt: list[int]) -> None:
        model, cached = FakeModel(), new_cache()
        run([1, 2, 3, 4], cached=cached, model=model, max_tokens=6)
        steps = run(prompt, cached=cached, model=model, max_tokens=5)
        assert [step.token_id for step in steps] == expected(prompt, 5)

    @pytest.mark.parametrize("taken", [0, 1, 3])
    def test_closing_early_leaves_the_cache_right(self, taken: int) -> None:
        cached = new_cache()
        steps = generate(FakeModel(), cached, [1, 2, 3], Settings())
        ids = [next(steps).token_id for _ in range(taken)]
        steps.close()
        assert cached.token_ids == ((1, 2, 3, *ids[:-1]) if taken else ())
        prompt = [1, 2, 3, *ids, 8]
        assert [step.token_id for step in run(prompt, cached=cached, max_tokens=4)] == expected(prompt, 4)

    @pytest.mark.parametrize("fail_at", [0, 1, 2, 4])
    def test_an_interrupt_inside_a_pass_leaves_the_cache_right(self, fail_at: int) -> None:
        model, cached = FakeModel(), new_cache()
        model.fail_at = fail_at
        steps = generate(model, cached, [1, 2, 3], Settings(), prefill_chunk=2)
        with pytest.raises(KeyboardInterrupt):
            list(steps)
        model.fail_at = None
        assert [step.token_id for step in run([1, 2, 3], cached=cached, max_tokens=9)] == expected([1, 2, 3], 9)

    def test_an_older_generation_on_the_same_cache_is_stopped_not_corrupted(self) -> None:
        cached = new_cache()
        older = generate(FakeModel(), cached, [1, 2], Settings())
        next(older)
        newer = generate(FakeModel(), cached, [1, 3], Settings(max_tokens=4))
        assert next(newer).token_id == expected([1, 3], 1)[0]
        with pytest.raises(UsageError, match="another generation"):
            next(older)
        assert [step.token_id for step in newer] == expected([1, 3], 4)[1:]


def test_a_seed_fixes_sampled_tokens() -> None:
    def tokens(seed: int | None) -> list[int]:
        return [step.token_id for step in run([1], max_tokens=30, sampling=SamplingParams(5.0), seed=seed)]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)


def test_only_the_models_time_counts() -> None:
    steps = generate(FakeModel(), new_cache(), [1], Settings(max_tokens=4))
    stats = None
    for step in steps:
        time.sleep(0.05)
        stats = step.stats
    assert stats is not None
    assert 0 < stats.decode_seconds < 0.05
    assert 0 < stats.prefill_seconds < 0.05


def test_rates() -> None:
    stats = Stats(prompt_tokens=100, completion_tokens=11, prefill_seconds=2.0, decode_seconds=5.0, reused_tokens=60)
    assert (stats.prefill_tokens_per_second, stats.decode_tokens_per_second) == (20.0, 2.0)
    one = Stats(prompt_tokens=1, completion_tokens=1, prefill_seconds=0.0, decode_seconds=0.0)
    assert (one.prefill_tokens_per_second, one.decode_tokens_per_second) == (0.0, 0.0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(DEMO)


class TestText:
    """The fake model recites a text of the demo's tokenizer."""

    def recite(self, tokenizer: Tokenizer, text: str, **settings) -> list[Step]:
        ids = tokenizer.encode(text, add_bos=False)
        numbered = sorted(set(ids))  # the fake vocabulary is small

        class Numbered:
            def push(self, token_id: int) -> str:
                return self.stream.push(numbered[token_id])

            stream = tokenizer.stream()

            def finish(self) -> str:
                return self.stream.finish()

        end = len(numbered)
        assert end < VOCABULARY
        script = [numbered.index(id_) for id_ in ids] + [end]
        model = FakeModel(lambda held: script[len(held) - 1])
        return run([0], model=model, detokenizer=Numbered(), end_ids={end}, **settings)

    def test_steps_add_up_to_the_text(self, tokenizer: Tokenizer) -> None:
        text = " The 🐉 said: héllo, 你好."
        steps = self.recite(tokenizer, text)
        assert "".join(step.text for step in steps) == text
        assert not any("\ufffd" in step.text for step in steps)

    def test_an_unfinished_character_at_the_limit_is_shown_as_such(self, tokenizer: Tokenizer) -> None:
        steps = self.recite(tokenizer, "a🐉", max_tokens=2)
        assert "".join(step.text for step in steps).startswith("a\ufffd")

    @pytest.mark.parametrize(
        ("stop", "shown"),
        [
            (("dragon",), "Once a "),
            (("drag",), "Once a "),
            (("n f",), "Once a drago"),
            (("n flew over", "a d"), "Once "),
            (("over the hill.?",), "Once a dragon flew over the hill."),
            (("hill.",), "Once a dragon flew over the "),
            (("O",), ""),
            (("zzz",), "Once a dragon flew over the hill."),
        ],
    )
    def test_stop_strings_cut_exactly(self, tokenizer: Tokenizer, stop: tuple[str, ...], shown: str) -> None:
        text = "Once a dragon flew over the hill."
        steps = self.recite(tokenizer, text, stop=stop)
        assert "".join(step.text for step in steps) == shown
        assert steps[-1].finish_reason == "stop"
        assert (len(steps) <= len(tokenizer.encode(text, add_bos=False))) == (shown != text)

    def test_a_possible_stop_string_is_held_back_and_given_at_the_limit(self, tokenizer: Tokenizer) -> None:
        text = "Once a dragon"
        count = len(tokenizer.encode(text, add_bos=False))
        steps = self.recite(tokenizer, text, stop=("dragon!",), max_tokens=count)
        assert steps[-1].finish_reason == "length"
        assert "".join(step.text for step in steps) == text


def test_stop_strings_do_not_depend_on_how_the_text_is_cut() -> None:
    dice = random.Random(4)
    for _ in range(2000):
        text = "".join(dice.choices("abc", k=dice.randrange(12)))
        words = ["".join(dice.choices("abc", k=dice.randrange(1, 5))) for _ in range(dice.randrange(4))]
        starts = [start for word in words if (start := text.find(word)) >= 0]
        wanted = text[: min(starts, default=len(text))]
        cuts = sorted(dice.choices(range(len(text) + 1), k=4))
        stops, shown = StopStrings(words), ""
        for begin, end in itertools.pairwise([0, *cuts, len(text)]):
            shown += stops.push(text[begin:end])
            assert wanted.startswith(shown)
        assert shown + stops.finish() == wanted
        assert stops.found == bool(starts)
