"""Rounding to grouped integers with the C++ search, straight from the source's own numbers.

`quantizers` has the maths and the same in torch, which is what it is compared with: the bits are equal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from localmoe.formats.scheme import Scheme
from localmoe.kernels import scales
from quantize.quantizers import Grid, Quantized, integer_grid, ordered_sum, quantize_rows
from quantize.sources import FP8, Slab


def quantize_slab(slab: Slab, scheme: Scheme, grid: Grid) -> Quantized:
    """Rows of a source as they are stored; `scheme.divides(in)` must hold. Rows do not affect each other.

    Raises CheckpointError, naming the tensor, for NaN and infinity.
    """
    if scheme.kind == "nf4":
        return quantize_rows(slab.rows, scheme, grid)
    as_stored = slab.values.dtype in (torch.float32, torch.bfloat16) or (
        slab.values.dtype == FP8 and scales.blocks_fit(slab.block, scheme.group_size)
    )
    found = scales.search(
        slab.values if as_stored else slab.rows,
        searched_grid(scheme, grid),
        factors=slab.factors if as_stored else None,
        block=slab.block,
    )
    norm = ordered_sum(found.norms)
    if not math.isfinite(norm):
        slab.check_finite()  # or else their squares overflow, which the norm tells
    assert found.packed is not None  # it was asked for
    return Quantized(
        parts={"weight_packed": found.packed, "weight_scale": found.scale},
        squared_error=ordered_sum(found.errors),
        squared_norm=norm,
        zero_groups=int((found.scale == 0).sum()),
    )


def searched_scales(rows: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Tensor:
    """bf16 scales [R, G] of the least squared error, each column of float32 `rows` [R, in] weighted by `importance`."""
    return scales.search(rows, searched_grid(scheme, "mse"), importance=importance, pack=False).scale


def rounded(rows: Tensor, scheme: Scheme, importance: Tensor | None = None) -> dict[str, Tensor]:
    """The same with the integers, as they are stored, by tensor suffix."""
    found = scales.search(rows, searched_grid(scheme, "mse"), importance=importance)
    assert found.packed is not None  # it was asked for
    return {"weight_packed": found.packed, "weight_scale": found.scale}


def searched_grid(scheme: Scheme, grid: Grid) -> scales.SearchedGrid:
    """What the C++ search has to know."""
    integer = integer_grid(scheme)
    bits = (integer.highest - integer.lowest + 1).bit_length() - 1
    return scales.SearchedGrid(bits, scheme.group_size, integer.baseline, integer.guesses if grid == "mse" else ())
