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

_SOLVED = 128  # up to so many columns a triangle is inverted at once
_BLOCK_GROUPS = 4  # groups whose compensation reaches the rest of the matrix in one product


def gptq(weight: Tensor, factor: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(int8 q [O, I], bf16 scale [O, I/g]) of float32 `weight` [O, I]; `factor` is `inverse_factor` of its inputs.

    A column that no input reached is rounded like any other and compensates nothing.
    """
    form = int4 if scheme.kind == "int4" else int8
    group, width = scheme.group_size, weight.shape[1]
    importance = factor.diagonal().square().reciprocal()  # [I]
    left = weight.clone()  # becomes what is left to round
    q = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(weight.shape[0], width // group, dtype=torch.bfloat16)
    step = group * _BLOCK_GROUPS
    for start in range(0, width, step):
        stop = min(width, start + step)
        block = left[:, start:stop].t().contiguous()  # [b, O]: a column is contiguous
        errors, rounded = torch.empty_like(block), torch.empty_like(block)
        near = factor[start:stop, start:stop]
        for first in range(0, stop - start, group):
            last = first + group
            part = block[first:last].t().contiguous()  # [O, g]
            found = searched_scales(part, scheme, importance[start + first : start + last])[:, 0]  # [O]
            scale[:, (start + first) // group] = found
            step_size = found.float()
            divisor = torch.where(step_size == 0, torch.inf, step_size)
            for index in range(first, last):
                torch.div(block[index], divisor, out=rounded[index]).round_().clamp_(form.LOWEST, form.HIGHEST)
                errors[index] = (block[index] - rounded[index] * step_size) / near[index, index]
                # Only the rest of the group now: what lies beyond gets a group's errors in one product, and beyond
                # the block the block's
                block[index + 1 : last].addr_(near[index, index + 1 : last], errors[index], alpha=-1)
            block[last:].addmm_(near[first:last, last:].t(), errors[first:last], alpha=-1)
        q[:, start:stop] = rounded.t()
        left[:, stop:].addmm_(errors.t(), factor[start:stop, stop:], alpha=-1)
    return q, scale


def refit(weight: Tensor, q: Tensor, scale: Tensor, hessian: Tensor, scheme: Scheme) -> Tensor:
    """bf16 scales [O, I/g] for integers `q` [O, I] that are given: one sweep of coordinate descent over the groups.

    A group's scale s is moved by d = <q, H r> / <q, H q>, the least-squares step for what is left, r = w - q s, of
    ||X r||^2; after rounding to bf16 it is kept where the error falls. GPTQ has chosen each scale before it knew what
    the columns to come would make up for.
    """
    size, width = scheme.group_size, weight.shape[1]
    steps = q.float()  # [O, I]
    fitted = scale.clone()
    left = weight - steps * scale.float().repeat_interleave(size, dim=1)  # [O, I]
    for start in range(0, width, size * _BLOCK_GROUPS):
        stop = min(width, start + size * _BLOCK_GROUPS)
        pulled = left @ hessian[:, start:stop]  # [O, b]: H r, kept up with the block's own moves
        for first in range(start, stop, size):
            columns = slice(first, first + size)
            part = steps[:, columns]  # [O, g]
            slope = (part * pulled[:, first - start : first - start + size]).sum(dim=1)  # [O]
            bend = (part * (part @ hessian[columns, columns])).sum(dim=1)
            before = fitted[:, first // size].float()
            after = (before + torch.where(bend > 0, slope / bend, 0.0)).bfloat16()
            move = after.float() - before
            better = move * (move * bend - 2 * slope) < 0  # false for NaN
            move = torch.where(better, move, 0.0)
            fitted[:, first // size] = (before + move).bfloat16()
            change = part * move.unsqueeze(1)
            left[:, columns] -= change
            pulled.addmm_(change, hessian[columns, start:stop], alpha=-1)
    return fitted


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper triangular U with U^T U = (H + damping * mean(diag H))^-1, float32 [I, I]; computed in float64.

    With the columns in reverse, Cholesky gives H = R R^T with R upper triangular, and U is R's inverse: half the work
    of inverting H and factoring that. Raises torch.linalg.LinAlgError where damping does not make H positive definite.
    """
    damped = hessian.double().flip(0, 1)
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    diagonal += damping * mean if mean > 0 else 1.0
    return _inverse_upper(torch.linalg.cholesky(damped).flip(0, 1)).float()


def _inverse_upper(matrix: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, by halves: products are faster than solving for every column."""
    size = len(matrix)
    if size <= _SOLVED:
        eye = torch.eye(size, dtype=matrix.dtype)
        solved: Tensor = torch.linalg.solve_triangular(matrix, eye, upper=True)
        return solved
    half = size // 2
    inverse = torch.zeros_like(matrix)
    inverse[:half, :half] = _inverse_upper(matrix[:half, :half])
    inverse[half:, half:] = _inverse_upper(matrix[half:, half:])
    inverse[:half, half:] = -(inverse[:half, :half] @ matrix[:half, half:]) @ inverse[half:, half:]
    return inverse
