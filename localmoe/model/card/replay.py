"""CUDA graphs of the passes of a few rows: launched as one, without Python or a driver call a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Replay:
    """Runs a pass as it is the first time, which compiles its kernels, captures it the second, and from then on replays
    it. A body must do the same to the same memory each time, and allocate nothing that outlives it. Where it cannot be
    captured, or the device is no CUDA device, it is always run as it is."""

    def __init__(self, device: torch.device, *, captures: Callable[[], bool] = lambda: True) -> None:
        self._device = device
        self._can_capture = captures
        self._captures = device.type == "cuda" and captures()
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self.failure: str | None = None
        """Why passes are run as they are, where capturing one failed."""

    def __call__(self, rows: int, body: Callable[[], None]) -> None:
        """A pass of so many rows, on the current stream."""
        if not self._captures:
            body()
            return
        graph = self._graphs.get(rows)
        if graph is None and rows in self._graphs:
            graph = self._graphs[rows] = self._captured(body)
        if graph is not None:
            graph.replay()
            return
        body()
        self._graphs[rows] = None

    def forget(self) -> None:
        """Begin again, and look once more whether passes can be captured: they do something else from now on. None may
        be running."""
        self._graphs.clear()
        self._captures = self._device.type == "cuda" and self.failure is None and self._can_capture()

    def _captured(self, body: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """None where this driver cannot: nothing has run then, and no pass is captured any more."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self._device)
        stream.synchronize()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                body()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = error.__context__  # ending a capture that Ctrl-C or full memory broke off fails too, over it
            if isinstance(cause, torch.OutOfMemoryError) or (cause is not None and not isinstance(cause, Exception)):
                raise cause from None
            self._captures, self.failure = False, str(error)
            return None
        finally:
            torch.cuda.set_stream(stream)  # a capture that failed leaves its own
        return graph
