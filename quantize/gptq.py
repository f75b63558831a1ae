"""GPTQ: round a matrix column by column, and let the columns to come make up for what each rounding cost.

Minimises ||X (W - W')^T||^2 over the calibration inputs X through H = X^T X alone. After column i is rounded, the
error e divided by U[i, i] is taken from the later columns along U[i, i+1:], U being the upper Cholesky factor of H's
inverse (Frantar et al., https://arxiv.org/abs/2210.17323, algorithm 1). Columns keep their order (no act-order), so the
result is an ordinary grouped matrix. A group's scale is searched when its first column is reached, on the weights as
they have become by then, each column weighted by 1 / U[i, i]^2: what an error there costs after compensation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from localmoe.formats import int4, int8
from localmoe.formats.scheme import Scheme
from quantize.search import searched_scales

DAMPING = 0.01
"""Share of the diagonal's mean that is added to the diagonal, as in GPTQ's own code."""

_BLOCK_GROUPS = 4  # groups whose compensation reaches the rest of the matrix in one product


def gptq(weight: Tensor, hessian: Tensor, scheme: Scheme, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """(int8 q [O, I], bf16 scale [O, I/g]) of float32 `weight` [O, I] with `hessian` = X^T X, float32 [I, I].

    A column that no input reached is rounded like any other and compensates nothing. Raises
    torch.linalg.LinAlgError for a Hessian that damping does not make positive definite.
    """
    form = int4 if scheme.kind == "int4" else int8
    group, width = scheme.group_size, weight.shape[1]
    factor = inverse_factor(hessian, damping)  # U [I, I]
    importance = factor.diagonal().square().reciprocal()  # [I]
    left = weight.clone()  # becomes what is left to round
    q = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(weight.shape[0], width // group, dtype=torch.bfloat16)
    step = group * _BLOCK_GROUPS
    for start in range(0, width, step):
        stop = min(width, start + step)
        block = left[:, start:stop].t().contiguous()  # [b, O]: a column is contiguous
        errors = torch.empty_like(block)
        near = factor[start:stop, start:stop]
        for index in range(stop - start):
            column = start + index
            if index % group == 0:
                part = block[index : index + group].t().contiguous()  # [O, g]
                found = searched_scales(part, scheme, importance[column : column + group])  # [O, 1]
                scale[:, column // group] = found[:, 0]
                step_size = found[:, 0].float()  # [O]
                divisor = torch.where(step_size == 0, torch.inf, step_size)
            rounded = (block[index] / divisor).round_().clamp_(form.LOWEST, form.HIGHEST)
            q[:, column] = rounded.to(torch.int8)
            errors[index] = (block[index] - rounded * step_size) / near[index, index]
            # Only the rest of the block now; what lies beyond gets all of the block's errors in one product
            block[index + 1 :].addr_(near[index, index + 1 :], errors[index], alpha=-1)
        left[:, stop:].addmm_(errors.t(), factor[start:stop, stop:], alpha=-1)
    return q, scale


def refit(weight: Tensor, q: Tensor, scale: Tensor, hessian: Tensor, scheme: Scheme) -> Tensor:
    """bf16 scales [O, I/g] for integers `q` [O, I] that are given: one sweep of coordinate descent over the groups.

    A group's scale s is moved by d = <q, H r> / <q, H q>, the least-squares step for what is left, r = w - q s, of
    ||X r||^2; after rounding to bf16 it is kept where the error falls. GPTQ has chosen each scale before it knew what
    the columns to come would make up for.
    """
    size = scheme.group_size
    steps = q.float()  # [O, I]
    fitted = scale.clone()
    left = weight - steps * scale.float().repeat_interleave(size, dim=1)  # [O, I]
    for group in range(scale.shape[1]):
        columns = slice(group * size, (group + 1) * size)
        part = steps[:, columns]  # [O, g]
        slope = (part * (left @ hessian[:, columns])).sum(dim=1)  # [O]
        bend = (part * (part @ hessian[columns, columns])).sum(dim=1)
        before = fitted[:, group].float()
        after = (before + torch.where(bend > 0, slope / bend, 0.0)).bfloat16()
        move = after.float() - before
        better = move * (move * bend - 2 * slope) < 0  # false for NaN
        move = torch.where(better, move, 0.0)
        fitted[:, group] = (before + move).bfloat16()
        left[:, columns] -= part * move.unsqueeze(1)
    return fitted


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with U^T U = (H + damping * mean(diag H))^-1, float32 [I, I]; computed in float64."""
    damped = hessian.double()
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    diagonal += damping * mean if mean > 0 else 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
