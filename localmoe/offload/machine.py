"""What a machine can do, in numbers, each with where it comes from. `localmoe doctor` measures them; `plan` reckons.

A number nobody measured is an assumption and says so: a plan for a card that is not here is still a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Origin = Literal["measured", "cached", "assumed"]

GIB = 1 << 30

FORMS = ("int4", "int8", "nf4", "bf16")
"""How matrices are stored, for which there are kernels with a speed of their own."""
CPU_FIGURES = {
    "read": "bytes/s",
    "cached": "bytes/s",
    **{f"weights.{form}": "bytes/s" for form in FORMS},
    "experts": "bytes/s",
    **{f"many.{form}": "multiply-adds/s" for form in FORMS},
    "latents": "multiply-adds/s",
    "attention": "multiply-adds/s",
    "layer": "s",
}
"""The figures of a CPU by name, with their units."""
FIGURE_UNITS = {
    **CPU_FIGURES,
    "disk": "bytes/s",
    "gpu.read": "bytes/s",
    "gpu.macs": "multiply-adds/s",
    "gpu.pcie": "bytes/s",
    "gpu.layer": "s",
    "gpu.handoff": "s",
}
"""Every figure of a machine."""

# A desktop without a measurement: dual-channel DDR5-5600 reads about 60 of its 90 GB/s, DDR4-3200 40 of 51.
_READ = 45e9
_KERNEL_SHARE = 0.85  # of plain reads, by the matrix-vector kernels; measured 0.81 to 0.97 (docs/benchmarks.md)
_EXPERTS_SHARE = 0.85  # of a large matrix's rate, by a layer's chosen experts; measured 0.75 to 0.89, 2 threads
_CACHE_OVER_MEMORY = 4.0
_MACS_A_CORE = 60e9  # integer multiply-adds a second a core with many tokens (AVX2; AVX-512 VNNI does 130)
_TORCH_MACS_A_CORE = 25e9  # float32
_LATENT_MACS_A_CORE = {"avx512": 85e9}  # one token's attention, bf16 cache; measured, an int8 cache 130e9
_OTHER_LATENT_MACS_A_CORE = 44e9  # AVX2, measured
_CPU_LAYER = 150e-6  # seconds: Python, torch's router, barriers
_DISK = 2e9  # a PCIe 3 NVMe drive, read through a mapping
# An RTX 3060, the smallest card of the 12 GB that many have, in a PCIe 4 x16 slot.
_GPU_READ = 360e9 * 0.8
_GPU_MACS = 20e12  # bf16 tensor cores with weights unpacked on the way, about a quarter of the data sheet's
_PCIE = 20e9
_GPU_LAYER = 30e-6  # seconds: the kernels of a layer inside a CUDA graph
_HANDOFF = 30e-6  # seconds: telling the CPU and hearing back


@dataclass(frozen=True)
class Figure:
    """One number in SI units, and whether it was measured now, read from doctor's file, or assumed."""

    value: float
    origin: Origin
    note: str = ""


@dataclass(frozen=True)
class CpuSpeed:
    """The CPU side. Rates are bytes/s and multiply-adds/s of all `threads` together; `layer` is seconds."""

    threads: int
    read: Figure
    """Plain reads of memory."""
    weights: Mapping[str, Figure]
    """Bytes/s at which one token's products read matrices from memory, by form."""
    experts: Figure
    """The same for a layer's chosen experts in int4: many smaller matrices, and threads that wait for each other."""
    cached: Figure
    """The same for a model that the last-level cache holds."""
    many: Mapping[str, Figure]
    """Multiply-adds/s with many tokens, by form."""
    latents: Figure
    """Multiply-adds/s of one token's attention over the latent cache."""
    attention: Figure
    """Multiply-adds/s of many tokens' attention (torch, float32)."""
    layer: Figure
    """Seconds a layer costs a token besides its bytes."""
    cache_bytes: int = 0
    """Last-level cache."""
    tier: str = ""

    def weights_rate(self, form: str) -> float:
        """Bytes/s from memory of a form, measured or not."""
        found = self.weights.get(form)
        return found.value if found else self.read.value * _KERNEL_SHARE

    def experts_rate(self, form: str) -> float:
        """Bytes/s at which one token's chosen experts of a form are read from memory: int4's loss for all forms."""
        return self.weights_rate(form) * min(1.0, self.experts.value / self.weights_rate("int4"))

    def figures(self) -> dict[str, Figure]:
        """Every figure, by the names of CPU_FIGURES."""
        weights = {f"weights.{form}": figure for form, figure in self.weights.items()}
        many = {f"many.{form}": figure for form, figure in self.many.items()}
        others = {name: getattr(self, name) for name in ("read", "experts", "cached", "latents", "attention", "layer")}
        return {"read": others.pop("read"), **weights, "experts": others.pop("experts"), **many, **others}

    def many_rate(self, form: str) -> float:
        """Multiply-adds/s with many tokens of a form, measured or not."""
        found = self.many.get(form)
        return found.value if found else self.attention.value


@dataclass(frozen=True)
class GpuSpeed:
    """The card. Rates as for the CPU; `pcie` is bytes/s from CPU memory to the card."""

    name: str
    read: Figure
    macs: Figure
    pcie: Figure
    layer: Figure
    handoff: Figure
    memory: int | None = None
    """Bytes in all, where the card is here."""
    free: int | None = None


@dataclass(frozen=True)
class Machine:
    """CPU, disk, and a card or none."""

    cpu: CpuSpeed
    disk: Figure
    gpu: GpuSpeed | None = None
    notes: tuple[str, ...] = field(default=())

    def figures(self) -> dict[str, Figure]:
        """Every figure, by the names of FIGURE_UNITS."""
        found = {**self.cpu.figures(), "disk": self.disk}
        if self.gpu is not None:
            names = (name for name in FIGURE_UNITS if name.startswith("gpu."))
            found |= {name: getattr(self.gpu, name.removeprefix("gpu.")) for name in names}
        return found

    def with_gpu(self, gpu: GpuSpeed | None) -> Machine:
        """The same machine with this card."""
        return replace(self, gpu=gpu)


def cpu_speed(
    threads: int, cache_bytes: int = 0, known: Mapping[str, Figure] | None = None, tier: str = ""
) -> CpuSpeed:
    """A CPU from the figures that are known, by the names of `CPU_FIGURES`; assumptions for the others."""
    known = known or {}

    def figure(name: str, value: float, note: str = "") -> Figure:
        return known.get(name) or Figure(value, "assumed", note)

    read = figure("read", _READ, "dual-channel DDR4 or DDR5")
    share = f"{_KERNEL_SHARE:.0%} of plain reads"
    weights = {form: figure(f"weights.{form}", read.value * _KERNEL_SHARE, share) for form in FORMS}
    lost = f"{_EXPERTS_SHARE:.0%} of a large int4 matrix"
    return CpuSpeed(
        threads=threads,
        read=read,
        weights=weights,
        experts=figure("experts", weights["int4"].value * _EXPERTS_SHARE, lost),
        cached=figure("cached", read.value * _CACHE_OVER_MEMORY, f"{_CACHE_OVER_MEMORY:.0f} times plain reads"),
        many={
            form: figure(f"many.{form}", (_TORCH_MACS_A_CORE if form == "bf16" else _MACS_A_CORE) * threads)
            for form in FORMS
        },
        latents=figure("latents", _LATENT_MACS_A_CORE.get(tier, _OTHER_LATENT_MACS_A_CORE) * threads),
        attention=figure("attention", _TORCH_MACS_A_CORE * threads),
        layer=figure("layer", _CPU_LAYER),
        cache_bytes=cache_bytes,
        tier=tier,
    )


def assumed_cpu(threads: int, cache_bytes: int = 0) -> CpuSpeed:
    """A desktop CPU that nobody measured."""
    return cpu_speed(threads, cache_bytes)


def assumed_disk() -> Figure:
    """A disk that nobody measured."""
    return Figure(_DISK, "assumed", "an NVMe drive")


def assumed_gpu(name: str = "", memory: int | None = None) -> GpuSpeed:
    """A card that is not here, or was not measured."""
    return GpuSpeed(
        name=name or "a card that is not here",
        read=Figure(_GPU_READ, "assumed", "RTX 3060-class; an RTX 4090 reads 2.8 times as fast"),
        macs=Figure(_GPU_MACS, "assumed", "RTX 3060-class"),
        pcie=Figure(_PCIE, "assumed", "PCIe 4 x16"),
        layer=Figure(_GPU_LAYER, "assumed"),
        handoff=Figure(_HANDOFF, "assumed"),
        memory=memory,
    )
