"""GPTQ: round a matrix column by column, and let the columns to come make up for what each rounding cost.

Minimises ||X (W - W')^T||^2 over the calibration inputs X through H = X^T X alone. After column i is rounded, the
error e divided by U[i, i] is taken from the later columns along U[i, i+1:], U being the upper Cholesky factor of H's
inverse (Frantar et al., https://arxiv.org/abs/2210.17323, algorithm 1). Columns keep their order (no act-order), so the
result is an ordinary grouped matrix. A group's scale is searched when its first column is reached, on the weights as
they have become by then, each column weighted by 1 / U[i, i]^2: what an error there costs after compensation.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from localmoe.formats import int4, int8
from localmoe.formats.scheme import Scheme
from quantize.search import searched_scales

_DAMPING = 0.01  # as in GPTQ's own code

SWEEPS = 2
"""Of coordinate descent after GPTQ."""

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
            scaled = block[first:last] / torch.where(step_size == 0, torch.inf, step_size)  # [g, O], in steps
            inside = near[first:last, first:last]
            for index, (column, whole, error) in enumerate(
                zip(scaled, rounded[first:last], errors[first:last], strict=True)
            ):
                torch.round(column, out=whole).clamp_(form.LOWEST, form.HIGHEST)
                torch.sub(column, whole, out=error).div_(inside[index, index])
                # Only the rest of the group now: what lies beyond gets a group's errors in one product, and beyond
                # the block the block's
                scaled[index + 1 :].addr_(inside[index, index + 1 :], error, alpha=-1)
            errors[first:last] *= step_size
            block[last:].addmm_(near[first:last, last:].t(), errors[first:last], alpha=-1)
        q[:, start:stop] = rounded.t()
        left[:, stop:].addmm_(errors.t(), factor[start:stop, stop:], alpha=-1)
    return q, scale


def descend(
    weight: Tensor, q: Tensor, scale: Tensor, hessian: Tensor, ridge: Tensor, scheme: Scheme, sweeps: int = SWEEPS
) -> tuple[Tensor, Tensor]:
    """(int8 q, bf16 scale) that err no more than those given, in r^T H r over the rows r of W - W'.

    Coordinate descent, for GPTQ decides on a number before it knows what the columns to come make up for. With
    H = X^T X + diag(ridge), r = w - q s what is left of a row and p = H r, a group's scale moves by <q, p> / <q, H q>,
    rounded to bf16, where that lowers the error; then each of its integers to the level next to
    q + p[i] / (s H[i, i]): the best one while all others stay.
    """
    form = int4 if scheme.kind == "int4" else int8
    size, width = scheme.group_size, weight.shape[1]
    step = size * _BLOCK_GROUPS
    steps = q.t().contiguous().float()  # [I, O]: a column is contiguous
    fitted = scale.t().contiguous().float()  # [G, O]
    left = weight.t().contiguous() - steps * fitted.repeat_interleave(size, dim=0)  # [I, O]
    for start in [*range(0, width, step)] * sweeps:
        stop = min(width, start + step)
        near = hessian[start:stop, start:stop] + ridge[start:stop].diag()
        pulled = left[start:stop] * ridge[start:stop, None]  # [b, O]: p, kept up with the block's own moves
        pulled.addmm_(hessian[start:stop], left)
        for first in range(start, stop, size):
            group = slice(first, first + size)
            inside = slice(first - start, first - start + size)
            part, scales, square = steps[group], fitted[first // size], near[inside, inside]
            before = part * scales
            _move_scale(part, scales, pulled[inside], square)
            _move_integers(part, scales, pulled[inside], square, form)
            change = (part * scales).sub_(before)  # [g, O]
            left[group] -= change
            pulled[inside.stop :].addmm_(near[inside.stop :, inside], change, alpha=-1)
    return steps.t().to(torch.int8).contiguous(), fitted.t().bfloat16().contiguous()


def _move_scale(steps: Tensor, scale: Tensor, pulled: Tensor, near: Tensor) -> None:
    """Move in place a group's scales [O] of integers [g, O]; `pulled` is H r [g, O] and kept up, `near` is H [g, g]."""
    weighed = near @ steps
    slope = (steps * pulled).sum(dim=0)  # [O]
    bend = (steps * weighed).sum(dim=0)
    after = (scale + torch.where(bend > 0, slope / bend, 0.0)).bfloat16().float()
    move = after - scale
    move = torch.where(move * (move * bend - 2 * slope) < 0, move, 0.0)  # false for NaN
    scale += move
    pulled.addcmul_(weighed, move, value=-1)


def _move_integers(steps: Tensor, scale: Tensor, pulled: Tensor, near: Tensor, form: ModuleType) -> None:
    """Move in place a group's integers, column by column."""
    scaled = pulled * torch.where(scale == 0, 0.0, 1 / scale)  # [g, O], in steps
    for index, (column, pull, curvature) in enumerate(zip(steps, scaled, near.diagonal().tolist(), strict=True)):
        if curvature <= 0:
            continue  # no input ever came
        best = torch.add(column, pull, alpha=1 / curvature).round_().clamp_(form.LOWEST, form.HIGHEST)
        scaled[index + 1 :].addr_(near[index + 1 :, index], best - column, alpha=-1)
        column.copy_(best)


def damping(hessian: Tensor, tokens: int) -> Tensor:
    """float32 [I] that is added to the diagonal of the H = X^T X of so many tokens, each of its numbers at least 0.

    What few tokens show of how the columns of a wide row go together is mostly chance: 0.01 of the mean alone leaves an
    error on other tokens that may be larger than plain rounding's. Found on held-out tokens (docs/benchmarks.md).
    """
    diagonal = hessian.diagonal()
    return diagonal * (len(diagonal) / max(tokens, 1)) + _DAMPING * diagonal.mean()


def inverse_factor(hessian: Tensor, ridge: Tensor) -> Tensor:
    """Upper triangular U with U^T U = (H + diag(ridge))^-1, float32 [I, I]; for zeros, that of I.

    With the columns in reverse, Cholesky gives H = R R^T with R upper triangular, and U is R's inverse: half the work
    of inverting H and factoring that. In float64 where float32 does not do; raises torch.linalg.LinAlgError where the
    damped H is not positive definite.
    """
    damped = hessian.flip(0, 1)
    damped.diagonal().add_(ridge.flip(0) if ridge.any() else 1.0)
    root, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        root = torch.linalg.cholesky(damped.double())
    return _inverse_upper(root.flip(0, 1)).float()


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
