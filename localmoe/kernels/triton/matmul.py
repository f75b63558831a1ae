"""Many tokens times a stored matrix on tensor cores: weights are unpacked in registers, a tile at a time."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from localmoe.kernels.triton.launch import Launch
from localmoe.kernels.triton.unpack import tile
from localmoe.kernels.triton.weights import DeviceMatrix, triton_dtype


@triton.jit
def tile_products(
    x, x_rows, x_ok, x_stride, values, scales, table, rows, rows_ok, length,
    KIND: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_M, BLOCK_N]: rows `x_rows` of x (natural order) times rows of the matrix, operands in DOT."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, length, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = x_ok[:, None] & (columns < length)[None, :]
        left = tl.load(x + x_rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(DOT)
        right = tile(values, scales, table, rows, rows_ok, start, length, KIND, GROUP, BLOCK_N, BLOCK_K, DOT)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    return total


@triton.jit
def matmul_kernel(
    x, values, scales, table, out, tokens, length, height, x_stride, out_stride,
    KIND: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Programs: (block of tokens, block of rows)."""
    at = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    rows = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    at_ok, rows_ok = at < tokens, rows < height
    total = tile_products(
        x, at, at_ok, x_stride, values, scales, table, rows, rows_ok, length,
        KIND, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, DOT,
    )  # fmt: skip
    tl.store(out + at[:, None] * out_stride + rows[None, :], total, mask=at_ok[:, None] & rows_ok[None, :])


def matmul(x: Tensor, matrix: DeviceMatrix, out: Tensor, launch: Launch) -> Tensor:
    """out = x W^T: x [T, in] in natural order, float32 [T, out]. Operands are rounded to `launch.dot`."""
    grid = (triton.cdiv(x.shape[0], launch.matmul_tokens), triton.cdiv(matrix.out_features, launch.matmul_rows))
    matmul_kernel[grid](
        x, matrix.values, matrix.scales, matrix.table, out, x.shape[0], matrix.in_features, matrix.out_features,
        x.stride(0), out.stride(0), KIND=matrix.kind, GROUP=matrix.group, BLOCK_M=launch.matmul_tokens,
        BLOCK_N=launch.matmul_rows, BLOCK_K=launch.matmul_columns, DOT=triton_dtype(launch.dot),
        num_warps=launch.matmul_warps, num_stages=launch.matmul_stages,
    )  # fmt: skip
    return out
