"""Which card computes, if any, and how much of its memory may be used."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from localmoe.errors import DeviceError, UsageError
from localmoe.formats.checkpoint import Checkpoint
from localmoe.model.config import ModelConfig
from localmoe.model.sizes import Storage, model_sizes
from localmoe.offload.machine import GIB
from localmoe.offload.plan import CUDA_CONTEXT
from localmoe.offload.predict import Subject

_OLDEST = (8, 0)  # compute capability: bfloat16 on tensor cores
_KEPT_FREE = 0.05  # of what is free, for whatever else draws on the screen


@dataclass(frozen=True)
class CardMemory:
    """A card and the bytes of it that are ours, CUDA's own among them: a hard ceiling."""

    device: torch.device
    vram: int
    name: str = ""


def choose_card(wanted: str, vram: int | None) -> CardMemory | None:
    """The card for `--device wanted` (auto, cpu or cuda) and `--vram`, or None for the CPU alone.

    Without `vram` it is what is free, less 5 %. "auto" takes the CPU where there is no card that will do, unless `vram`
    asks for one. Raises UsageError for an unknown device or a contradiction, DeviceError saying what is missing.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {wanted!r} is unknown; choose auto, cpu or cuda")
    if wanted == "cpu":
        if vram is not None:
            raise UsageError("--vram is a card's memory, and --device cpu uses no card; leave out one of them")
        return None
    missing = why_no_card()
    if missing is not None:
        if wanted == "auto" and vram is None:
            return None
        asked = "--device cuda" if wanted == "cuda" else "--vram"
        raise DeviceError(f"{asked}: {missing}; --device cpu computes without a card")
    device = torch.device("cuda", torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info(device)
    return CardMemory(device, _ceiling(vram, free, total), torch.cuda.get_device_name(device))


def why_no_card() -> str | None:
    """What keeps the card from being used, or None if nothing does."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return "this torch was built without CUDA; install the default build of torch where the NVIDIA driver is"
        return "torch finds no NVIDIA GPU"
    found = torch.cuda.get_device_capability()
    if found < _OLDEST:
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {found[0]}.{found[1]} and 8.0 (RTX 30, A100) is the oldest that will do"
    if importlib.util.find_spec("triton") is None:
        return "Triton is missing: pip install triton"
    if not any(os.environ.get("CC") or shutil.which(name) for name in ("gcc", "clang", "cc")):
        return "Triton needs a C compiler (Debian and Ubuntu: apt install gcc)"
    return None


def _ceiling(vram: int | None, free: int, total: int) -> int:
    """`free` is what CUDA left once it had started, so its own memory is added to what may be used."""
    if vram is None:
        return int(free * (1 - _KEPT_FREE)) + CUDA_CONTEXT
    if vram - CUDA_CONTEXT > free:
        raise DeviceError(f"--vram {vram / GIB:.2f} GiB: the card has {free / GIB:.2f} of {total / GIB:.2f} GiB free")
    return vram


def hold_to(memory: CardMemory) -> None:
    """Have torch refuse what would go beyond the ceiling, rather than take it from other programs. What this process
    holds on the card already, another model's, comes on top."""
    if memory.device.type == "cuda":
        _, total = torch.cuda.mem_get_info(memory.device)
        most = max(memory.vram - CUDA_CONTEXT, 1) + torch.cuda.memory_reserved(memory.device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), memory.device)


def subject_of(
    config: ModelConfig, checkpoint: Checkpoint, cache_row: int, heat: Sequence[Sequence[float]] | None
) -> Subject:
    """An opened checkpoint as `localmoe.offload.plan` places it; a card holds FP8 as bf16."""
    storage = Storage.of(checkpoint.config)
    if storage.fp8_block is not None:
        storage = Storage(None, torch.bfloat16)
    return Subject(config, model_sizes(config, storage), cache_row, heat)
