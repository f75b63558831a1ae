"""Weights out of their stored words, in registers. Device functions; the other files launch."""

from __future__ import annotations

import triton
import triton.language as tl

DENSE = tl.constexpr(0)  # float32, float16 or bfloat16
INT4 = tl.constexpr(1)  # int32 words of 8 values q + 8, bf16 scale a group
INT8 = tl.constexpr(2)  # the same with 4 values q + 128; read as int64 words of 8
NF4 = tl.constexpr(3)  # bytes of 2 indices, high nibble first, read as int32 words of 8; float32 absmax a block of 64

# An integer below 2**23 or-ed into the bits of 2**23 is that float plus the integer: faster than a conversion
_MAGIC = tl.constexpr(0x4B000000)


@triton.jit
def element(word, table, i: tl.constexpr, KIND: tl.constexpr):
    """Element `i` (0 to 7) of every word, float32, before its scale."""
    if KIND == NF4:
        # byte i // 2 of the word, high nibble first
        number = tl.load(table + ((word >> (8 * (i // 2) + 4 * (1 - i % 2))) & 15))
    elif KIND == INT4:
        bits = ((word >> (4 * i)) & 15) | _MAGIC
        number = bits.to(tl.float32, bitcast=True) - 8388616.0
    else:
        bits = ((word >> (8 * i)) & 255).to(tl.int32) | _MAGIC
        number = bits.to(tl.float32, bitcast=True) - 8388736.0
    return number


@triton.jit
def tile(
    values, scales, table, rows, rows_ok, start, length,
    KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_K] of a matrix from column `start`, scaled in float32 and rounded to DOT; 0 outside.

    `values` and `scales` are the matrix's own, `rows` int64 [BLOCK_N], `length` its number of columns.
    """
    # Both branches end in one return: what follows a return inside an `if` is compiled all the same
    if KIND == DENSE:
        columns = start + tl.arange(0, BLOCK_K)
        inside = rows_ok[:, None] & (columns < length)[None, :]
        result = tl.load(values + rows[:, None] * length + columns[None, :], mask=inside, other=0.0).to(DOT)
    else:
        result = _packed_tile(values, scales, table, rows, rows_ok, start, length, KIND, GROUP, BLOCK_N, BLOCK_K, DOT)
    return result


@triton.jit
def _packed_tile(
    values, scales, table, rows, rows_ok, start, length,
    KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    words = length // 8
    word_at = start // 8 + tl.arange(0, BLOCK_K // 8)
    inside = rows_ok[:, None] & (word_at < words)[None, :]
    word = tl.load(values + rows[:, None] * words + word_at[None, :], mask=inside, other=0)
    place = tl.arange(0, 8)[None, None, :]
    if KIND == INT8:
        bits = ((word[:, :, None] >> (8 * place).to(tl.int64)) & 255).to(tl.int32)
        number = (bits | _MAGIC).to(tl.float32, bitcast=True) - 8388736.0
    elif KIND == INT4:
        bits = (word[:, :, None] >> (4 * place)) & 15
        number = (bits | _MAGIC).to(tl.float32, bitcast=True) - 8388616.0
    else:
        number = tl.load(table + ((word[:, :, None] >> (8 * (place // 2) + 4 * (1 - place % 2))) & 15))
    groups = length // GROUP
    PER_TILE: tl.constexpr = BLOCK_K // GROUP
    group_at = start // GROUP + tl.arange(0, PER_TILE)
    known = rows_ok[:, None] & (group_at < groups)[None, :]
    # outside the scale is 0, so what an absent word unpacks to does not matter
    scale = tl.load(scales + rows[:, None] * groups + group_at[None, :], mask=known, other=0.0).to(tl.float32)
    number = tl.reshape(number, (BLOCK_N, PER_TILE, GROUP)) * scale[:, :, None]
    return tl.reshape(number, (BLOCK_N, BLOCK_K)).to(DOT)


@triton.jit
def row_products(
    x, values, scales, table, rows, rows_ok, length,
    KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_N]: rows of a matrix times one vector x [length], always summed in the same order.

    x is in octets unless the matrix is dense. Nothing is rounded: a group's products are added in float32 and then
    multiplied by its scale.
    """
    if KIND == DENSE:
        result = _dense_products(x, values, rows, rows_ok, length, BLOCK_N, BLOCK_K)
    else:
        result = _packed_products(x, values, scales, table, rows, rows_ok, length, KIND, GROUP, BLOCK_N, BLOCK_K)
    return result


@triton.jit
def _dense_products(x, values, rows, rows_ok, length, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, length, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        known = columns < length
        weight = tl.load(
            values + rows[:, None] * length + columns[None, :], mask=rows_ok[:, None] & known[None, :], other=0.0
        )
        total += weight.to(tl.float32) * tl.load(x + columns, mask=known, other=0.0).to(tl.float32)[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def _packed_products(
    x, values, scales, table, rows, rows_ok, length,
    KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    groups = length // GROUP
    words = groups * (GROUP // 8)  # known to be a multiple, so that loads are of 16 bytes
    total = tl.zeros((BLOCK_N, BLOCK_K // 8), tl.float32)
    for start in range(0, words, BLOCK_K // 8):
        word_at = start + tl.arange(0, BLOCK_K // 8)
        known = word_at < words
        inside = rows_ok[:, None] & known[None, :]
        word = tl.load(values + rows[:, None] * words + word_at[None, :], mask=inside, other=0)
        group_at = word_at // (GROUP // 8)
        scale = tl.load(scales + rows[:, None] * groups + group_at[None, :], mask=inside, other=0.0)
        part = tl.zeros((BLOCK_N, BLOCK_K // 8), tl.float32)
        for i in tl.static_range(8):
            part += element(word, table, i, KIND) * tl.load(x + i * words + word_at, mask=known, other=0.0)[None, :]
        total += part * scale.to(tl.float32)
    return tl.sum(total, axis=1)


@triton.jit
def stack_products(
    x, values, scales, table, slots, rows, rows_ok, length, x_stride, slot_stride, scales_stride,
    KIND: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_N, COUNT]: the same rows of some matrices of a stack, each times a vector of its own, x's rows.

    Summed as by `row_products`. `slots` int64 [COUNT] says which matrices: where it is negative nothing is loaded, and
    the products are 0.
    """
    there = slots >= 0
    own = tl.where(there, slots, 0)
    mine = x + tl.arange(0, COUNT)[:, None] * x_stride
    if KIND == DENSE:
        at = (own * slot_stride)[None, :, None] + rows[:, None, None] * length
        total = tl.zeros((BLOCK_N, COUNT, BLOCK_K), tl.float32)
        for start in range(0, length, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            known = there[:, None] & (columns < length)[None, :]
            inside = rows_ok[:, None, None] & known[None, :, :]
            weight = tl.load(values + at + columns[None, None, :], mask=inside, other=0.0)
            vector = tl.load(mine + columns[None, :], mask=known, other=0.0)
            total += weight.to(tl.float32) * vector.to(tl.float32)[None, :, :]
    else:
        groups = length // GROUP
        words = groups * (GROUP // 8)
        at = (own * slot_stride)[None, :, None] + rows[:, None, None] * words
        scale_at = (own * scales_stride)[None, :, None] + rows[:, None, None] * groups
        total = tl.zeros((BLOCK_N, COUNT, BLOCK_K // 8), tl.float32)
        for start in range(0, words, BLOCK_K // 8):
            word_at = start + tl.arange(0, BLOCK_K // 8)
            known = there[:, None] & (word_at < words)[None, :]
            inside = rows_ok[:, None, None] & known[None, :, :]
            word = tl.load(values + at + word_at[None, None, :], mask=inside, other=0)
            group_at = word_at // (GROUP // 8)
            scale = tl.load(scales + scale_at + group_at[None, None, :], mask=inside, other=0.0)
            part = tl.zeros((BLOCK_N, COUNT, BLOCK_K // 8), tl.float32)
            for i in tl.static_range(8):
                vector = tl.load(mine + i * words + word_at[None, :], mask=known, other=0.0)
                part += element(word, table, i, KIND) * vector[None, :, :]
            total += part * scale.to(tl.float32)
    return tl.sum(total, axis=2)
