"""Counting experts changes nothing and counts every choice."""

from __future__ import annotations

import pytest
import torch

import localmoe
from localmoe.formats.weights import DenseWeight
from localmoe.kernels.dispatch import Kernels
from localmoe.offload.counts import ExpertCounts


def test_every_choice_is_counted_and_the_logits_are_the_same() -> None:
    ids = torch.randint(0, 4096, (50,), generator=torch.Generator().manual_seed(1))
    with localmoe.load("demo:source") as engine:
        expected, config = engine.logits(ids), engine.config
    counts = ExpertCounts(config.n_routed_experts)
    with localmoe.load("demo:source", counts=counts) as engine:
        assert torch.equal(engine.logits(ids), expected)
    moe = [layer for layer, is_moe in enumerate(config.moe_layers) if is_moe]
    uses = counts.uses()
    assert list(uses) == moe
    for layer in moe:
        assert len(uses[layer]) == config.n_routed_experts
        assert sum(uses[layer]) == 50 * config.num_experts_per_tok
        assert max(uses[layer]) <= 50  # a token's experts are distinct
    counts.reset()
    assert sum(map(sum, counts.uses().values())) == 0


@pytest.mark.parametrize("kernels", ["reference", "portable"])
def test_the_experts_counted_are_those_that_were_named(kernels: str) -> None:
    weight = DenseWeight(torch.ones(8, 8, dtype=torch.bfloat16))
    products = Kernels.choose(kernels, threads=1).experts(4, lambda _: (weight, weight, weight))
    counts = ExpertCounts(4)
    watched = counts.watching(lambda _: products)(3)
    watched(torch.ones(2, 8), torch.tensor([[0, 2], [2, 3]]), torch.ones(2, 2))
    watched(torch.ones(1, 8), torch.tensor([[2, 1]]), torch.ones(1, 2))
    assert counts.uses() == {3: [1, 1, 3, 1]}
