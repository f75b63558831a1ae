"""The text that a quantization is calibrated on, in windows, and the run that gathers statistics over them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from localmoe.errors import InputError
from localmoe.text import Tokenizer
from quantize.layerwise import Consume, LayerByLayer, Statistics, layer_of

__all__ = ["DEFAULT_TEXT", "MOST_TOKENS", "WINDOW", "Statistics", "calibrate_layers", "windows_of"]

DEFAULT_TEXT = Path(__file__).parent / "data" / "calibration.txt"
WINDOW = 512
MOST_TOKENS = 128 * WINDOW
"""Tokens of the text that are used; what comes after them is left out."""


def windows_of(directory: Path, text: str) -> list[list[int]]:
    """The first MOST_TOKENS tokens of `text` in windows that begin with the model's BOS.

    Raises InputError for a text without a whole window, CheckpointError for a checkpoint without a tokenizer.
    """
    tokenizer = Tokenizer.from_directory(directory)
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = tokenizer.encode(text, add_bos=False, control=False)[:MOST_TOKENS]
    length = WINDOW - len(first)
    windows = [[*first, *ids[start : start + length]] for start in range(0, len(ids), length)]
    whole = [window for window in windows if len(window) == WINDOW]
    if not whole:
        raise InputError(f"the calibration text has {len(ids):,} tokens; at least {length:,} are needed")
    return whole


def calibrate_layers(model: LayerByLayer, consume: Consume) -> Iterator[tuple[str, object]]:
    """(module, what `consume` made of it) for every wanted module that the model runs, up to the last that has one."""
    last = max((layer_of(module) for module in model.wanted), default=-1)
    for layer in range(min(last + 1, model.config.num_hidden_layers)):
        yield from model.advance(layer, consume)
    if last >= model.config.num_hidden_layers:
        yield from model.mtp(consume)
