"""The reference itself: blocks of rows must not change a product."""

from __future__ import annotations

import pytest
import torch

from localmoe.formats import int4, nf4
from localmoe.formats.weights import DenseWeight, Fp8Weight, Int4Weight, Nf4Weight, Weight, dequantize
from localmoe.kernels import reference


def weights() -> list[Weight]:
    torch.manual_seed(0)
    matrix = torch.randn(300, 128)
    codes, absmax = nf4.quantize(matrix)
    return [
        DenseWeight(matrix.half()),
        Int4Weight(int4.pack(torch.randint(-8, 8, (300, 128), dtype=torch.int8)), matrix[:, :4].bfloat16(), 32),
        Nf4Weight(codes, absmax),
        Fp8Weight(matrix.to(torch.float8_e4m3fn), torch.rand(3, 1)),
    ]


@pytest.mark.parametrize("weight", weights(), ids=lambda weight: type(weight).__name__)
def test_rows_in_blocks_equal_the_whole(weight: Weight, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 128)
    whole = x @ dequantize(weight).T
    monkeypatch.setattr(reference, "_BLOCK_WEIGHTS", 128 * 50)
    torch.testing.assert_close(reference.linear(x, weight), whole, rtol=1e-6, atol=1e-5)


def test_fp8_is_cut_only_where_its_blocks_are() -> None:
    weight = weights()[3]
    with pytest.raises(ValueError, match="block height"):
        reference.row_slice(weight, 64, 128)
    torch.testing.assert_close(dequantize(reference.row_slice(weight, 128, 300)), dequantize(weight)[128:])
