"""The parts of a placed model as `plan` lists them: what lies where, in how many bytes, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from localmoe.model.sizes import card_cache_bytes
from localmoe.offload.predict import Residence, Subject

Tier = Literal["gpu", "ram", "disk"]


@dataclass(frozen=True)
class Share:
    """One part of the model in one place, and why it is there."""

    part: str
    tier: Tier
    nbytes: int
    what: str
    why: str


def always_shares(subject: Subject, layers: Sequence[Residence], tier: Tier, why: str) -> list[Share]:
    """What every token reads of the layers on the card ("gpu"), or of the others."""
    here = [size for size, home in zip(subject.sizes.layers, layers, strict=True) if home.on_gpu == (tier == "gpu")]
    what = f"{len(here)} of {len(layers)} layers" if len(here) < len(layers) else _layers(layers)
    dense = [size for size in here if not size.experts]
    moe = [size for size in here if size.experts]
    return [
        Share("attention, norms", tier, sum(size.attention.nbytes for size in here), what, why),
        Share("dense MLP", tier, sum(size.mlp.nbytes for size in dense), _layers(dense), why),
        Share("router, shared expert", tier, sum(size.mlp.nbytes for size in moe), _layers(moe), why),
    ]


def _layers(layers: Sequence[object]) -> str:
    return "1 layer" if len(layers) == 1 else f"{len(layers)} layers"


def cache_share(subject: Subject, tier: Tier, tokens: int, layers: int, why: str) -> Share:
    """The latents of so many tokens in so many layers."""
    row = card_cache_bytes(subject.cache_row, 1, 1) if tier == "gpu" else subject.cache_row
    return Share("latent cache", tier, tokens * row * layers, f"{tokens:,} tokens", why)


def expert_shares(subject: Subject, layers: Sequence[Residence]) -> list[Share]:
    """The routed experts on the card, in CPU memory and on the disk."""
    sizes, k = subject.sizes, subject.config.num_experts_per_tok
    total = sum(layer.experts for layer in sizes.layers)
    placed = list(zip(sizes.layers, layers, strict=True))
    moe = sum(bool(size.experts) for size in sizes.layers)
    gpu, disk = sum(home.gpu_experts for home in layers), sum(home.disk_experts for home in layers)
    hits = sum(home.gpu_hits for home in layers) / moe if moe else 0.0
    misses = sum(home.disk_hits for home in layers) / moe if moe else 0.0
    known = "the hottest" if subject.heat is not None else "no heat counted yet, all alike"
    on_disk = sum(home.disk_experts * size.expert.nbytes for size, home in placed)
    slots = gpu * sizes.expert if gpu else 0
    in_ram = sizes.experts - on_disk - sum(home.gpu_experts * size.expert.nbytes for size, home in placed)
    return [
        Share("routed experts", "gpu", slots, f"{gpu:,} of {total:,}", f"{known}: {hits:.0%} of the uses"),
        Share(
            "routed experts", "ram", in_ram, f"{total - gpu - disk:,} of {total:,}",
            f"a token reads {k} a layer: the CPU computes them where they lie",
        ),
        Share(
            "routed experts", "disk", on_disk, f"{disk:,} of {total:,}",
            f"CPU memory is full: {misses:.0%} of the uses wait for the disk",
        ),
    ]  # fmt: skip


def rest(subject: Subject) -> list[Share]:
    """What is mapped and hardly read."""
    sizes, config = subject.sizes, subject.config
    row = sizes.embedding // config.vocab_size
    return [
        Share("embedding", "ram", sizes.embedding, "mapped", f"a token reads one row of {row:,} bytes"),
        Share("MTP layers", "disk", sizes.mtp, "", "they guess tokens where that pays; not reckoned with"),
    ]
