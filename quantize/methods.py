"""Which rounding a calibrated matrix gets: the grid by weight alone, the weighted grid, or GPTQ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from localmoe.formats import int4, int8
from localmoe.formats.scheme import Scheme
from quantize.gptq import descend, gptq
from quantize.layerwise import Statistics
from quantize.quantizers import ordered_sum, pack_integers
from quantize.search import rounded

Method = Literal["rtn", "gptq", "auto"]
METHODS: tuple[Method, ...] = ("rtn", "gptq", "auto")

LEAST_TOKENS = 64
"""Fewer tokens than this, or than an eighth of the row, and a Hessian says too little for GPTQ."""

_ROWS, _TILE = 256, 256  # of a matrix, and columns of its Hessian, that are multiplied at a time


@dataclass(frozen=True)
class Chosen:
    """A calibrated matrix as it is stored. `output_error` is ||X (W - W')|| / ||X W|| over the calibration inputs."""

    parts: dict[str, Tensor]
    method: str
    tokens: int
    squared_error: float
    squared_norm: float
    output_error: float
    zero_groups: int


def reaches(tokens: int, width: int) -> bool:
    """Whether so many tokens are enough for GPTQ on rows of `width`."""
    return tokens >= max(LEAST_TOKENS, width // 8)


def choose(weight: Tensor, scheme: Scheme, statistics: Statistics, method: Method) -> Chosen:
    """Round finite float32 `weight` [O, I] with the candidate that errs least on the calibration inputs.

    `rtn` tries the plain and the weighted grid; `auto` GPTQ and the plain grid, where enough tokens came; `gptq` takes
    GPTQ there whatever the other reaches. The error is that of the damped Hessian, since it has to hold for other
    inputs too. The plain grid is among the candidates otherwise, so the result is never worse than its.
    """
    form = int4 if scheme.kind == "int4" else int8
    hessian, ridge = statistics.hessian, statistics.ridge
    found: dict[str, dict[str, Tensor]] = {}  # as they are stored
    enough = method != "rtn" and reaches(statistics.tokens, weight.shape[1])
    if enough:
        q, scale = gptq(weight, statistics.factor, scheme)
        found["gptq"] = pack_integers(*descend(weight, q, scale, hessian, ridge, scheme), scheme)
    elif statistics.tokens:
        found["weighted"] = rounded(weight, scheme, (hessian.diagonal() + ridge) / statistics.tokens)
    if method != "gptq" or not enough:
        found["mse"] = rounded(weight, scheme)
    best, least, left, through = "", math.inf, weight, 0.0
    for name, parts in found.items():
        difference = weight - form.dequantize(parts["weight_packed"], parts["weight_scale"], scheme.group_size)
        added = ordered_sum(difference.square().mul_(ridge))
        error = error_through(difference, hessian, least - added)
        if not best or added + error <= least:  # of equals the simplest
            best, least, left, through = name, added + error, difference, error
    norm = error_through(weight, hessian)
    return Chosen(
        parts=found[best],
        method=best,
        tokens=statistics.tokens,
        squared_error=ordered_sum(left.square()),
        squared_norm=ordered_sum(weight.square()),
        zero_groups=int((found[best]["weight_scale"] == 0).sum()),
        output_error=float(f"{math.sqrt(max(through, 0.0) / norm):.6g}") if norm > 0 else 0.0,
    )


def error_through(matrix: Tensor, hessian: Tensor, enough: float = math.inf) -> float:
    """tr(M H M^T) = ||X M^T||^2; or, once that is seen to be above `enough`, some number that is.

    H is symmetric, so what is above its diagonal counts twice; and no row takes anything away.
    """
    total = 0.0
    for rows in torch.split(matrix, _ROWS):
        for start in range(0, len(hessian), _TILE):
            columns = slice(start, start + _TILE)
            part = rows[:, columns]
            product = part @ hessian[columns, columns]
            if start:
                product.addmm_(rows[:, :start], hessian[:start, columns], alpha=2)
            total += ordered_sum(product.mul_(part))
        if total > enough:
            break
    return total
