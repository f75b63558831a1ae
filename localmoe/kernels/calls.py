"""How a stream calls the CPU: by the driver's host functions, or by stream memory operations where they are quicker.

A host function wakes a thread of the driver's, and every driver has them. By memory operations the device writes a word
that a thread of ours looks at, and waits for another (`csrc/doorbell.h`); WSL2 may not have them. Which is quicker, and
whether the second works at all, is found out as decoding uses them: in a CUDA graph.
"""

from __future__ import annotations

import math
import time
from statistics import median

import torch

from localmoe.kernels import _cpu

Caller = _cpu.CudaDriver | _cpu.Doorbell

_DRIVER = "libcuda.so.1"
_WORDS = 128  # bytes of a doorbell
_CALLS, _REPEATS = 32, 5
_ROW = 2048  # float32, down and up with each call
_PATIENCE = 1.0  # seconds, for what takes microseconds


def callers(driver: str = _DRIVER) -> dict[str, Caller]:
    """What this machine's driver offers, by name. A doorbell's thread ends with the object or the interpreter. Raises
    RuntimeError where there is no driver."""
    opened = _cpu.CudaDriver(driver)
    found: dict[str, Caller] = {"host functions": opened}
    try:
        words = torch.zeros(_WORDS, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        bell = _cpu.Doorbell(opened, words.numpy())
    except (RuntimeError, ValueError):  # no such operations, or memory that torch aligned otherwise
        return found
    return found | {"memory operations": bell}


def quickest(device: torch.device) -> tuple[Caller, float]:
    """What to call by on this card, and seconds of a call there and back; infinite where no graph can hold one. Raises
    RuntimeError where there is no driver."""
    timed = [(round_trip(caller, device), caller) for caller in callers().values()]
    taken, chosen = min(timed, key=lambda each: each[0])  # the first, host functions, if nobody answers at all
    for _, caller in timed:
        if caller is not chosen and isinstance(caller, _cpu.Doorbell):
            caller.stop()
    return chosen, taken


def round_trip(caller: Caller, device: torch.device) -> float:
    """Seconds of a call inside a CUDA graph with a row's way down and up, of some in a row; the median. Infinite where
    this driver cannot, or nobody answers."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    on_card, pinned = torch.zeros(_ROW, device=device), torch.zeros(_ROW, pin_memory=True)
    graph, done = torch.cuda.CUDAGraph(), torch.cuda.Event()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    before, times = torch.cuda.current_stream(device), []
    try:
        with torch.cuda.stream(stream):  # a driver that refuses does so here, where no capture is spoilt
            caller.ring(stream.cuda_stream)
            done.record()
        if not answered(done, caller, time.perf_counter() + _PATIENCE):
            return math.inf
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(_CALLS):
                pinned.copy_(on_card, non_blocking=True)
                caller.ring(stream.cuda_stream)
                on_card.copy_(pinned, non_blocking=True)
        for _ in range(1 + _REPEATS):
            started = time.perf_counter()
            with torch.cuda.stream(stream):
                graph.replay()
                done.record()
            if not answered(done, caller, started + _PATIENCE):
                return math.inf
            times.append(time.perf_counter() - started)
    except RuntimeError:
        return math.inf
    finally:
        torch.cuda.set_stream(before)  # a capture that failed leaves its own
    return median(times[1:]) / _CALLS


def answered(done: torch.cuda.Event, caller: Caller, deadline: float) -> bool:
    """Whether it was in time. Otherwise what still waits is let go, so that the card can be used."""
    while not done.query():  # type: ignore[no-untyped-call]
        late = time.perf_counter() - deadline
        if late > 0 and isinstance(caller, _cpu.Doorbell):
            caller.let_go()
        if late > _PATIENCE:
            return False
    return time.perf_counter() < deadline
