"""`localmoe quantize`: a source checkpoint to 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localmoe import store
from localmoe.cli import options, streams, units
from localmoe.cli.failure import Interrupted
from localmoe.cli.sanitize import printable_line
from localmoe.errors import ModelNotFoundError, UsageError

if TYPE_CHECKING:
    from quantize.pipeline import Report


def make_artifact(source: Path, output: Path, recipe: str) -> Report:
    from quantize import pipeline
    return pipeline.quantize(source, output, recipe)
def quantize(model: options.Model, debug: options.Debug = False) -> None:
    """Quantize."""
