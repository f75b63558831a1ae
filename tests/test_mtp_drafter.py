"""The MTP layer's rows follow the text whatever happens: each is of its token, the one after it, and its place."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from localmoe.model.config import ModelConfig
from localmoe.model.kv_cache import LatentCache
from localmoe.session import CachedTokens
from localmoe.session_file import restore, write
from localmoe.sessions import Facts
from localmoe.speculative import MtpDrafter, _States

VOCABULARY = 50
HASH = "ab" * 32
CONFIG = ModelConfig.from_dict(
    {
        "model_type": "deepseek_v3",
        **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank"), 8),
        **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 4),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_shared_experts", "n_group"), 1),
        **dict.fromkeys(("num_experts_per_tok", "routed_scaling_factor", "topk_group"), 1),
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "n_routed_experts": 4,
        "q_lora_rank": None,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
)


class Recorder:
    """A model whose states and latents are the token and its place."""

    def states(self, token_ids: Tensor, cache: LatentCache) -> Tensor:
        places = torch.arange(cache.length, cache.length + len(token_ids))
        rows = torch.zeros(len(token_ids), CONFIG.latent_width)
        rows[:, 0], rows[:, 1] = token_ids, places
        cache.append(0, rows)
        cache.advance(len(token_ids))
        return rows[:, : CONFIG.hidden_size].clone()

    def logits(self, states: Tensor) -> Tensor:
        return torch.zeros(len(states), VOCABULARY)

    def forward(self, token_ids: Tensor, cache: LatentCache, *, last_only: bool = False) -> Tensor:
        return self.forward_with_states(token_ids, cache)[0]

    def forward_with_states(
        self, token_ids: Tensor, cache: LatentCache, *, last_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        states = self.states(token_ids, cache)
        return self.logits(states), states


class Layer:
    """An MTP layer whose rows are the state it saw, the next token and the place; guesses its own place."""

    width = CONFIG.hidden_size

    def remember(self, states: Tensor, next_ids: Sequence[int], cache: LatentCache, start: int) -> None:
        assert len(states) == len(next_ids) > 0
        rows = torch.zeros(len(states), CONFIG.latent_width)
        rows[:, :2], rows[:, 2] = states[:, :2], torch.tensor(list(next_ids)).float()
        rows[:, 3] = torch.arange(start + cache.length, start + cache.length + len(states))
        cache.append(1, rows)
        cache.advance(len(states))

    def step(self, states: Tensor, next_ids: Sequence[int], cache: LatentCache, start: int) -> Tensor:
        assert len(states) <= 8
        self.remember(states, next_ids, cache, start)
        return torch.full((1, self.width), -1.0)  # of a guess: must not stay in the cache

    def logits(self, state: Tensor) -> Tensor:
        return torch.zeros(1, VOCABULARY)


def new(capacity: int = 2000) -> CachedTokens:
    own = LatentCache(CONFIG, capacity, torch.float32, layers=(1,))
    return CachedTokens(LatentCache(CONFIG, capacity), MtpDrafter(Layer(), own))


def check(cached: CachedTokens) -> int:
    """Compare every row; returns how many there are."""
    drafter, ids = cached.drafter, cached.token_ids
    assert isinstance(drafter, MtpDrafter)
    rows = drafter.rows
    assert drafter.end <= len(ids)
    for row, place in zip(rows.tolist(), range(drafter.start, drafter.end), strict=True):
        assert row[:2] == [ids[place], place]
        assert row[3] == place
        if place + 1 < len(ids):
            assert row[2] == ids[place + 1]
    return len(rows)


def go_on(
    cached: CachedTokens, wanted: Sequence[int], dice: random.Random, passes: int, resting: Sequence[int] = ()
) -> None:
    """A prompt, and passes with guesses, of which some are right; those with a number in `resting` are plain ones that
    no guess follows."""
    model = Recorder()
    known, turn = cached.begin(wanted)
    cached.extend(model, list(wanted[known:]), turn)
    for number in range(passes):
        check(cached)
        if number in resting:
            cached.extend(model, [dice.randrange(VOCABULARY)], turn, every=True, guessing=False)
            continue
        token, count = dice.randrange(VOCABULARY), dice.choice((0, 0, 1, 3))
        drafts = cached.draft(token, count, lambda logits, ahead: dice.randrange(VOCABULARY), turn) if count else []
        assert len(drafts) == (0 if number - 1 in resting else count)
        if dice.random() < 0.05:
            return  # an interrupt between the guess and the pass
        cached.extend(model, [token, *drafts], turn, every=True)
        cached.forget(dice.randrange(len(drafts) + 1), turn)


def test_any_walk_has_the_right_rows() -> None:
    dice = random.Random(5)
    cached = new()
    texts = [[dice.randrange(VOCABULARY) for _ in range(60)]]
    for _ in range(300):
        text = dice.choice(texts) if dice.random() < 0.7 else [*cached.token_ids, dice.randrange(VOCABULARY)]
        if dice.random() < 0.6:
            text = text[: dice.randrange(len(text)) + 1] + [
                dice.randrange(VOCABULARY) for _ in range(dice.randrange(40))
            ]
        go_on(cached, text[:300], dice, dice.choice((0, 1, 2, 20)))
        texts.append(list(cached.token_ids))
        check(cached)
        assert isinstance(cached.drafter, MtpDrafter)
        assert cached.drafter.start == 0  # nothing was missed
        assert cached.drafter.seen == len(cached.token_ids)


def test_rows_begin_anew_after_passes_that_no_guess_followed() -> None:
    dice, cached = random.Random(6), new()
    drafter = cached.drafter
    assert isinstance(drafter, MtpDrafter)
    go_on(cached, [dice.randrange(VOCABULARY) for _ in range(30)], dice, 20, resting=range(8, 12))
    assert drafter.start > 30
    assert drafter.seen == len(cached.token_ids)
    go_on(cached, cached.token_ids, dice, 9, resting=range(5, 9))
    assert drafter.seen < len(cached.token_ids)
    known, _ = cached.begin([*cached.token_ids, 1])
    assert known == len(cached.token_ids)  # nothing is computed again for the sake of its rows
    go_on(cached, [*cached.token_ids, 1], dice, 10)
    assert check(cached) > 0


@pytest.mark.parametrize("count", [1, 2, 40])
def test_rows_begin_where_a_session_without_them_ends(tmp_path: Path, count: int) -> None:
    dice, path = random.Random(count), tmp_path / "x.safetensors"
    plain = CachedTokens(LatentCache(CONFIG, 2000))
    text = [dice.randrange(VOCABULARY) for _ in range(count)]
    _, turn = plain.begin(text)
    plain.extend(Recorder(), text, turn)
    facts = Facts([], model_hash=HASH, cache_dtype="float32")
    write(path, facts, plain)
    for _ in range(3):  # opened, gone on with, and kept
        cached = new()
        restore(path, cached, HASH, "float32")
        go_on(cached, [*cached.token_ids, *text], dice, 20)
        assert check(cached) > 0
        drafter = cached.drafter
        assert isinstance(drafter, MtpDrafter)
        assert drafter.start in (count - 1, count)
        write(path, facts, cached)
    go_on(cached, text[: count // 2 + 1], dice, 20)  # back to before they begin
    check(cached)
    go_on(cached, [*text, 1, 2, 3], dice, 300)  # and to a branch without rows; many states wait
    check(cached)


def test_a_pause_is_caught_up_with_in_one_pass() -> None:
    dice, cached, model = random.Random(1), new(), Recorder()
    _, turn = cached.begin([1, 2, 3])
    cached.extend(model, [1, 2, 3], turn)
    for token in range(100):
        cached.extend(model, [token % VOCABULARY], turn, every=True)
    assert check(cached) == 0
    assert cached.draft(7, 1, lambda logits, ahead: dice.randrange(VOCABULARY), turn)
    assert check(cached) == 103


def test_states_are_copies_in_one_piece_of_memory() -> None:
    """Whoever computes them may use their memory again at once."""
    states, kept = _States(), torch.arange(300.0)[:, None].repeat(1, 8)
    for start in range(0, 300, 50):
        block = kept[start : start + 50].clone()
        states.add(block)
        block.zero_()
    assert torch.equal(states.since(0), kept)
    assert torch.equal(states.since(298), kept[298:])
    states.keep_last()
    states.add(kept[:2])
    assert torch.equal(states.since(0), kept[[299, 0, 1]])
    states.clear()
    states.add(kept[7:8])
    assert torch.equal(states.since(0), kept[7:8])
