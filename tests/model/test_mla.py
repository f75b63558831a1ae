"""Naive and absorbed attention are the same function; blocks of heads and the choice of path change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from localmoe.model import mla
from localmoe.model.config import ModelConfig
from localmoe.model.mla import absorbed_attention, cheaper_path, naive_attention

# heads, queries, keys, r, n, p, v
SHAPES = [(4, 1, 9, 24, 16, 8, 20), (3, 6, 6, 32, 8, 4, 8), (5, 7, 40, 16, 24, 6, 12), (16, 2, 100, 512, 128, 64, 128)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor | None]:
    heads, queries, keys, r, n, p, v = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    future = torch.ones(queries, queries, dtype=torch.bool).triu_(1) if queries > 1 else None
    return [
        normal(heads, queries, n) * (n + p) ** -0.5, normal(heads, queries, p) * (n + p) ** -0.5,
        normal(keys, r + p), normal(heads, n, r) * r**-0.5, normal(heads, v, r) * r**-0.5, future,
    ]  # fmt: skip


def by_definition(args: list[Any]) -> Tensor:
    """One head, one query at a time, with nothing but dot products."""
    q_nope, q_pe, rows, k_b, v_b, _ = args
    heads, queries, _ = q_nope.shape
    out = torch.empty(heads, queries, v_b.shape[1], dtype=rows.dtype)
    latent, k_pe = rows[:, : k_b.shape[2]], rows[:, k_b.shape[2] :]
    for head in range(heads):
        for query in range(queries):
            seen = len(rows) - queries + query + 1
            keys, values = latent[:seen] @ k_b[head].T, latent[:seen] @ v_b[head].T
            scores = keys @ q_nope[head, query] + k_pe[:seen] @ q_pe[head, query]
            out[head, query] = torch.exp(scores - scores.max()) @ values / torch.exp(scores - scores.max()).sum()
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_naive_equals_absorbed_equals_the_definition(shape: tuple[int, ...]) -> None:
    args: list[Any] = inputs(shape, torch.float64)
    wanted = by_definition(args)
    # in float64 the two orders of summation differ by rounding alone: 1e-12
    torch.testing.assert_close(naive_attention(*args), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(absorbed_attention(*args), wanted, rtol=1e-12, atol=1e-12)
    single: list[Any] = inputs(shape, torch.float32)
    for attend in (naive_attention, absorbed_attention):
        torch.testing.assert_close(attend(*single), wanted.float(), rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("q_lora_rank", [None, 40])
def test_a_whole_model_is_the_same_on_both_paths(
    q_lora_rank: int | None, transformers_model: Callable[..., Any]
) -> None:
    opened = transformers_model(seed=5, q_lora_rank=q_lora_rank)
    token_ids = torch.randint(0, 211, (50,), generator=torch.Generator().manual_seed(5))
    logits = []
    for path in ("naive", "absorbed", None):
        model, cache = opened.ours(path), opened.cache()
        model.forward(token_ids[:20], cache)
        parts = [model.forward(token_ids[20:37], cache)]
        parts += [model.forward(token_ids[i : i + 1], cache) for i in range(37, 50)]
        logits.append(torch.cat(parts))
    scale = logits[0].abs().max()
    assert float((logits[0] - logits[1]).abs().max() / scale) < 2e-5
    assert float((logits[0] - logits[2]).abs().max() / scale) < 2e-5


def test_blocks_of_heads_change_nothing(
    transformers_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = transformers_model(seed=6)
    token_ids = torch.randint(0, 211, (50,), generator=torch.Generator().manual_seed(6))
    for path in ("naive", "absorbed"):
        whole = opened.ours(path).forward(token_ids, opened.cache())
        for heads in (1, 3):  # of 4; keys and values of one head are 50 * (50 + 16 + 20) float32
            monkeypatch.setattr(mla, "_WORKSPACE_BYTES", heads * 4 * 50 * 86)
            blocks = opened.ours(path).forward(token_ids, opened.cache())
            torch.testing.assert_close(blocks, whole, rtol=1e-4, atol=1e-4)
        monkeypatch.undo()


def test_decode_is_absorbed_and_long_chunks_are_naive(base_config: dict[str, Any]) -> None:
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    config = ModelConfig.from_dict({**base_config, **sizes})
    assert [cheaper_path(config, 1, context) for context in (1, 2, 10_000)] == ["absorbed"] * 3
    assert cheaper_path(config, 32, 32) == "absorbed"  # a short prompt
    assert cheaper_path(config, 512, 512) == "naive"
    assert cheaper_path(config, 512, 100_000) == "naive"
    assert cheaper_path(config, 16, 10_000) == "absorbed"  # a short follow-up to a long context


def test_sharp_heads_leave_no_numbers_that_a_cpu_is_slow_with() -> None:
    """The tiny ones are 0, which changes no sum: float32's rounding is 1e-7 of the largest."""
    scores = 40 * torch.randn(3, 20, 60, generator=torch.Generator().manual_seed(0))
    future = torch.ones(20, 20, dtype=torch.bool).triu_(1)
    plain = scores.clone()
    plain[..., -20:].masked_fill_(future, float("-inf"))
    wanted = plain.softmax(-1)
    assert ((wanted > 0) & (wanted < 1.2e-38)).any()
    found = mla._causal_softmax(scores, future)
    assert found[found > 0].min() >= 1e-30
    assert (found == wanted)[wanted > 1e-30].all()
    assert found.sum(-1).sub(1).abs().max() < 1e-6
