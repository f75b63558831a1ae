"""The stored forms of numbers, against independent definitions: bit by bit, and other libraries."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from localmoe.formats import fp8, int4, int8, nf4


@pytest.mark.parametrize(("module", "bits"), [(int4, 4), (int8, 8)])
def test_packing_is_that_of_compressed_tensors(module, bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    q = torch.randint(low, high + 1, (24, 96)).to(torch.int8)
    q[0, :2] = torch.tensor([low, high], dtype=torch.int8)
    packed = module.pack(q)
    assert torch.equal(packed, pack_to_int32(q, bits))
    assert torch.equal(module.unpack(packed), q)
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size(q.shape)), q)


def test_int4_bits_are_where_the_layout_says() -> None:
    q = torch.tensor([[-8, 7, 0, 1, -1, 2, -2, 3]], dtype=torch.int8)
    word = int4.pack(q).item() & 0xFFFFFFFF
    assert [(word >> (4 * i) & 15) - 8 for i in range(8)] == q[0].tolist()


@pytest.mark.parametrize(("module", "low", "high"), [(int4, -8, 7), (int8, -128, 127)])
def test_rounding_is_nearest_half_to_even_and_clamped(module, low: int, high: int) -> None:
    weight = torch.tensor([[0.5, 1.5, -0.5, -1.5, 2.4, -2.6, 1000.0, -1000.0] + [0.0] * 24])
    q = module.quantize(weight, torch.ones(1, 1, dtype=torch.bfloat16), 32)
    assert q[0, :8].tolist() == [0, 2, 0, -2, 2, -3, high, low]


@pytest.mark.parametrize("module", [int4, int8])
def test_a_zero_scale_stores_zeros(module) -> None:
    q = module.quantize(torch.randn(4, 64), torch.zeros(4, 2, dtype=torch.bfloat16), 32)
    assert not q.any()


@pytest.mark.parametrize("module", [int4, int8])
def test_dequantizing_is_exact(module) -> None:
    q = torch.randint(-8, 8, (16, 128)).to(torch.int8)
    scale = torch.randn(16, 4).bfloat16()
    wanted = q.double() * scale.double().repeat_interleave(32, dim=1)
    assert torch.equal(module.dequantize(module.pack(q), scale, 32).double(), wanted)


def test_nf4_is_that_of_bitsandbytes() -> None:
    import bitsandbytes.functional as bnb

    torch.manual_seed(0)
    weight = torch.randn(48, 192)
    codes, absmax = nf4.quantize(weight)
    assert codes.shape == (48, 96)
    assert absmax.shape == (48, 3)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(nf4.dequantize(codes, absmax), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (64, 64), (130, 129), (1, 300)])
def test_fp8_blocks_are_independent_computations(shape: tuple[int, int]) -> None:
    torch.manual_seed(shape[0])
    values = torch.randn(shape).to(torch.float8_e4m3fn)
    scale_inv = torch.rand(fp8.scale_shape(*shape, (128, 128))) + 0.01
    found = fp8.dequantize(values, scale_inv)
    for row in range(0, shape[0], 128):
        for column in range(0, shape[1], 128):
            block = slice(row, row + 128), slice(column, column + 128)
            assert torch.equal(found[block], values[block].float() * scale_inv[row // 128, column // 128])
