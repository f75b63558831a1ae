"""Random matrices in every stored form, and where the kernels run: a CUDA device, or the interpreter on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from localmoe.formats import int4, int8
from localmoe.formats.weights import DenseWeight, Int4Weight, Int8Weight, Nf4Weight, Weight


def random_matrix(form: str, out_features: int, in_features: int, group: int = 32, largest: float = 1.0) -> Weight:
    """[out, in] of about unit gain; `largest` multiplies the scales. The first group is all zero scale."""
    if form == "bf16":
        return DenseWeight((torch.randn(out_features, in_features) * largest / in_features**0.5).bfloat16())
    groups = in_features // (64 if form == "nf4" else group)
    scale = (torch.rand(out_features, groups) + 0.5) * torch.where(torch.rand(out_features, groups) < 0.5, -1.0, 1.0)
    scale *= largest / in_features**0.5
    scale[:, 0] = 0.0
    if form == "nf4":
        codes = torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8)
        return Nf4Weight(codes, scale)
    if form == "int4":
        q = torch.randint(-8, 8, (out_features, in_features)).to(torch.int8)
        return Int4Weight(int4.pack(q), (scale / 4).bfloat16(), group)
    q = torch.randint(-128, 128, (out_features, in_features)).to(torch.int8)
    return Int8Weight(int8.pack(q), (scale / 64).bfloat16(), group)


@pytest.fixture
def matrix() -> Callable[..., Weight]:
    torch.manual_seed(0)
    return random_matrix


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
