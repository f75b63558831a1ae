"""Experts with many tokens: a pass's (token, expert) pairs sorted by expert, each expert's weights read once a block.

Programs take blocks of pairs of one expert; a table of blocks, made on the device, says which. What an expert that is
not in the stack would add is left at 0, for whoever has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from localmoe.kernels.triton.experts import ExpertStack
from localmoe.kernels.triton.launch import Launch
from localmoe.kernels.triton.matmul import tile_products
from localmoe.kernels.triton.weights import triton_dtype


@dataclass(frozen=True)
class Blocks:
    """Pairs in the order of their experts, cut into blocks: `order` int32 [P] says which pair stands where, and of each
    block `expert` (-1: no block), `start` and `count` are int32."""

    order: Tensor
    expert: Tensor
    start: Tensor
    count: Tensor


def sort_pairs(expert_ids: Tensor, experts: int, launch: Launch) -> Blocks:
    """Of expert_ids int32 [T, k]. Nothing waits for the device; there are as many blocks as there could ever be."""
    size = launch.matmul_tokens
    flat = expert_ids.flatten().long()
    order = flat.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    blocks = (counts + size - 1) // size
    ends, pair_ends = blocks.cumsum(0), counts.cumsum(0)
    at = torch.arange(flat.numel() // size + min(experts, flat.numel()), device=flat.device)
    expert = torch.searchsorted(ends, at, right=True).clamp_(max=experts - 1)
    within = (at - (ends - blocks)[expert]) * size
    count = (counts[expert] - within).clamp_(max=size)
    return Blocks(
        order.int(),
        torch.where(at < ends[-1], expert, -1).int(),
        ((pair_ends - counts)[expert] + within).int(),
        count.int(),
    )


@triton.jit
def grouped_gate_up_kernel(
    x, gate, gate_scales, up, up_scales, table, order, block_expert, block_start, block_count, slots, hidden,
    length, height, top, x_stride, hidden_stride, slot_stride, scales_stride,
    KIND: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Programs: (block of pairs, block of the expert's rows). hidden [P, I], in the order of the experts."""
    block = tl.program_id(0)
    expert = tl.load(block_expert + block)
    slot = tl.load(slots + tl.maximum(expert, 0)).to(tl.int64)
    if (expert >= 0) & (slot >= 0):
        place = tl.load(block_start + block).to(tl.int64) + tl.arange(0, BLOCK_M)
        there = tl.arange(0, BLOCK_M) < tl.load(block_count + block)
        tokens = (tl.load(order + place, mask=there, other=0) // top).to(tl.int64)
        rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        rows_ok = rows < height
        at = rows.to(tl.int64)
        own, own_scales = slot * slot_stride, slot * scales_stride
        g = tile_products(
            x, tokens, there, x_stride, gate + own, gate_scales + own_scales, table, at, rows_ok, length,
            KIND, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, DOT,
        )  # fmt: skip
        u = tile_products(
            x, tokens, there, x_stride, up + own, up_scales + own_scales, table, at, rows_ok, length,
            KIND, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, DOT,
        )  # fmt: skip
        target = hidden + place[:, None] * hidden_stride + rows[None, :]
        tl.store(target, g / (1.0 + tl.exp(-g)) * u, mask=there[:, None] & rows_ok[None, :])


@triton.jit
def grouped_down_kernel(
    hidden, down, down_scales, table, order, block_expert, block_start, block_count, slots, weights, out,
    length, height, hidden_stride, out_stride, slot_stride, scales_stride,
    KIND: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Programs: (block of pairs, block of rows). out [P, H], in the order of the pairs: weight * expert."""
    block = tl.program_id(0)
    expert = tl.load(block_expert + block)
    slot = tl.load(slots + tl.maximum(expert, 0)).to(tl.int64)
    if (expert >= 0) & (slot >= 0):
        place = tl.load(block_start + block).to(tl.int64) + tl.arange(0, BLOCK_M)
        there = tl.arange(0, BLOCK_M) < tl.load(block_count + block)
        pairs = tl.load(order + place, mask=there, other=0).to(tl.int64)
        rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        rows_ok = rows < height
        product = tile_products(
            hidden, place, there, hidden_stride, down + slot * slot_stride, down_scales + slot * scales_stride, table,
            rows.to(tl.int64), rows_ok, length, KIND, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, DOT,
        )  # fmt: skip
        weight = tl.load(weights + pairs, mask=there, other=0.0)
        target = out + pairs[:, None] * out_stride + rows[None, :]
        tl.store(target, product * weight[:, None], mask=there[:, None] & rows_ok[None, :])


def grouped_experts(
    x: Tensor, stack: ExpertStack, blocks: Blocks, weights: Tensor, hidden: Tensor, out: Tensor, launch: Launch
) -> Tensor:
    """out[t * k + j] = weights[t, j] * expert(x[t]) for the chosen experts that have a slot; other rows stay.

    x float32 [T, H] in natural order; weights float32 [T, k]; hidden [T * k, I] of `launch.dot` is room to work in; out
    float32 [T * k, H]. Operands are rounded to `launch.dot`.
    """
    gate, up, down = stack.gate, stack.up, stack.down
    table = (blocks.order, blocks.expert, blocks.start, blocks.count, stack.slots)
    knobs = {
        "BLOCK_M": launch.matmul_tokens, "BLOCK_N": launch.matmul_rows,
        "DOT": triton_dtype(launch.dot), "num_warps": launch.matmul_warps, "num_stages": launch.matmul_stages,
    }  # fmt: skip
    count = len(blocks.expert)
    grouped_gate_up_kernel[(count, triton.cdiv(gate.out_features, launch.matmul_rows))](
        x, gate.values, gate.scales, up.values, up.scales, gate.table, *table, hidden,
        gate.in_features, gate.out_features, weights.shape[1], x.stride(0), hidden.stride(0),
        *gate.strides,
        KIND=gate.kind, GROUP=gate.group, BLOCK_K=max(launch.grouped_columns, gate.group), **knobs,
    )  # fmt: skip
    grouped_down_kernel[(count, triton.cdiv(down.out_features, launch.matmul_rows))](
        hidden, down.values, down.scales, down.table, *table, weights, out,
        down.in_features, down.out_features, hidden.stride(0), out.stride(0), *down.strides,
        KIND=down.kind, GROUP=down.group, BLOCK_K=max(launch.matmul_columns, down.group), **knobs,
    )  # fmt: skip
    return out
