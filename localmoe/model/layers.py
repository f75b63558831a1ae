"""The plain parts of a layer: where weights come from, linear, RMSNorm.

Legend of shape comments, here and in mla.py, moe.py, deepseek.py: T tokens of this pass, S tokens with the
cached ones, H hidden_size, A attention heads, r kv_lora_rank, n qk_nope_head_dim, p qk_rope_head_dim,
v v_head_dim, E routed experts, k experts a token, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from localmoe.formats.weights import Weight, dequantize, rows_of
from localmoe.kernels.dispatch import Kernels
from localmoe.kernels.experts import ExpertWeights


class WeightSource(Protocol):
    """Where weights come from; a Checkpoint is one."""

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored."""
        ...

    def weight(self, module: str) -> Weight:
        """A linear module's matrix, in whatever form it is stored; `module` has no `.weight` at its end."""
        ...

    def __contains__(self, name: str) -> bool: ...


class Linear:
    """y = x W^T + b for a matrix in any stored form."""

    def __init__(self, source: WeightSource, module: str, kernels: Kernels, *, bias: bool = False) -> None:
        self._product = kernels.product(source.weight(module))
        self._bias = source.tensor(f"{module}.bias").float() if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 [T, in] -> [T, out]."""
        y = self._product(x)
        return y if self._bias is None else y + self._bias


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, source: WeightSource, module: str, eps: float) -> None:
        self.weight = source.tensor(f"{module}.weight").float()
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self._eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of float32 `x` [..., d] with `weight` [d]."""
    return F.rms_norm(x, weight.shape, weight, eps)


def expert_weights(source: WeightSource, module: str) -> ExpertWeights:
    """Gate, up and down of a gated MLP: a dense layer's, a routed expert's, or the shared experts' (one wide MLP)."""
    return (
        source.weight(f"{module}.gate_proj"),
        source.weight(f"{module}.up_proj"),
        source.weight(f"{module}.down_proj"),
    )


def embedding_rows(table: Weight, token_ids: Tensor) -> Tensor:
    """Rows `token_ids` [T] of `table` [V, H] as float32 [T, H]: reads those rows only."""
    return dequantize(rows_of(table, token_ids))
