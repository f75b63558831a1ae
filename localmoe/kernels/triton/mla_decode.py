"""Absorbed latent attention of a few rows, split over the context (`localmoe.model.mla` has the maths).

A row's context is cut into the same shares whatever else is in the batch: their number is fixed, their length follows
from the row's own position. So its result has the same bits for 1 to 8 rows, and one CUDA graph serves any length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from localmoe.kernels.triton.latent import check_packed
from localmoe.kernels.triton.launch import Launch
from localmoe.kernels.triton.weights import triton_dtype

_HEADS = 16  # that share a latent row once it is loaded: the least a tensor core multiplies
_MERGED = 32  # of the rank, by a program that merges shares
_SHARES = 64  # that it loads at a time


@triton.jit
def decode_kernel(
    q_latent, q, cache, cache_bytes, start, partial, largest, sums, heads, q_stride, cache_stride, scale,
    RANK: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, PACKED: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Programs: (row, block of heads, share). A share beyond the context leaves no trace: `merge_kernel` knows."""
    token = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    split = tl.program_id(2)
    length = tl.load(start) + token + 1
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_S) * BLOCK_S
    first = split * share
    end = tl.minimum(first + share, length)
    if first < length:
        at = tl.arange(0, BLOCK_R)
        at_pe = tl.arange(0, BLOCK_P)
        in_rank, in_rope, in_heads = at < RANK, at_pe < ROPE, head < heads
        row = token.to(tl.int64) * heads + head
        q_l = tl.load(
            q_latent + row[:, None] * RANK + at[None, :], mask=in_heads[:, None] & in_rank[None, :], other=0.0
        ).to(DOT)
        q_pe = tl.load(
            q + token * q_stride + head[:, None] * (NOPE + ROPE) + NOPE + at_pe[None, :],
            mask=in_heads[:, None] & in_rope[None, :], other=0.0,
        ).to(DOT)  # fmt: skip
        top = tl.full((BLOCK_H,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_H,), tl.float32)
        mixed = tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
        for key in range(first, end, BLOCK_S):
            keys = (key + tl.arange(0, BLOCK_S)).to(tl.int64)
            there = keys < end
            if PACKED:
                base = cache_bytes + keys * cache_stride
                code = tl.load(base[:, None] + at[None, :], mask=there[:, None] & in_rank[None, :], other=128)
                latent = (code.to(tl.float32) - 128.0).to(DOT)  # exact in bf16 too
                unit = tl.load((base + RANK + 2 * ROPE).to(tl.pointer_type(tl.float32)), mask=there, other=0.0)
                pe_at = (base + RANK).to(tl.pointer_type(tl.bfloat16))
            else:
                base = cache + keys * cache_stride
                latent = tl.load(base[:, None] + at[None, :], mask=there[:, None] & in_rank[None, :], other=0.0).to(DOT)
                pe_at = base + RANK
            k_pe = tl.load(pe_at[:, None] + at_pe[None, :], mask=there[:, None] & in_rope[None, :], other=0.0).to(DOT)
            score = tl.dot(q_l, tl.trans(latent), input_precision="ieee")
            if PACKED:
                score = score * unit[None, :]
            score = tl.dot(q_pe, tl.trans(k_pe), score, input_precision="ieee") * scale
            score = tl.where(there[None, :], score, -float("inf"))
            higher = tl.maximum(top, tl.max(score, axis=1))
            power = tl.exp(score - higher[:, None])
            shrink = tl.exp(top - higher)
            total = total * shrink + tl.sum(power, axis=1)
            if PACKED:
                power = power * unit[None, :]
            mixed = tl.dot(power.to(DOT), latent, mixed * shrink[:, None], input_precision="ieee")
            top = higher
        place = row * SPLITS + split
        tl.store(partial + place[:, None] * RANK + at[None, :], mixed, mask=in_heads[:, None] & in_rank[None, :])
        tl.store(largest + place, top, mask=in_heads)
        tl.store(sums + place, total, mask=in_heads)


@triton.jit
def merge_kernel(
    partial, largest, sums, start, out, heads,
    RANK: tl.constexpr, SPLITS: tl.constexpr, OCTETS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Programs: (row, head, part of the rank). Shares are loaded `BLOCK_M` at a time (one after the other, each would
    wait for its own loads) and stay beside each other until the end."""
    token = tl.program_id(0)
    row = token.to(tl.int64) * heads + tl.program_id(1)
    length = tl.load(start) + token + 1
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_S) * BLOCK_S
    shares = tl.cdiv(length, share)
    every = tl.arange(0, BLOCK_N)
    own = tl.load(largest + row * SPLITS + every, mask=every < shares, other=-float("inf"))
    top = tl.max(own, axis=0)
    total = tl.sum(tl.load(sums + row * SPLITS + every, mask=every < shares, other=0.0) * tl.exp(own - top), axis=0)
    at = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = at < RANK
    mixed = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(0, shares, BLOCK_M):
        some = first + tl.arange(0, BLOCK_M)
        there = some < shares
        grow = tl.exp(tl.load(largest + row * SPLITS + some, mask=there, other=-float("inf")) - top)
        place = row * SPLITS + some
        latent = tl.load(
            partial + place[:, None] * RANK + at[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        mixed += latent * grow[:, None]
    place = (at % 8) * (RANK // 8) + at // 8 if OCTETS else at
    tl.store(out + row * RANK + place, tl.sum(mixed, axis=0) / total, mask=inside)


@dataclass(frozen=True)
class DecodeWorkspace:
    """Where a context's shares wait to be merged, float32: partial [T, A, splits, r], largest and sums [T, A, splits].

    One serves every layer and any number of rows up to T: nothing in it outlives an `attend`.
    """

    partial: Tensor
    largest: Tensor
    sums: Tensor


def new_workspace(tokens: int, heads: int, rank: int, launch: Launch, device: torch.device) -> DecodeWorkspace:
    """Room for up to `tokens` rows of `heads` heads. Made once: what it is for never allocates."""
    splits = max(1, launch.decode_programs // triton.cdiv(heads, _HEADS))
    partial = torch.empty(tokens, heads, splits, rank, dtype=torch.float32, device=device)
    largest, sums = torch.empty(2, tokens, heads, splits, dtype=torch.float32, device=device)
    return DecodeWorkspace(partial, largest, sums)


def attend(
    q_latent: Tensor,
    q: Tensor,
    cache: Tensor,
    start: Tensor,
    workspace: DecodeWorkspace,
    out: Tensor,
    launch: Launch,
    *,
    nope: int,
    scale: float,
    octets: bool = False,
) -> Tensor:
    """Each row t attends to rows 0 to start + t of the cache: out float32 [T, A, r], the weighted sum of latents, in
    octets if asked for.

    q_latent float32 [T, A, r], the query folded through k_b; q float32 [T, A, n + p], of which the rotated part is
    used; cache and start as for `store_latents`; `scale` multiplies the scores. Allocates nothing. A float32 cache of a
    large rank wants more shared memory than consumer cards have. Raises ValueError for a workspace made for fewer rows
    or for other heads.
    """
    tokens, heads, rank = q_latent.shape
    rope = q.shape[2] - nope
    packed = check_packed(cache, rank, rope)
    rows, *widths = workspace.partial.shape
    splits = widths[1]
    if rows < tokens or (widths[0], widths[2]) != (heads, rank):
        raise ValueError(f"a workspace of {[rows, *widths]} does not serve {tokens} rows of {heads} heads of {rank}")
    block_r = max(16, triton.next_power_of_2(rank))
    decode_kernel[(tokens, triton.cdiv(heads, _HEADS), splits)](
        q_latent, q, cache, cache, start, workspace.partial, workspace.largest, workspace.sums,
        heads, q.stride(0), cache.stride(0), scale,
        RANK=rank, NOPE=nope, ROPE=rope, PACKED=packed, SPLITS=splits, BLOCK_H=_HEADS, BLOCK_S=launch.decode_keys,
        BLOCK_R=block_r, BLOCK_P=max(16, triton.next_power_of_2(rope)), DOT=triton_dtype(launch.dot),
        num_warps=launch.decode_warps, num_stages=launch.decode_stages_int8 if packed else launch.decode_stages,
    )  # fmt: skip
    block_r = min(_MERGED, block_r)
    merge_kernel[(tokens, heads, triton.cdiv(rank, block_r))](
        workspace.partial, workspace.largest, workspace.sums, start, out, heads,
        RANK=rank, SPLITS=splits, OCTETS=octets, BLOCK_S=launch.decode_keys, BLOCK_R=block_r,
        BLOCK_N=triton.next_power_of_2(splits), BLOCK_M=min(_SHARES, triton.next_power_of_2(splits)), num_warps=4,
    )  # fmt: skip
    return out
