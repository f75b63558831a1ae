"""`localmoe show`."""
from __future__ import annotations
from localmoe.cli import options
def show(model: options.Model, debug: options.Debug = False) -> None:
    """Show."""
