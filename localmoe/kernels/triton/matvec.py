"""A few vectors times a stored matrix. Each row's program knows nothing of the others: its bits are its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from localmoe.kernels.triton.launch import Launch
from localmoe.kernels.triton.unpack import row_products
from localmoe.kernels.triton.weights import DeviceMatrix, vector_knobs


@triton.jit
def matvec_kernel(
    x, values, scales, table, addend, out, length, height, x_stride, addend_stride, out_stride,
    KIND: tl.constexpr, GROUP: tl.constexpr, ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs: (row of x, block of the matrix's rows); rows of x first, so that one meets the other's words in L2."""
    token = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_ok = rows < height
    result = row_products(
        x + token * x_stride, values, scales, table, rows.to(tl.int64), rows_ok, length, KIND, GROUP, BLOCK_N, BLOCK_K
    )
    if ADD:
        result += tl.load(addend + token * addend_stride + rows, mask=rows_ok, other=0.0)
    tl.store(out + token * out_stride + rows, result, mask=rows_ok)


def matvec(x: Tensor, matrix: DeviceMatrix, out: Tensor, launch: Launch, addend: Tensor | None = None) -> Tensor:
    """out[t] = W x[t] (+ addend[t]): x float32 [T, in], in octets unless the matrix is dense; out float32 [T, out].

    `addend` float32 [T, out] may be `out` itself, or [out], a bias. `out` may be a slice of wider rows.
    """
    added = out if addend is None else addend
    knobs = vector_knobs(matrix.kind, launch)
    matvec_kernel[(x.shape[0], triton.cdiv(matrix.out_features, knobs["BLOCK_N"]))](
        x, matrix.values, matrix.scales, matrix.table, added, out, matrix.in_features, matrix.out_features,
        x.stride(0), added.stride(0) if added.ndim == 2 else 0, out.stride(0),
        KIND=matrix.kind, GROUP=matrix.group, ADD=addend is not None, **knobs,
    )  # fmt: skip
    return out


def new_output(x: Tensor, matrix: DeviceMatrix) -> Tensor:
    """Room for the products of all rows of `x`."""
    return torch.empty(x.shape[0], matrix.out_features, dtype=torch.float32, device=x.device)
