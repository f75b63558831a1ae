"""What a token leaves in the latent cache, and its rotated query: RoPE, the latent's norm and the cache's rounding.

The layouts are `localmoe.model.kv_cache`'s (float32, bf16, int8 in bytes), the rotation `localmoe.model.rope`'s:
interleaved pairs that stay where they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def latent_kernel(
    q, kv, norm, rotations, start, cache, cache_bytes, heads, q_stride, kv_stride, cache_stride, epsilon,
    RANK: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Programs: (token, head); the one after the last head stores the latent and the shared key."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    position = (tl.load(start) + token).to(tl.int64)
    pair = tl.arange(0, BLOCK_P)
    known = pair < ROPE // 2
    real = tl.load(rotations + position * ROPE + 2 * pair, mask=known, other=0.0)
    imaginary = tl.load(rotations + position * ROPE + 2 * pair + 1, mask=known, other=0.0)
    if head < heads:
        at = q + token * q_stride + head * (NOPE + ROPE) + NOPE + 2 * pair
        even = tl.load(at, mask=known, other=0.0)
        odd = tl.load(at + 1, mask=known, other=0.0)
        tl.store(at, even * real - odd * imaginary, mask=known)
        tl.store(at + 1, even * imaginary + odd * real, mask=known)
    else:
        source = kv + token * kv_stride
        left = tl.load(source + RANK + 2 * pair, mask=known, other=0.0)
        right = tl.load(source + RANK + 2 * pair + 1, mask=known, other=0.0)
        place = tl.arange(0, BLOCK_R)
        inside = place < RANK
        latent = tl.load(source + place, mask=inside, other=0.0)
        latent = latent / tl.sqrt(tl.sum(latent * latent, axis=0) / RANK + epsilon)
        latent = latent * tl.load(norm + place, mask=inside, other=0.0)
        if PACKED:
            scale = tl.max(tl.abs(latent), axis=0) / 127.0
            inverse = tl.where(scale > 0, 1.0 / scale, 0.0)
            number = latent * inverse
            # half to even, as torch rounds: adding and taking away 1.5 * 2**23
            number = (number + 12582912.0) - 12582912.0
            number = tl.minimum(tl.maximum(number, -127.0), 127.0) + 128.0
            row = cache_bytes + position * cache_stride
            tl.store(row + place, number.to(tl.uint8), mask=inside)
            keys = (row + RANK).to(tl.pointer_type(tl.bfloat16))
            tl.store((row + RANK + 2 * ROPE).to(tl.pointer_type(tl.float32)), scale)
        else:
            keys = cache + position * cache_stride + RANK
            tl.store(cache + position * cache_stride + place, latent, mask=inside)
        tl.store(keys + 2 * pair, left * real - right * imaginary, mask=known)
        tl.store(keys + 2 * pair + 1, left * imaginary + right * real, mask=known)


def store_latents(
    q: Tensor, kv: Tensor, norm: Tensor, rotations: Tensor, start: Tensor, cache: Tensor, *, nope: int, epsilon: float
) -> None:
    """Rotate the queries where they are, and put the tokens' rows into `cache` from row `start` on.

    q float32 [T, A, n + p]; kv float32 [T, r + p] (rows may be strided); norm float32 [r]; rotations float32
    [positions, p], as real and imaginary parts; start int32 [1] on the device; cache [S, r + p] float32 or bfloat16,
    or uint8 [S, r + 2p + 4], whose rows may be strided. Raises ValueError for an int8 row whose parts are not aligned.
    """
    tokens, heads, width = q.shape
    rope = width - nope
    rank = kv.shape[1] - rope
    packed = check_packed(cache, rank, rope)
    latent_kernel[(tokens, heads + 1)](
        q, kv, norm, rotations, start, cache, cache, heads, q.stride(0), kv.stride(0), cache.stride(0), epsilon,
        RANK=rank, NOPE=nope, ROPE=rope, PACKED=packed, BLOCK_R=triton.next_power_of_2(rank),
        BLOCK_P=triton.next_power_of_2(rope // 2), num_warps=1 if rank <= 128 else 4,
    )  # fmt: skip


def check_packed(cache: Tensor, rank: int, rope: int) -> bool:
    """Whether the cache is int8's bytes. Raises ValueError where its bf16 and float32 parts would not be aligned."""
    packed = cache.dtype == torch.uint8
    if packed and (rank % 4 or rope % 2):
        raise ValueError(f"an int8 cache on the card needs a latent of a multiple of 4 numbers, not {rank}")
    return packed
