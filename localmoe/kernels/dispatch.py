"""Which kernel computes a product. One `Kernels` object is made at load time and handed down; no globals.

T = tokens. Activations are float32; weights stay as they are stored.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from localmoe.errors import DeviceError, UsageError
from localmoe.formats.weights import Weight
from localmoe.kernels import cpu, reference

TIERS = ("auto", "reference", *cpu.TIERS)

MATVEC_TOKENS = 8
"""Up to so many rows the int8-activation kernels are used: reading the weights dominates. Above it, one
dequantization is shared by enough rows for float32 matrix products to win."""


class Kernels:
    """The products of one engine: a kernel tier and its threads."""

    def __init__(self, tier: str, backend: cpu.Backend | None) -> None:
        self.tier = tier
        self._backend = backend

    @classmethod
    def choose(cls, tier: str = "auto", threads: int | None = None) -> Kernels:
        """The named tier, or for "auto" the best one this CPU has.

        Raises UsageError for an unknown name or thread count, DeviceError for a tier this CPU lacks.
        """
        if tier not in TIERS:
            raise UsageError(f"--kernels {tier}: unknown; choose one of {', '.join(TIERS)}")
        if threads is not None and threads < 1:
            raise UsageError(f"--threads {threads}: at least one is needed")
        if tier == "reference":
            return cls(tier, None)
        available = cpu.available_tiers()
        if tier == "auto":
            tier = available[-1]
        elif tier not in available:
            raise DeviceError(f"--kernels {tier}: this CPU does not have it; it has {', '.join(available)}")
        return cls(tier, cpu.Backend(tier, threads or cpu.physical_cores()))

    @property
    def threads(self) -> int | None:
        """Threads of the native kernels, or None where torch's own are used."""
        return self._backend.threads if self._backend else None

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """x @ W^T: float32 [T, in], W [out, in] as stored -> float32 [T, out]."""
        if self._backend is not None and x.shape[0] <= MATVEC_TOKENS and self._backend.takes(weight):
            return self._backend.linear(x, weight)
        return reference.linear(x, weight)

    def expert(self, x: Tensor, gate: Weight, up: Weight, down: Weight) -> Tensor:
        """One expert's SwiGLU: down(silu(gate x) * up x), float32 [T, H] -> [T, H]."""
        return self.linear(F.silu(self.linear(x, gate)).mul_(self.linear(x, up)), down)
