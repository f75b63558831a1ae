"""The C++ kernels: products over the on-disk layout, on threads of their own.

int4, int8 and NF4 weights meet activations that are rounded to int8, with a scale for every 32 of them; the
integer dot products are exact, so against the reference a result differs by that rounding and by the order
of float32 additions only. bf16 weights meet float32 activations. csrc/ holds the code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localmoe.formats.weights import DenseWeight, Int4Weight, Int8Weight, Nf4Weight, Weight
from localmoe.kernels import _cpu
from localmoe.kernels.cores import physical_cores

TIERS = ("portable", "avx2", "avxvnni", "avx512")
"""From the plainest to the widest; `avx512` means F, BW, VL and VNNI."""

MATVEC_TOKENS = 8
"""Up to so many rows are computed each as if alone, to the bit. Above, weights are unpacked for many rows at once."""

_BANDWIDTH_BYTES = 512 << 20  # more than any cache holds


def available_tiers() -> tuple[str, ...]:
    """The tiers that this CPU and operating system can run, best last."""
    supported = _cpu.supported_tiers()
    return tuple(tier for tier in TIERS if tier in supported)


def array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The same memory as the bindings take it soonest: a tensor, which goes through DLPack in Python, costs a call 5
    microseconds more. bfloat16, which numpy has not, goes as int16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class Backend:
    """One kernel tier and one team of threads, which lives as long as this object."""

    def __init__(self, tier: str, threads: int | None = None) -> None:
        cores = physical_cores()
        self.threads = threads or len(cores)
        self.kernels = _cpu.Kernels(tier, self.threads, cores)
        """What is called with arrays; it waits for its turn."""

    def matrix(self, weight: Weight) -> _cpu.Matrix | None:
        """What the kernels know of a stored matrix, or None where there is no native kernel for its form."""
        match weight:
            case Int4Weight():
                return _cpu.Matrix.int4(weight.packed, weight.scale, weight.group_size)
            case Int8Weight():
                return _cpu.Matrix.int8(weight.packed, weight.scale, weight.group_size)
            case Nf4Weight():
                return _cpu.Matrix.nf4(weight.codes, weight.absmax)
            case DenseWeight() if weight.tensor.dtype == torch.bfloat16:
                return _cpu.Matrix.bf16(weight.tensor)
            case _:
                return None

    def matrices(self, weights: Iterable[Weight]) -> list[_cpu.Matrix] | None:
        """`matrix` of each, or None where one has no native kernel."""
        known = [self.matrix(weight) for weight in weights]
        return None if None in known else [matrix for matrix in known if matrix is not None]

    def linear(self, x: Tensor, matrix: _cpu.Matrix) -> Tensor:
        """x @ W^T: float32 [T, in] -> float32 [T, out].

        A row's result does not depend on the other rows, nor on the number of threads.
        """
        result = torch.empty(x.shape[0], matrix.out_features)
        self.kernels.linear(array(x.contiguous()), matrix, array(result))
        return result

    def experts(self, experts: _cpu.Experts, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts, in ascending order, then the shared expert's output.

        hidden float32 [T, H], expert_ids int64 [T, k], weights float32 [T, k] -> float32 [T, H]. Every expert named
        must have been set; the same holds for rows as in `linear`.
        """
        result = torch.empty_like(hidden)
        self.kernels.experts(experts, array(hidden), array(expert_ids), array(weights), array(result))
        return result

    def job(
        self, experts: _cpu.Experts, hidden: Tensor, expert_ids: Tensor, weights: Tensor, slots: Tensor, result: Tensor
    ) -> _cpu.ExpertJob:
        """See `localmoe.kernels.experts.ExpertProducts.job`; every expert must have been set."""
        arrays = map(array, (hidden, expert_ids, weights, slots, result))
        return _cpu.ExpertJob(self.kernels, experts, *arrays)

    def attention(self, attention: _cpu.Attention, x: Tensor, rotations: Tensor, cache: Tensor, start: int) -> Tensor:
        """Absorbed attention of a few tokens: float32 [T, H] -> [T, H] (`localmoe.model.mla` has the maths).

        rotations float32 [T, qk_rope_head_dim], as real and imaginary parts; cache [S, latent width] float32 or
        bfloat16, or uint8 as `localmoe.model.kv_cache` packs int8, whose rows from `start` on become the tokens'.
        A row's result does not depend on the others.
        """
        result = torch.empty_like(x)
        self.kernels.attention(attention, array(x), array(rotations), array(cache), start, array(result))
        return result

    def read_bandwidth(self) -> float:
        """Bytes a second that this team reads from memory: the best of three passes over 512 MiB."""
        memory = torch.ones(_BANDWIDTH_BYTES, dtype=torch.uint8)
        return max(self.kernels.read_bandwidth(array(memory)) for _ in range(3))
