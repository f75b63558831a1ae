"""The C++ kernels: matrix-vector products over the on-disk layout, on threads of their own.

int4 and int8 weights meet activations that are rounded to int8, with a scale for every 32 of them; the
integer dot products are exact, so against the reference a result differs by that rounding and by the order
of float32 additions only. bf16 weights meet float32 activations. csrc/ holds the code.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from localmoe.formats.weights import DenseWeight, Int4Weight, Int8Weight, Weight
from localmoe.kernels import _cpu

TIERS = ("portable", "avx2", "avxvnni", "avx512")
"""From the plainest to the widest; `avx512` means F, BW, VL and VNNI."""


def available_tiers() -> tuple[str, ...]:
    """The tiers that this CPU and operating system can run, best last."""
    supported = _cpu.supported_tiers()
    return tuple(tier for tier in TIERS if tier in supported)


def physical_cores() -> int:
    """Physical cores this process may use: the memory bus gains nothing from SMT siblings."""
    allowed = os.sched_getaffinity(0)
    cores: set[str] = set()
    for index in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{index}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:  # containers may hide the topology: every processor counts
            cores.add(str(index))
    return max(1, len(cores))


class Backend:
    """One kernel tier and one thread pool, which lives as long as this object."""

    def __init__(self, tier: str, threads: int) -> None:
        self.threads = threads
        self._kernels = _cpu.Kernels(tier, threads)

    def takes(self, weight: Weight) -> bool:
        """Whether there is a native kernel for this form of weight."""
        match weight:
            case Int4Weight() | Int8Weight():
                return True
            case DenseWeight():
                return weight.tensor.dtype == torch.bfloat16
            case _:
                return False

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """x @ W^T: float32 [T, in] -> float32 [T, out]. `takes(weight)` must hold.

        A row's result does not depend on the other rows, nor on the number of threads.
        """
        x = x.contiguous()
        result = torch.empty(x.shape[0], weight.out_features, dtype=torch.float32)  # [T, out]
        match weight:
            case Int4Weight():
                self._kernels.linear_int4(x, weight.packed, weight.scale, weight.group_size, result)
            case Int8Weight():
                self._kernels.linear_int8(x, weight.packed, weight.scale, weight.group_size, result)
            case DenseWeight():
                self._kernels.linear_bf16(x, weight.tensor, result)
            case _:
                raise TypeError(f"no native kernel for {type(weight).__name__}")
        return result
