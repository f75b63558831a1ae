"""Which rounding a calibrated matrix gets: the grid by weight alone, the weighted grid, or GPTQ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from localmoe.formats import int4, int8
from localmoe.formats.scheme import Scheme
from quantize.gptq import gptq, refit
from quantize.layerwise import Statistics
from quantize.quantizers import group_scales, ordered_sum, pack_integers

Method = Literal["rtn", "gptq", "auto"]
METHODS: tuple[Method, ...] = ("rtn", "gptq", "auto")

LEAST_TOKENS = 64
"""Fewer tokens than this, or than an eighth of the row, and a Hessian says too little for GPTQ."""


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

    `rtn` tries the plain and the weighted grid; `auto` GPTQ too, where enough tokens came; `gptq` takes GPTQ there
    whatever the others reach. The plain grid is always among the candidates otherwise, so the result is never
    worse than its.
    """
    form = int4 if scheme.kind == "int4" else int8
    hessian = statistics.hessian
    found: dict[str, tuple[Tensor, Tensor]] = {}
    enough = reaches(statistics.tokens, weight.shape[1])
    if method != "gptq" or not enough:
        scale = group_scales(weight, scheme, "mse")[0]
        found["mse"] = form.quantize(weight, scale, scheme.group_size), scale
        if statistics.tokens:
            importance = hessian.diagonal() / statistics.tokens
            scale = group_scales(weight, scheme, "mse", importance)[0]
            found["weighted"] = form.quantize(weight, scale, scheme.group_size), scale
    if method != "rtn" and enough:
        q, scale = gptq(weight, hessian, scheme)
        found["gptq"] = q, refit(weight, q, scale, hessian, scheme)
    differences = {
        name: weight - form.dequantize(form.pack(q), scale, scheme.group_size) for name, (q, scale) in found.items()
    }
    errors = {name: _through(difference, hessian) for name, difference in differences.items()}
    best = min(found, key=lambda name: errors[name])  # the first of equals: the simplest
    norm = _through(weight, hessian)
    return Chosen(
        parts=pack_integers(*found[best], scheme),
        method=best,
        tokens=statistics.tokens,
        squared_error=ordered_sum(differences[best].square()),
        squared_norm=ordered_sum(weight.square()),
        zero_groups=int((found[best][1] == 0).sum()),
        output_error=float(f"{math.sqrt(max(errors[best], 0.0) / norm):.6g}") if norm > 0 else 0.0,
    )


def _through(matrix: Tensor, hessian: Tensor) -> float:
    """tr(M H M^T) = ||X M^T||^2."""
    return ordered_sum(torch.mm(matrix, hessian).mul_(matrix))
