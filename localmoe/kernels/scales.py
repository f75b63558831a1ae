"""The search for the scales of grouped integers in C++; `quantize.quantizers` has the same in torch, and the maths.

Every tier gives the same bits as torch: there are no fused multiply-adds, and sums are taken in one order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from localmoe.kernels import _cpu
from localmoe.kernels.cpu import array, available_tiers

_ROWS = 16  # of the widest tier's vectors: a block of FP8 must hold whole ones


@dataclass(frozen=True)
class SearchedGrid:
    """`baseline` is |largest weight| / |scale| of plain absmax, `guesses` the same of the first guesses (none: absmax
    it is)."""

    bits: int  # 4 or 8
    group_size: int
    baseline: float
    guesses: tuple[float, ...]


@dataclass(frozen=True)
class SearchedRows:
    """int32 packed [R, in * bits / 32] (None where it was not asked for), bf16 scale [R, G], float32 squared errors and
    norms [R, G], both weighted by the importance if there is one."""

    packed: Tensor | None
    scale: Tensor
    errors: Tensor
    norms: Tensor


def blocks_fit(block: tuple[int, int], group_size: int) -> bool:
    """Whether FP8 weights with factors for such blocks can be searched as they are stored."""
    return block[0] % _ROWS == 0 and block[1] % group_size == 0


def search(
    weights: Tensor,
    grid: SearchedGrid,
    *,
    factors: Tensor | None = None,
    block: tuple[int, int] = (128, 128),
    importance: Tensor | None = None,
    pack: bool = True,
    tier: str | None = None,
) -> SearchedRows:
    """The best scales of contiguous `weights` [R, in], float32, bf16, or e4m3 with float32 `factors` a block, and with
    `pack` the integers too.

    `importance` float32 [in] weights each column's squared error. NaN and infinity are not looked for: they show in
    the norms.
    """
    rows, width = weights.shape
    groups = width // grid.group_size
    found = SearchedRows(
        torch.empty(rows, width * grid.bits // 32, dtype=torch.int32) if pack else None,
        torch.empty(rows, groups, dtype=torch.bfloat16),
        torch.empty(rows, groups),
        torch.empty(rows, groups),
    )
    codes = weights.view(torch.uint8) if weights.dtype == torch.float8_e4m3fn else weights
    _cpu.search_scales(
        tier or _best_tier(),
        grid.bits,
        grid.group_size,
        grid.baseline,
        list(grid.guesses),
        array(codes),
        None if factors is None else array(factors.to(torch.float32).contiguous()),
        block[0],
        block[1],
        None if importance is None else array(importance.contiguous()),
        None if found.packed is None else array(found.packed),
        array(found.scale),
        array(found.errors),
        array(found.norms),
    )
    return found


@cache
def _best_tier() -> str:
    return available_tiers()[-1]
