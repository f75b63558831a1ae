"""Scales for groups of weights, from the weights alone.

`absmax` is the plain baseline. `mse` looks for the scale s that minimises sum((w - q s)^2) over a group,
q = clamp(round(w / s)). For a given q the best s is <w, q> / <q, q>, and what it leaves is
<w, w> - <w, q>^2 / <q, q>: so a handful of first guesses give their q, each q its least-squares s, and the largest
<w, q>^2 / <q, q> wins. The winner is rounded to bf16, refitted once more, and kept only where the error of
what is really stored is below absmax's: per group, `mse` is never worse.

Scales take the sign that puts the largest weight on the lowest grid point (-8, -128), as llama.cpp's Q4_0
does: the grid has one more step on that side. w = q * scale is all that any reader of the format computes,
so a negative scale is as good as a positive one; on the demo's experts it lowers the error by 6 %.

Scales depend on the weights only, not on the number of threads nor on how rows are cut into chunks: nothing
but elementwise operations, and sums in a fixed order. So the C++ search (`quantize.search`), which does the work, can
be held to the same bits; what is here is its reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from localmoe.formats import int4, int8, nf4
from localmoe.formats.scheme import Scheme

Grid = Literal["mse", "absmax"]
GRIDS: tuple[Grid, ...] = ("mse", "absmax")

_CHUNK = 1 << 18  # weights searched at a time: every temporary stays in a core's cache
_SMALLEST = 2.0**-100  # a group below this is zero: its reciprocal would overflow


@dataclass(frozen=True)
class IntegerGrid:
    """`guesses` are |largest weight| / |scale| of the first guesses, `baseline` that of plain absmax."""

    lowest: int
    highest: int
    baseline: float
    guesses: tuple[float, ...]


# Steps found on the demo's experts: against 128 of them the error (group 32) is 0.2 % higher.
_INT4 = IntegerGrid(int4.LOWEST, int4.HIGHEST, 7.5, tuple(7.2 + 0.48 * step for step in range(10)))
_INT8 = IntegerGrid(int8.LOWEST, int8.HIGHEST, 127.0, (127.5, 128.0, 129.0, 130.0))


def integer_grid(scheme: Scheme) -> IntegerGrid:
    """That of an int4 or int8 scheme."""
    return _INT4 if scheme.kind == "int4" else _INT8


@dataclass(frozen=True)
class Quantized:
    """Rows of a matrix as they are stored, by tensor suffix, sum((w - w')^2) and sum(w^2) over them, and how many of
    their groups have nothing but zeros."""

    parts: dict[str, Tensor]
    squared_error: float
    squared_norm: float
    zero_groups: int


def quantize_rows(rows: Tensor, scheme: Scheme, grid: Grid) -> Quantized:
    """Quantize finite float32 `rows` [R, in]; `scheme.divides(in)` must hold. Rows do not affect each other."""
    if scheme.kind == "nf4":
        codes, absmax = nf4.quantize(rows)
        difference = rows - nf4.dequantize(codes, absmax)
        errors, norms = _row_sums(difference), _row_sums(rows)
        parts = {"weight_nf4": codes, "weight_absmax": absmax}
        return Quantized(parts, ordered_sum(errors), ordered_sum(norms), int((absmax == 0).sum()))
    scale, errors, norms = group_scales(rows, scheme, grid)
    form = int4 if scheme.kind == "int4" else int8
    q = form.quantize(rows, scale, scheme.group_size)  # [R, in]
    zeros = int((scale == 0).sum())
    return Quantized(pack_integers(q, scale, scheme), ordered_sum(errors), ordered_sum(norms), zeros)


def group_scales(
    rows: Tensor, scheme: Scheme, grid: Grid, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(bf16 scales [R, G], float32 squared errors [R * G], float32 squared norms [R * G]) of `rows` [R, in].

    A group of zeros has scale 0. The errors are those of the stored numbers: scale in bf16, q clamped.
    `importance` float32 [in] weights each column's squared error (its inputs' mean square, say) in the search, and in
    the errors and norms that come back.
    """
    integer = integer_grid(scheme)
    groups = rows.reshape(-1, scheme.group_size)  # [N, g]
    count = groups.shape[0]
    scale = torch.empty(count, dtype=torch.bfloat16)
    errors, norms = torch.empty(count), torch.empty(count)  # float32 [N]
    step = max(1, _CHUNK // scheme.group_size)
    for start in range(0, count, step):
        part = slice(start, start + step)
        columns = groups[part].t().contiguous()  # [g, n]: sums over a group are then sums of rows
        weights = None if importance is None else _importance_of(importance, start, columns)
        norms[part] = _sum_(_weighted(columns.square(), weights))
        scale[part], errors[part] = _search(columns, integer, grid, weights)
    return scale.view(rows.shape[0], -1), errors, norms


def pack_integers(q: Tensor, scale: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """int8 `q` [O, I] and bf16 `scale` as they are stored, by tensor suffix."""
    form = int4 if scheme.kind == "int4" else int8
    return {"weight_packed": form.pack(q), "weight_scale": scale}


def ordered_sum(values: Tensor) -> float:
    """Sum of a float tensor, in float64 and in an order that its length alone decides."""
    flat = values.reshape(-1).to(torch.float64).numpy()
    width = 1024
    whole = len(flat) - len(flat) % width
    columns = np.add.reduce(flat[:whole].reshape(-1, width), axis=0) if whole else np.zeros(0)
    return math.fsum([*columns.tolist(), *flat[whole:].tolist()])


def relative_error(squared_error: float, squared_norm: float) -> float:
    """||w - w'|| / ||w||, to six digits (a manifest is compared byte by byte); 0 for a matrix of zeros."""
    return float(f"{math.sqrt(squared_error / squared_norm):.6g}") if squared_norm else 0.0


def _importance_of(importance: Tensor, start: int, columns: Tensor) -> Tensor:
    """[g, n]: the importance of each weight of the groups from number `start` on; a row has in / g groups."""
    size, count = columns.shape
    by_group = importance.view(-1, size)  # [G, g]
    return by_group[torch.arange(start, start + count) % len(by_group)].t().contiguous()


def _weighted(columns: Tensor, weights: Tensor | None) -> Tensor:
    """In place: `columns` times `weights`, if there are any."""
    return columns if weights is None else columns.mul_(weights)


def _search(columns: Tensor, integer: IntegerGrid, grid: Grid, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(bf16 scales [n], squared errors [n]) of the groups that are the columns of float32 [g, n]."""
    highest, lowest = columns.amax(dim=0), columns.amin(dim=0)
    extreme = torch.where(highest >= -lowest, highest, lowest)  # [n], with its sign
    extreme = torch.where(extreme.abs() < _SMALLEST, 0.0, extreme)
    scale = (extreme.abs() / integer.baseline).bfloat16()
    error = _error(columns, scale, integer, weights)
    if grid == "absmax":
        return scale, error
    guess = _least_squares(columns, extreme, integer, weights)
    for candidate in (guess, _refit(columns, guess, integer, weights)):
        found = _error(columns, candidate, integer, weights)
        better = found < error  # false for NaN: what overflows keeps absmax
        error = torch.where(better, found, error)
        scale = torch.where(better, candidate, scale)
    return scale, error


def _least_squares(columns: Tensor, extreme: Tensor, integer: IntegerGrid, weights: Tensor | None) -> Tensor:
    """The first guess whose q explains the most of its group, with that q's least-squares scale: bf16 [n]."""
    inverse = torch.where(extreme == 0, 0.0, -1.0 / extreme)
    best = torch.zeros_like(extreme)
    scale = torch.zeros_like(extreme)
    q, product = torch.empty_like(columns), torch.empty_like(columns)  # [g, n]
    for guess in integer.guesses:
        torch.mul(columns, inverse * guess, out=q).round_().clamp_(integer.lowest, integer.highest)
        dot = _sum_(_weighted(torch.mul(columns, q, out=product), weights)).clone()
        size = _sum_(_weighted(q.square_(), weights))
        explained = dot * dot / size
        better = explained > best
        best = torch.where(better, explained, best)
        scale = torch.where(better, dot / size, scale)
    return scale.bfloat16()


def _refit(columns: Tensor, scale: Tensor, integer: IntegerGrid, weights: Tensor | None) -> Tensor:
    """The least-squares scale of the q that `scale` gives: bf16 [n]."""
    q = _round(columns, scale, integer)
    dot, size = _sum_(_weighted(columns * q, weights)), _sum_(_weighted(q.square_(), weights))
    return torch.where(size == 0, 0.0, dot / size).bfloat16()


def _error(columns: Tensor, scale: Tensor, integer: IntegerGrid, weights: Tensor | None) -> Tensor:
    """Squared error [n] of what is stored with this bf16 scale [n]."""
    q = _round(columns, scale, integer)
    return _sum_(_weighted(q.mul_(scale.float()).sub_(columns).square_(), weights))


def _round(columns: Tensor, scale: Tensor, integer: IntegerGrid) -> Tensor:
    """q as formats/grouped.py rounds it, in float32 [g, n]."""
    divisor = torch.where(scale == 0, torch.inf, scale.float())  # x / inf = 0
    return (columns / divisor).round_().clamp_(integer.lowest, integer.highest)


def _sum_(columns: Tensor) -> Tensor:
    """Sum over the first dimension, a power of two, by halves: the order is fixed. Overwrites its argument."""
    height = columns.shape[0]
    while height > 1:
        height //= 2
        columns[:height].add_(columns[height : 2 * height])
    return columns[0]


def _row_sums(rows: Tensor) -> Tensor:
    """float32 [in] sums of squares over the rows, in order, for `ordered_sum`."""
    return torch.from_numpy(np.add.reduce(rows.square().numpy().astype(np.float64), axis=0))
