"""Absorbed latent attention of up to 8 tokens in one native call, from hidden states to hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.formats.weights import Int4Weight, Nf4Weight, Weight
from localmoe.kernels import _cpu, cpu


@dataclass(frozen=True)
class MlaWeights:
    """One layer's attention, without biases. `query_down` and its norm are there with `q_lora_rank` only."""

    query: Weight  # q_proj or q_b_proj
    latent: Weight  # kv_a_proj_with_mqa
    expand: Weight  # kv_b_proj
    output: Weight  # o_proj
    latent_norm: Tensor
    heads: int
    nope: int  # qk_nope_head_dim
    scale: float  # of the softmax
    epsilon: float  # of the latent norms
    query_down: tuple[Weight, Tensor] | None = None


class DecodeAttention:
    """One layer's attention on the native kernels."""

    def __init__(self, backend: cpu.Backend, native: _cpu.Attention) -> None:
        self._backend = backend
        self.native = native

    @classmethod
    def choose(cls, backend: cpu.Backend | None, weights: MlaWeights) -> DecodeAttention | None:
        """None without native kernels, or where a matrix has no native form."""
        if backend is None:
            return None
        matrices = backend.matrices([weights.query, weights.latent, weights.expand, weights.output])
        if matrices is None or isinstance(weights.expand, Int4Weight | Nf4Weight):
            return None
        norm = weights.latent_norm.tolist()
        query, latent, expand, output = matrices
        native = _cpu.Attention(
            query, latent, expand, output, norm, weights.heads, weights.nope, weights.scale, weights.epsilon
        )
        if weights.query_down is not None:
            down = backend.matrix(weights.query_down[0])
            if down is None:
                return None
            native.set_query_down(down, weights.query_down[1].tolist())
        return cls(backend, native)

    def reads(self, cache: Tensor) -> bool:
        """Whether these kernels have this form of cache."""
        return cache.dtype in (torch.float32, torch.bfloat16, torch.uint8)

    def takes(self, tokens: int, cache: Tensor) -> bool:
        """Whether a pass of so many tokens over this cache is for one call."""
        return tokens <= cpu.MATVEC_TOKENS and self.reads(cache)

    def __call__(self, x: Tensor, rotations: Tensor, cache: Tensor, start: int) -> Tensor:
        """See `cpu.Backend.attention`."""
        return self._backend.attention(self.native, x, rotations, cache, start)
