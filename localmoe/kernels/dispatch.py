"""Which kernel computes a product. One `Kernels` object is made at load time and handed down; no globals.

T = tokens. Activations are float32; weights stay as they are stored.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from localmoe.errors import DeviceError, UsageError
from localmoe.formats.weights import DenseWeight, Weight
from localmoe.kernels import cpu, reference
from localmoe.kernels.attention import DecodeAttention, MlaWeights
from localmoe.kernels.experts import ExpertProducts, ExpertWeights
from localmoe.kernels.layer import LayerParts, NativeLayers
from localmoe.kernels.profile import Profile
from localmoe.kernels.routing import NativeRouting, RouterRule

TIERS = ("auto", "reference", *cpu.TIERS)
CACHE_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
LONG_PASS = 64  # tokens: a pass of more leaves memory that is worth giving back
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's


class Kernels:
    """The products of one engine: a kernel tier and its threads."""

    def __init__(self, tier: str, backend: cpu.Backend | None, cache_dtype: torch.dtype | None = None) -> None:
        self.tier = tier
        self.backend = backend
        self.cache_dtype = cache_dtype or (torch.float32 if backend is None else torch.bfloat16)
        """What the latent cache holds: bfloat16, or for the reference float32, if nothing else is asked for."""
        self._long_passes = False
        self.profile = Profile(None if backend is None else backend.kernels.take_seconds)

    @classmethod
    def choose(cls, tier: str = "auto", threads: int | None = None, cache_dtype: str = "auto") -> Kernels:
        """The named tier, or for "auto" the best one this CPU has; `cache_dtype` one of CACHE_DTYPES or "auto".

        Raises UsageError for an unknown name or thread count, DeviceError for a tier this CPU lacks.
        """
        if cache_dtype not in ("auto", *CACHE_DTYPES):
            raise UsageError(f"--cache-dtype {cache_dtype}: unknown; choose one of auto, {', '.join(CACHE_DTYPES)}")
        cached = CACHE_DTYPES.get(cache_dtype)
        if tier not in TIERS:
            raise UsageError(f"--kernels {tier}: unknown; choose one of {', '.join(TIERS)}")
        if threads is not None and threads < 1:
            raise UsageError(f"--threads {threads}: at least one is needed")
        if tier == "reference":
            return cls(tier, None, cached)
        available = cpu.available_tiers()
        if tier == "auto":
            tier = available[-1]
        elif tier not in available:
            raise DeviceError(f"--kernels {tier}: this CPU does not have it; it has {', '.join(available)}")
        return cls(tier, cpu.Backend(tier, threads), cached)

    @property
    def threads(self) -> int | None:
        """Threads of the native kernels, or None where torch's own are used."""
        return self.backend.threads if self.backend else None

    def share_cores(self, tokens: int) -> None:
        """Say how large the coming pass is: torch and our team take turns on the same cores.

        A thread of torch's that has just worked waits spinning, which a token's many small steps cannot afford, so
        torch gets one thread in decode. Where the reference computes, torch keeps what it has. When decode follows a
        prompt, what the prompt's arrays leave in malloc's heap goes back to the system: hundreds of MB, 5 ms.
        """
        if self._long_passes and tokens <= cpu.MATVEC_TOKENS and _malloc_trim is not None:
            _malloc_trim(0)
        self._long_passes = tokens > LONG_PASS
        if self.backend is None:
            return
        wanted = 1 if tokens <= cpu.MATVEC_TOKENS else self.backend.threads
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    def ask_ahead(self, nbytes: int, tells: bool) -> None:
        """Ask for experts that are not in memory so many bytes ahead of computing them, for all that a token chose at
        once. `tells`: the system says what is in memory. Changes no result; the reference does without."""
        if self.backend is not None:
            self.backend.kernels.ask_ahead(nbytes, tells)

    @property
    def bytes_asked(self) -> int:
        """Bytes of experts that were asked for so far."""
        return 0 if self.backend is None else self.backend.kernels.bytes_asked()

    def product(self, weight: Weight) -> Product:
        """x @ W^T for this matrix."""
        return Product(weight, self.backend)

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """x @ W^T, once: float32 [T, in], W [out, in] as stored -> float32 [T, out]."""
        return self.product(weight)(x)

    def experts(
        self, count: int, look_up: Callable[[int], ExpertWeights], shared: ExpertWeights | None = None
    ) -> ExpertProducts:
        """A layer's `count` routed experts and its shared one."""
        return ExpertProducts(self.backend, count, look_up, shared)

    def attention(self, weights: MlaWeights) -> DecodeAttention | None:
        """One layer's absorbed attention in one call, or None where a matrix has no native kernel."""
        return DecodeAttention.choose(self.backend, weights)

    def routing(self, rule: RouterRule) -> NativeRouting | None:
        """A router's choice in one call, or None where the reference computes."""
        return None if self.backend is None else NativeRouting(rule)

    def layers(self, parts: Sequence[LayerParts]) -> NativeLayers | None:
        """Whole layers in one call, or None where a part has no native form."""
        return NativeLayers.choose(self.backend, parts)

    def expert(self, x: Tensor, gate: Weight, up: Weight, down: Weight) -> Tensor:
        """One expert's SwiGLU: down(silu(gate x) * up x), float32 [T, H] -> [T, H]."""
        return MLP((gate, up, down), self)(x)


class MLP:
    """down(silu(gate x) * up x), as a dense layer has it."""

    def __init__(self, weights: ExpertWeights, kernels: Kernels) -> None:
        self.experts = kernels.experts(0, _no_expert, weights)
        """The MLP as the shared expert of none."""

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 [T, H] -> [T, H]."""
        nothing = x.new_empty(len(x), 0)
        return self.experts(x, nothing.long(), nothing)


def _no_expert(index: int) -> ExpertWeights:
    raise IndexError(index)


class Product:
    """x @ W^T for one stored matrix: float32 [T, in] -> float32 [T, out]."""

    def __init__(self, weight: Weight, backend: cpu.Backend | None) -> None:
        self._weight = weight
        self._backend = backend
        self._matrix = None if backend is None else backend.matrix(weight)

    def __call__(self, x: Tensor) -> Tensor:
        if self._backend is None or self._matrix is None or self._torch_is_faster(x):
            return reference.linear(x, self._weight)
        return self._backend.linear(x, self._matrix)

    def _torch_is_faster(self, x: Tensor) -> bool:
        """Where no activations are rounded, torch's matrix product of many rows beats ours."""
        return x.shape[0] > cpu.MATVEC_TOKENS and isinstance(self._weight, DenseWeight)
