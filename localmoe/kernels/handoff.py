"""A layer's experts on the CPU while the card computes: hidden states down, their sum up, on a stream of their own.

The card's copies and the CPU's work are ordered by the stream alone: it calls the kernels (C++, never Python) when the
copies have arrived (`localmoe.kernels.calls`), so that a CUDA graph holds all of it and nothing waits that need not. A
mapped file cannot be pinned, but nothing of it is copied here: 8 rows of hidden states are, through pinned memory.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from localmoe.kernels import _cpu
from localmoe.kernels.calls import Caller, quickest
from localmoe.kernels.dispatch import Kernels
from localmoe.kernels.experts import ExpertProducts
from localmoe.kernels.marks import COPIES, EXPERTS_ON_CPU, UNMARKED, Mark

_ROWS = 8


class Handoff:
    """One engine's: its layers take turns. `submit` and `collect` go in pairs.

    Where the CPU has no native kernels (`--kernels reference`), or the device is no CUDA device, `submit` waits for the
    rows and computes at once, which no graph can hold: `captures` says so.
    """

    def __init__(self, hidden: int, k: int, kernels: Kernels, device: torch.device) -> None:
        self.device = device
        self._native = device.type == "cuda" and kernels.backend is not None
        pinned = device.type == "cuda"
        self._hidden = torch.zeros(_ROWS, hidden, pin_memory=pinned)
        self._ids = torch.zeros(_ROWS, k, dtype=torch.int32, pin_memory=pinned)
        self._weights = torch.zeros(_ROWS, k, pin_memory=pinned)
        self._result = torch.zeros(_ROWS, hidden, pin_memory=pinned)
        self._arrived = torch.zeros(_ROWS, hidden, device=device)
        self._pending = False
        self._jobs: dict[tuple[int, int], _cpu.ExpertJob] = {}
        self._caller: Caller | None = None
        if self._native:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._left, self._back = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]

    def prepare(self) -> None:
        """Find out how to call the CPU. Before the first `submit`, while the card has nothing to do."""
        if self._native and self._caller is None:
            self._caller, _ = quickest(self.device)
            if isinstance(self._caller, _cpu.Doorbell):  # before the driver takes the memory away that it looks at
                weakref.finalize(self, self._caller.stop)

    def captures(self, experts: ExpertProducts) -> bool:
        """Whether these are computed without the host."""
        return self._native and experts.complete()

    def submit(
        self,
        experts: ExpertProducts,
        slots: Tensor,
        hidden: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        mark: Mark = UNMARKED,
    ) -> None:
        """Start the experts without a slot (slots int32 [E], in CPU memory), for hidden float32 [T, H], expert_ids
        int32 [T, k] and weights float32 [T, k] on the card."""
        count = len(hidden)
        self._pending = self.captures(experts)
        if not self._pending:
            ids = expert_ids.cpu().long()
            away = torch.where(slots[ids] >= 0, -1, ids)
            known = hidden.cpu(), weights.cpu()
            mark(COPIES)
            result = experts(known[0], away, known[1])
            mark(EXPERTS_ON_CPU)
            self._arrived[:count] = result
            mark(COPIES)
            return
        self._left.record()
        self._stream.wait_event(self._left)
        with torch.cuda.stream(self._stream):
            mark.beside(None)
            self._hidden[:count].copy_(hidden, non_blocking=True)
            self._ids[:count].copy_(expert_ids, non_blocking=True)
            self._weights[:count].copy_(weights, non_blocking=True)
            mark.beside(COPIES)
            assert self._caller is not None, "see `prepare`"
            self._job(experts, slots, count).enqueue(self._caller, self._stream.cuda_stream)
            mark.beside(EXPERTS_ON_CPU)
            self._arrived[:count].copy_(self._result[:count], non_blocking=True)
            mark.beside(COPIES)
            self._back.record()

    def collect(self, delta: Tensor) -> None:
        """Add the sums of what was submitted to `delta` [T, H]."""
        if self._pending:
            torch.cuda.current_stream(self.device).wait_event(self._back)
        delta += self._arrived[: len(delta)]

    def _job(self, experts: ExpertProducts, slots: Tensor, count: int) -> _cpu.ExpertJob:
        """Of a layer and a number of rows; kept, since graphs know it by its address."""
        key = (id(experts), count)
        if key not in self._jobs:
            made = experts.job(
                self._hidden[:count], self._ids[:count], self._weights[:count], slots, self._result[:count]
            )
            assert made is not None, "asked for by `captures`"
            self._jobs[key] = made
        return self._jobs[key]
