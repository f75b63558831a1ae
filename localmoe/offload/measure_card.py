"""Measures a card: its memory, its link and the tensor cores' product, a second or two in all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch

from localmoe.formats.weights import Int4Weight
from localmoe.offload.machine import Figure

_COPY_BYTES = 1 << 30
_LINK_BYTES = 256 << 20
_SHAPE = (4096, 4096, 2048)  # tokens, out, in
_PASSES = 5


def card_probes(
    device: torch.device, *, copy: int = _COPY_BYTES, link: int = _LINK_BYTES, shape: tuple[int, int, int] = _SHAPE
) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    """(name in `machine.FIGURE_UNITS`, what it is, how to measure it), by weight in a plan. Sizes in bytes; `shape` is
    (tokens, out, in) of a product. What a layer costs besides stays assumed."""
    yield "gpu.read", "the card's memory bandwidth", lambda: _read(device, copy)
    yield "gpu.pcie", "the link to the card", lambda: _link(device, link)
    yield "gpu.macs", "the card's products of many tokens", lambda: _products(device, *shape)
    if device.type == "cuda":
        yield "gpu.handoff", "telling the CPU and hearing back", lambda: _handoff(device)


def _read(device: torch.device, size: int) -> Figure:
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Figure(2 * size / _seconds(device, lambda: target.copy_(source)), "measured", "a copy, both ways counted")


def _link(device: torch.device, size: int) -> Figure:
    source = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(source, device=device)
    taken = _seconds(device, lambda: target.copy_(source, non_blocking=True))
    return Figure(size / taken, "measured", "from pinned memory")


def _products(device: torch.device, tokens: int, rows: int, columns: int) -> Figure:
    from localmoe.kernels.triton.launch import launch_for
    from localmoe.kernels.triton.matmul import matmul
    from localmoe.kernels.triton.matvec import new_output
    from localmoe.kernels.triton.weights import upload

    packed = torch.full((rows, columns // 8), 0x19191919, dtype=torch.int32)
    scale = torch.full((rows, columns // 32), 0.01, dtype=torch.bfloat16)
    matrix = upload([Int4Weight(packed, scale, 32)], device)
    x = torch.ones(tokens, columns, device=device)
    out, launch = new_output(x, matrix), launch_for(device)
    return Figure(
        tokens * rows * columns / _seconds(device, lambda: matmul(x, matrix, out, launch)), "measured", "int4"
    )


def _handoff(device: torch.device) -> Figure:
    from localmoe.kernels.calls import quickest

    _, seconds = quickest(device)
    if not math.isfinite(seconds):
        raise RuntimeError("no call of the CPU could be timed in a CUDA graph")
    return Figure(seconds, "measured", "a row down and up with it")


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Of the quickest pass after one to warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    times = []
    for _ in range(_PASSES):
        started = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - started)
    return min(times)
