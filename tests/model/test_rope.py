"""RoPE and YaRN against formulas written out number by number."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from localmoe.model.config import ModelConfig
from localmoe.model.rope import Rope, inverse_frequencies, rotate, rotation_scale, softmax_scale

YARN = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}


@pytest.fixture
def config_with(base_config: dict[str, Any]) -> Any:
    def build(**scaling: Any) -> ModelConfig:
        sizes = {"qk_rope_head_dim": 64, "max_position_embeddings": 163840}
        return ModelConfig.from_dict({**base_config, **sizes, "rope_scaling": scaling or None})

    return build


def test_yarn_frequencies_by_hand(config_with: Any) -> None:
    # base 10000, 64 dims, 4096 positions: 32 turns end at pair 10.47.. -> 10, 1 turn at 22.5.. -> 23
    wanted = []
    for pair in range(32):
        plain = 10000.0 ** (-2 * pair / 64)
        ramp = min(max((pair - 10) / (23 - 10), 0.0), 1.0)
        wanted.append(plain / 40 * ramp + plain * (1 - ramp))
    found = inverse_frequencies(config_with(**YARN))
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=2e-6, atol=0.0)


def test_kimi_ramp_between_neighbours(config_with: Any) -> None:
    # beta_fast == beta_slow: the ramp is one pair wide, everything else is kept or divided
    found = inverse_frequencies(config_with(**YARN, beta_fast=1.0, beta_slow=1.0))
    plain = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    kept = (found / plain - 1).abs() < 1e-5
    assert kept.tolist() == [pair <= 22 for pair in range(32)]
    torch.testing.assert_close(found[23:], plain[23:] / 40)


@pytest.mark.parametrize(
    ("scaling", "rotation", "softmax"),
    [
        ({}, 1.0, 1.0),
        (YARN, 0.1 * math.log(40) + 1, 1.0),
        ({**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, 1.0, (0.0707 * math.log(40) + 1) ** 2),
        ({**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
         (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1), (0.05 * math.log(40) + 1) ** 2),
        ({**YARN, "mscale": 0.6}, 0.06 * math.log(40) + 1, 1.0),  # DeepSeek's rule; transformers ignores it
        ({**YARN, "factor": 0.5, "mscale": 0.6, "mscale_all_dim": 0.7}, 1.0, 1.0),
    ],
)  # fmt: skip
def test_both_mscales(config_with: Any, scaling: dict[str, Any], rotation: float, softmax: float) -> None:
    config = config_with(**scaling)
    assert rotation_scale(config.yarn) == pytest.approx(rotation, rel=1e-12)
    assert softmax_scale(config) == pytest.approx(softmax / math.sqrt(16 + 64), rel=1e-12)


def test_neighbouring_pairs_turn_by_the_position(config_with: Any) -> None:
    config = config_with()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, Rope(config).rotations(5, 3))
    for row, position in enumerate((5, 6, 7)):
        for pair in (0, 1, 9, 31):
            angle = position * 10000.0 ** (-2 * pair / 64)
            a, b = x[row, 2 * pair].item(), x[row, 2 * pair + 1].item()
            cos, sin = math.cos(angle), math.sin(angle)
            wanted = [a * cos - b * sin, a * sin + b * cos]
            assert turned[row, 2 * pair : 2 * pair + 2].tolist() == pytest.approx(wanted, abs=1e-5)


def test_scores_depend_on_distance_alone(config_with: Any) -> None:
    rope = Rope(config_with(**YARN))
    q, k = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(1))
    scores = [
        float(rotate(q, rope.rotations(start + 30, 1)) @ rotate(k, rope.rotations(start, 1)).T)
        for start in (0, 500, 6000)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-3)


def test_the_table_grows_with_the_context_and_stays_the_same(config_with: Any) -> None:
    rope = Rope(config_with(**YARN))
    first = rope.rotations(0, 7).clone()
    far = rope.rotations(5000, 3)
    assert far.shape == (3, 32)
    assert len(rope._table) < 10_000  # of 163,840 possible positions
    assert torch.equal(rope.rotations(0, 7), first)
    fresh = Rope(config_with(**YARN))
    assert torch.equal(fresh.rotations(5000, 3), far)
