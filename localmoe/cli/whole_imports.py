"""Ctrl-C while torch or numpy is being imported: it waits until they are whole.

torch imports numpy from C++ and goes on without it where that fails, a KeyboardInterrupt included: then the program
would end later, for a reason that nobody understands, or Ctrl-C would do nothing.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_WHOLE = ("torch", "numpy")
_pressed = False


class _Finder(MetaPathFinder):
    """Finds what may not be interrupted, where Python finds it too."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in _WHOLE else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def executed_whole(module: ModuleType) -> None:
            with uninterrupted():
                execute(module)

        spec.loader.exec_module = executed_whole  # type: ignore[method-assign]
        return spec


def install() -> None:
    """From here on the imports are whole. A second call changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt at the end of this, of the outermost one where they are nested. Only in the main
    thread, and where Ctrl-C raises it otherwise."""
    global _pressed
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    _pressed = False
    signal.signal(signal.SIGINT, _remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if _pressed:
        raise KeyboardInterrupt


def _remember(number: int, frame: object) -> None:
    global _pressed
    _pressed = True
