"""Rotary position embedding as DeepSeek applies it: interleaved pairs, YaRN with two mscales.

RoPE: https://arxiv.org/abs/2104.09864. YaRN: https://arxiv.org/abs/2309.00071. What is DeepSeek's own is in
modeling_deepseek.py of deepseek-ai/DeepSeek-V2 and DeepSeek-V3 on the hub: `mscale` and `mscale_all_dim`
scale the rotated part by their ratio, and `mscale_all_dim` squared scales the softmax.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from localmoe.model.config import ModelConfig, Yarn

_FIRST_POSITIONS = 1024


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """What attention scores are multiplied by: 1/sqrt(query width), times mscale squared under YaRN."""
    scale = float(config.qk_head_dim**-0.5)
    if config.yarn is not None:
        scale *= _mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale


def rotation_scale(yarn: Yarn | None) -> float:
    """What the rotated parts of query and key are multiplied by.

    transformers falls back to mscale 1 where `mscale_all_dim` is 0 or missing; DeepSeek's code, followed
    here, always takes the ratio (it differs for an `mscale` other than 1 alone; no published model has it).
    """
    if yarn is None:
        return 1.0
    return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians a position for each pair: float32 [qk_rope_head_dim / 2]."""
    width = config.qk_rope_head_dim
    powers = torch.arange(0, width, 2, dtype=torch.float32) / width
    plain = 1.0 / (config.rope_theta**powers)  # [width/2]
    yarn = config.yarn
    if yarn is None:
        return plain
    low = math.floor(_correction_dimension(yarn.beta_fast, config))
    high = math.ceil(_correction_dimension(yarn.beta_slow, config))
    low, high = max(low, 0), min(high, width - 1)
    # 0 keeps a pair's frequency, 1 divides it by the factor; 0.001 is DeepSeek's guard for an empty ramp
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / (high - low or 0.001)
    ramp = ramp.clamp(0.0, 1.0)
    return plain / yarn.factor * ramp + plain * (1.0 - ramp)


def _correction_dimension(rotations: float, config: ModelConfig) -> float:
    """The dimension whose pair turns `rotations` times over the original context."""
    assert config.yarn is not None
    turns = config.yarn.original_context / (rotations * 2 * math.pi)
    return config.qk_rope_head_dim * math.log(turns) / (2 * math.log(config.rope_theta))


class Rope:
    """Rotations by position, computed once for every position that was ever needed."""

    def __init__(self, config: ModelConfig) -> None:
        self._frequencies = inverse_frequencies(config)
        self._scale = rotation_scale(config.yarn)
        self._table = torch.empty(0, config.qk_rope_head_dim // 2, dtype=torch.complex64)

    def rotations(self, start: int, count: int) -> Tensor:
        """Rotations of positions start .. start + count - 1: complex64 [count, qk_rope_head_dim / 2]."""
        end = start + count
        if end > len(self._table):
            # doubling, so that a long context costs its length and a short one never pays for the maximum
            self._table = self._compute(max(end, 2 * len(self._table), _FIRST_POSITIONS))
        return self._table[start:end]

    def _compute(self, positions: int) -> Tensor:
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), self._frequencies)
        return torch.polar(torch.full_like(angles, self._scale), angles)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) of `x` [..., T, d] by `rotations` [T, d/2]; the layout stays.

    modeling_deepseek.py moves the pairs' halves apart instead. Scores are the same, since queries and keys
    are permuted alike; keeping the layout is what DeepSeek-V3's inference/model.py does.
    """
    own = x.clone(memory_format=torch.contiguous_format)  # a complex view needs even strides and offset
    pairs = torch.view_as_complex(own.view(*x.shape[:-1], -1, 2))  # [..., T, d/2]
    return torch.view_as_real(pairs * rotations).flatten(-2)
