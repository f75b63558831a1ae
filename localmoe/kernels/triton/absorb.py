"""The two halves of kv_b in absorbed attention: queries folded through k_b, and v_b on what was attended to.

`kv_b` is stored [A * (n + v), r], a head's n rows of k_b before its v rows of v_b, and taken as it is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from localmoe.kernels.triton.launch import Launch
from localmoe.kernels.triton.unpack import row_products, tile
from localmoe.kernels.triton.weights import DeviceMatrix, vector_knobs


@triton.jit
def fold_kernel(
    q, values, scales, table, out, heads, length, q_stride,
    KIND: tl.constexpr, GROUP: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs: (row, head, block of the latent's columns). `length` is r."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.program_id(2) * BLOCK_K
    source = q + token * q_stride + head * (NOPE + ROPE)
    first = head.to(tl.int64) * (NOPE + VALUE)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for at in range(0, NOPE, BLOCK_N):
        place = at + tl.arange(0, BLOCK_N)
        known = place < NOPE
        number = tl.load(source + place, mask=known, other=0.0)
        weight = tile(
            values, scales, table, first + place, known, start, length, KIND, GROUP, BLOCK_N, BLOCK_K, tl.float32
        )
        total += tl.sum(weight * number[:, None], axis=0)
    columns = start + tl.arange(0, BLOCK_K)
    tl.store(out + (token.to(tl.int64) * heads + head) * length + columns, total, mask=columns < length)


@triton.jit
def unfold_kernel(
    attended, values, scales, table, out, heads, length, out_stride,
    KIND: tl.constexpr, GROUP: tl.constexpr, NOPE: tl.constexpr, VALUE: tl.constexpr, OCTETS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs: (row, head, block of the head's values). `length` is r."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    rows = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = rows < VALUE
    at = head.to(tl.int64) * (NOPE + VALUE) + NOPE + rows
    source = attended + (token.to(tl.int64) * heads + head) * length
    result = row_products(source, values, scales, table, at, known, length, KIND, GROUP, BLOCK_N, BLOCK_K)
    place = head * VALUE + rows
    if OCTETS:
        place = (place % 8) * (heads * VALUE // 8) + place // 8
    tl.store(out + token * out_stride + place, result, mask=known)


def fold_queries(q: Tensor, kv_b: DeviceMatrix, out: Tensor, launch: Launch, *, nope: int, value: int) -> Tensor:
    """out[t, a] = q[t, a, :n] k_b[a]: q float32 [T, A, n + p], out float32 [T, A, r]. Rows are computed each alone."""
    tokens, heads, width = q.shape
    columns = max(launch.fold_columns, kv_b.group)  # whole groups
    fold_kernel[(tokens, heads, triton.cdiv(kv_b.in_features, columns))](
        q, kv_b.values, kv_b.scales, kv_b.table, out, heads, kv_b.in_features, q.stride(0),
        KIND=kv_b.kind, GROUP=kv_b.group, NOPE=nope, ROPE=width - nope, VALUE=value,
        BLOCK_N=launch.fold_rows, BLOCK_K=columns, num_warps=launch.fold_warps,
    )  # fmt: skip
    return out


def unfold_values(
    attended: Tensor, kv_b: DeviceMatrix, out: Tensor, launch: Launch, *, nope: int, value: int, octets: bool
) -> Tensor:
    """out[t, a * v :][:v] = v_b[a] attended[t, a]: attended float32 [T, A, r], in octets unless kv_b is dense; out
    float32 [T, A * v], in octets (over the whole row) if asked for: 8 must divide A * v then."""
    tokens, heads, rank = attended.shape
    knobs = vector_knobs(kv_b.kind, launch, launch.unfold_columns)
    unfold_kernel[(tokens, heads, triton.cdiv(value, knobs["BLOCK_N"]))](
        attended, kv_b.values, kv_b.scales, kv_b.table, out, heads, rank, out.stride(0),
        KIND=kv_b.kind, GROUP=kv_b.group, NOPE=nope, VALUE=value, OCTETS=octets, **knobs,
    )  # fmt: skip
    return out
