"""Run DeepSeek-style Mixture-of-Experts models, at 4 bits, on one PC.

import localmoe

with localmoe.load("demo") as engine:
    for step in engine.generate("Once upon a time", max_tokens=60):
        print(step.text, end="", flush=True)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localmoe.generate import Step
    from localmoe.load import Engine, load

    __version__: str

__all__ = ["Engine", "Step", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and most commands do without it."""
    if name == "__version__":
        from importlib.metadata import version

        return version("localmoe")
    if name == "load":
        return import_module("localmoe.load")  # which can be called
    if name == "Engine":
        from localmoe.engine import Engine

        return Engine
    if name == "Step":
        from localmoe.generate import Step

        return Step
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
