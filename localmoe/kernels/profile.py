"""Where a token's time goes: seconds by part of the model, counted always since it costs next to nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType


class Part:
    """A context manager that adds up the seconds spent inside."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.perf_counter() - self._started


class Profile:
    """Parts by name; those of one model's passes, which never overlap."""

    def __init__(self, take_seconds: Callable[[], dict[str, float]] | None = None) -> None:
        """`take_seconds` gives the seconds by part since it was last called, of what is timed elsewhere."""
        self._parts: dict[str, Part] = {}
        self._take_seconds = take_seconds

    def part(self, name: str) -> Part:
        """The part of this name, to be entered: `with profile.part("head"): ...`."""
        return self._parts.setdefault(name, Part())

    def seconds(self) -> dict[str, float]:
        """Seconds by part since the last reset."""
        for name, seconds in self._take_seconds().items() if self._take_seconds else ():
            if seconds:
                self.part(name).seconds += seconds
        return {name: part.seconds for name, part in self._parts.items()}

    def reset(self) -> None:
        """Begin again at zero."""
        self.seconds()
        for part in self._parts.values():
            part.seconds = 0.0
