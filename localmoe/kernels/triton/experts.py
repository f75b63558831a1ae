"""All routed experts that a few tokens chose, in two launches: gate, up and SiLU, then down and the weighted sum.

A layer's experts on the card are stacked in slots; `slots` says which slot an expert has, -1 where it is elsewhere:
its pair is then left out, for whoever has it to add.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from localmoe.kernels.triton.launch import Launch
from localmoe.kernels.triton.unpack import row_products, stack_products
from localmoe.kernels.triton.weights import DeviceMatrix, stack_knobs, vector_knobs


@dataclass(frozen=True)
class ExpertStack:
    """Slots of experts: gate and up [I, H] and down [H, I], each stacked by slot; slots int32 [E]."""

    gate: DeviceMatrix
    up: DeviceMatrix
    down: DeviceMatrix
    slots: Tensor


@triton.jit
def gate_up_kernel(
    x, gate, gate_scales, up, up_scales, table, expert_ids, slots, hidden, length, height, top, x_stride, hidden_stride,
    slot_stride, scales_stride,
    KIND: tl.constexpr, GROUP: tl.constexpr, OCTETS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs: (pair of token and expert, block of the expert's rows). hidden float32 [T * k, I], in octets or not."""
    pair = tl.program_id(0)
    slot = tl.load(slots + tl.load(expert_ids + pair)).to(tl.int64)
    if slot >= 0:
        rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        rows_ok = rows < height
        at = rows.to(tl.int64)
        own, own_scales = slot * slot_stride, slot * scales_stride
        source = x + (pair // top) * x_stride
        g = row_products(
            source, gate + own, gate_scales + own_scales, table, at, rows_ok, length, KIND, GROUP, BLOCK_N, BLOCK_K
        )
        u = row_products(
            source, up + own, up_scales + own_scales, table, at, rows_ok, length, KIND, GROUP, BLOCK_N, BLOCK_K
        )
        place = (rows % 8) * (height // 8) + rows // 8 if OCTETS else rows
        tl.store(hidden + pair * hidden_stride + place, g / (1.0 + tl.exp(-g)) * u, mask=rows_ok)


@triton.jit
def down_kernel(
    hidden, down, down_scales, table, expert_ids, slots, weights, out, length, height, hidden_stride, out_stride,
    slot_stride, scales_stride,
    KIND: tl.constexpr, GROUP: tl.constexpr, FRESH: tl.constexpr, TOP: tl.constexpr, TOP_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs: (token, block of rows). Adds the token's experts to `out`, or to 0, in an order that no other token and
    no other expert's slot changes. They are beside each other in the block: nobody's loads wait for another's sum."""
    token = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_ok = rows < height
    target = out + token * out_stride + rows
    total = tl.zeros((BLOCK_N,), tl.float32) if FRESH else tl.load(target, mask=rows_ok, other=0.0)
    choice = tl.arange(0, TOP_BLOCK)
    named = choice < TOP
    weight = tl.load(weights + token * TOP + choice, mask=named, other=0.0)
    expert = tl.load(expert_ids + token * TOP + choice, mask=named, other=0)
    slot = tl.load(slots + expert, mask=named, other=-1).to(tl.int64)
    products = stack_products(
        hidden + token * TOP * hidden_stride, down, down_scales, table, slot, rows.to(tl.int64), rows_ok, length,
        hidden_stride, slot_stride, scales_stride, KIND, GROUP, TOP_BLOCK, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tl.store(target, total + tl.sum(products * weight[None, :], axis=1), mask=rows_ok)


def add_experts(
    x: Tensor,
    stack: ExpertStack,
    expert_ids: Tensor,
    weights: Tensor,
    hidden: Tensor,
    out: Tensor,
    launch: Launch,
    *,
    fresh: bool = False,
) -> Tensor:
    """out[t] += sum of weight * expert(x[t]) over the chosen experts that have a slot. A row's bits are its own.

    `fresh`: out[t] becomes that sum, whatever it was.

    x float32 [T, H], in octets unless gate is dense; expert_ids int32 [T, k]; weights float32 [T, k]; hidden float32
    [T * k, I] is room to work in; out float32 [T, H].
    """
    tokens, top = expert_ids.shape
    gate, up, down = stack.gate, stack.up, stack.down
    knobs = vector_knobs(gate.kind, launch)
    gate_up_kernel[(tokens * top, triton.cdiv(gate.out_features, knobs["BLOCK_N"]))](
        x, gate.values, gate.scales, up.values, up.scales, gate.table, expert_ids, stack.slots, hidden,
        gate.in_features, gate.out_features, top, x.stride(0), hidden.stride(0), *gate.strides,
        KIND=gate.kind, GROUP=gate.group, OCTETS=down.octets, **knobs,
    )  # fmt: skip
    block = triton.next_power_of_2(top)
    knobs = stack_knobs(down.kind, launch, block)
    down_kernel[(tokens, triton.cdiv(down.out_features, knobs["BLOCK_N"]))](
        hidden, down.values, down.scales, down.table, expert_ids, stack.slots, weights, out,
        down.in_features, down.out_features, hidden.stride(0), out.stride(0), *down.strides,
        KIND=down.kind, GROUP=down.group, FRESH=fresh, TOP=top, TOP_BLOCK=block, **knobs,
    )  # fmt: skip
    return out
