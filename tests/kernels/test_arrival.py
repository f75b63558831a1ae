"""Experts that memory does not hold are asked for ahead: which, how much, and that no bit of a result changes."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from localmoe.formats import int4
from localmoe.formats.mapping import map_file
from localmoe.formats.weights import Int4Weight, Weight
from localmoe.kernels import cpu
from localmoe.kernels.dispatch import Kernels
from localmoe.kernels.experts import ExpertProducts, ExpertWeights

LIBC = ctypes.CDLL(None)
COUNT, HIDDEN, INNER, TOP = 12, 256, 384, 4
EXPERT = 3 * (HIDDEN * INNER // 2 + HIDDEN * INNER // 32 * 2)  # bytes: gate, up and down


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Experts one after the other, as a shard has them: values, then scales."""
    torch.manual_seed(3)
    path = tmp_path / "experts"
    with path.open("wb") as to:
        to.write(bytes(1000))  # matrices begin anywhere in a page
        for _ in range(COUNT):
            for out_features, in_features in ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)):
                q = torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8)
                to.write(int4.pack(q).numpy().tobytes())
                scale = ((torch.rand(out_features, in_features // 32) + 0.5) / 4 / in_features**0.5).bfloat16()
                to.write(scale.view(torch.int16).numpy().tobytes())
        to.flush()
        os.fsync(to.fileno())
    return path


def mapped(file: Path) -> list[ExpertWeights]:
    memory, at = map_file(file, huge_pages=False), 1000
    # No window around what is met: this file is smaller than one
    LIBC.madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes), mmap.MADV_RANDOM)

    def taken(dtype: torch.dtype, *shape: int) -> Tensor:
        nonlocal at
        start, at = at, at + shape[0] * shape[1] * dtype.itemsize
        return memory[start:at].view(dtype).view(shape)

    def matrix(out_features: int, in_features: int) -> Weight:
        packed = taken(torch.int32, out_features, in_features // 8)
        return Int4Weight(packed, taken(torch.bfloat16, out_features, in_features // 32), 32)

    return [(matrix(INNER, HIDDEN), matrix(INNER, HIDDEN), matrix(HIDDEN, INNER)) for _ in range(COUNT)]


def layer(kernels: Kernels, experts: list[ExpertWeights]) -> ExpertProducts:
    return kernels.experts(COUNT, experts.__getitem__, experts[0])  # the shared one is in memory with that one


def batch(count: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(count)
    ids = torch.stack([torch.randperm(COUNT)[:TOP] for _ in range(count)])
    return torch.randn(count, HIDDEN), ids, torch.rand(count, TOP)


def drop(file: Path) -> bool:
    """Put the file's pages out of memory; whether its file system does that."""
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    size = file.stat().st_size
    pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
    address = map_file(file, huge_pages=False)  # anew: what is mapped stays
    failed = LIBC.mincore(ctypes.c_void_p(address.data_ptr()), ctypes.c_size_t(size), pages)
    return failed == 0 and not any(page & 1 for page in pages)


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [1, 3, 8, 40])
@pytest.mark.parametrize("tells", [True, False])
def test_a_result_has_the_same_bits(file: Path, tier: str, threads: int, count: int, tells: bool) -> None:
    plain = layer(Kernels.choose(tier, threads=threads), mapped(file))(*batch(count))
    for ahead in (1, 2 * EXPERT, 1 << 30):
        drop(file)
        kernels = Kernels.choose(tier, threads=threads)
        kernels.ask_ahead(ahead, tells)
        assert torch.equal(layer(kernels, mapped(file))(*batch(count)), plain)


@pytest.mark.parametrize("ahead", [1, EXPERT, 1 << 30])
def test_everything_that_was_chosen_is_asked_for_where_the_system_does_not_tell(file: Path, ahead: int) -> None:
    kernels = Kernels.choose(threads=2)
    experts = layer(kernels, mapped(file))
    hidden, ids, weights = batch(2)
    experts(hidden, ids, weights)
    assert kernels.bytes_asked == 0  # off, as at first
    kernels.ask_ahead(ahead, tells=False)
    experts(hidden, ids, weights)
    asked = EXPERT * (len(set(ids.flatten().tolist())) + 1)  # and the shared one
    assert kernels.bytes_asked == asked
    kernels.ask_ahead(0, tells=False)
    experts(hidden, ids, weights)
    assert kernels.bytes_asked == asked


def test_only_what_is_not_in_memory_is_asked_for(file: Path) -> None:
    if not drop(file):
        pytest.skip("this file system keeps its files in memory")
    experts = mapped(file)
    kernels = Kernels.choose(threads=2)
    kernels.ask_ahead(1 << 30, tells=True)
    products = layer(kernels, experts)
    for weight in experts[0]:  # the shared one comes into memory
        assert isinstance(weight, Int4Weight)
        assert int(weight.packed.count_nonzero()) + int(weight.scale.count_nonzero()) > 0
    hidden, _, weights = batch(1)
    far = torch.tensor([[5, 7, 9, 11]])
    products(hidden, far, weights)
    assert kernels.bytes_asked == 4 * EXPERT
    products(hidden, far, weights)  # all are there now
    assert kernels.bytes_asked == 4 * EXPERT
    products(hidden, torch.tensor([[5, 0, 1, 11]]), weights)
    assert kernels.bytes_asked == 5 * EXPERT


def test_a_card_leaves_experts_to_the_cpu_and_only_those_are_asked_for(file: Path) -> None:
    kernels = Kernels.choose(threads=1)
    kernels.ask_ahead(1 << 30, tells=False)
    products = kernels.experts(COUNT, mapped(file).__getitem__)
    products(torch.randn(1, HIDDEN), torch.tensor([[3, -1, 4, -1]]), torch.rand(1, TOP))
    assert kernels.bytes_asked == 2 * EXPERT
