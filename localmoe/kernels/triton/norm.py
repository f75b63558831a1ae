"""RMSNorm, with the sum into the residual stream before it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def norm_kernel(
    x, delta, weight, out, octets, width, x_stride, delta_stride, out_stride, octets_stride, epsilon,
    ADD: tl.constexpr, OCTETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    known = at < width
    value = tl.load(x + row * x_stride + at, mask=known, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row * delta_stride + at, mask=known, other=0.0).to(tl.float32)
        tl.store(x + row * x_stride + at, value, mask=known)
    gain = tl.load(weight + at, mask=known, other=0.0).to(tl.float32)  # on its way while the threads meet for the sum
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / width + epsilon)
    value = value * scale * gain
    tl.store(out + row * out_stride + at, value, mask=known)
    if OCTETS:
        tl.store(octets + row * octets_stride + (at % 8) * (width // 8) + at // 8, value, mask=known)


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, out: Tensor, octets: Tensor | None = None, delta: Tensor | None = None
) -> Tensor:
    """out = norm(x + delta) * weight, and x becomes x + delta. All [T, d], rows may be strided; x float32.

    `octets` float32 [T, d] gets the result once more, in octets; 8 must divide d then.
    """
    second = out if octets is None else octets
    added = x if delta is None else delta
    block = triton.next_power_of_2(x.shape[1])
    norm_kernel[(x.shape[0],)](
        x, added, weight, out, second, x.shape[1], x.stride(0), added.stride(0), out.stride(0), second.stride(0),
        epsilon, ADD=delta is not None, OCTETS=octets is not None, BLOCK=block, num_warps=4 if block <= 4096 else 8,
    )  # fmt: skip
    return out
