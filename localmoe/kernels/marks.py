"""Timing a pass part by part: marks between the parts, on the stream that computes them.

On a CUDA device a mark is an event, so that the host waits for nothing; elsewhere, and on Triton's interpreter, where
what is called is done when it returns, it is the clock. Normal passes get `UNMARKED`, whose marks do nothing.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Protocol

import torch

EXPERTS_ON_CPU = "experts on CPU"
COPIES = "copies"


class Mark(Protocol):
    """What a pass tells of where it is."""

    def __call__(self, part: str) -> None:
        """What came since the mark before was `part`'s."""
        ...

    def beside(self, part: str | None) -> None:
        """The same on another stream, whose work runs beside the pass: None is where it begins."""
        ...


class _Unmarked:
    def __call__(self, part: str) -> None: ...

    def beside(self, part: str | None) -> None: ...


UNMARKED: Mark = _Unmarked()


class Marks:
    """Marks that are remembered: `begin`, then one after each part; the seconds by part when the device is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str | None, float | torch.cuda.Event]] = []
        self._beside: list[tuple[str | None, float | torch.cuda.Event]] = []

    def begin(self) -> None:
        """What comes now is counted."""
        self._marks.append((None, self._now()))

    def __call__(self, part: str) -> None:
        """See `Mark`."""
        self._marks.append((part, self._now()))

    def beside(self, part: str | None) -> None:
        """See `Mark`."""
        self._beside.append((part, self._now()))

    def seconds(self) -> tuple[dict[str, float], dict[str, float]]:
        """By part, of the pass itself and of what ran beside it. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return _added_up(self._marks), _added_up(self._beside)

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _added_up(marks: list[tuple[str | None, float | torch.cuda.Event]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for (_, before), (part, now) in pairwise(marks):
        if part is not None:
            found[part] = found.get(part, 0.0) + _between(before, now)
    return found


def _between(before: float | torch.cuda.Event, now: float | torch.cuda.Event) -> float:
    if isinstance(before, float) or isinstance(now, float):
        return float(now) - float(before)  # type: ignore[arg-type]
    return float(before.elapsed_time(now)) / 1e3
