"""A layer's experts in one call: the reference's sum within what rounding explains, and its bits in any batch.

Activations are rounded to 1/127 of the largest of 32, twice in a row: about 1 % of the result's norm for normal
activations, less for the sum of several experts.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from localmoe.formats import int4, int8
from localmoe.formats.weights import DenseWeight, Int4Weight, Int8Weight, Nf4Weight, Weight
from localmoe.kernels import cpu
from localmoe.kernels.dispatch import Kernels
from localmoe.kernels.experts import ExpertProducts, ExpertWeights

COUNT, HIDDEN, INNER, TOP = 12, 192, 320, 4
ROUNDING = 0.02


def matrix(form: str, out_features: int, in_features: int) -> Weight:
    if form == "bf16":
        return DenseWeight((torch.randn(out_features, in_features) / in_features**0.5).bfloat16())
    if form == "nf4":
        codes = torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8)
        return Nf4Weight(codes, (torch.rand(out_features, in_features // 64) + 0.5) / in_features**0.5)
    scale = (torch.rand(out_features, in_features // 32) + 0.5) / in_features**0.5
    if form == "int4":
        q = torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8)
        return Int4Weight(int4.pack(q), (scale / 4).bfloat16(), 32)
    q = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int16).to(torch.int8)
    return Int8Weight(int8.pack(q), (scale / 64).bfloat16(), 32)


def expert(form: str) -> ExpertWeights:
    return matrix(form, INNER, HIDDEN), matrix(form, INNER, HIDDEN), matrix(form, HIDDEN, INNER)


def layers(tier: str, form: str, shared_form: str | None, threads: int = 2) -> tuple[ExpertProducts, ExpertProducts]:
    """The same random layer on the tier's kernels and on the reference."""
    torch.manual_seed(1)
    experts = [expert(form) for _ in range(COUNT)]
    shared = None if shared_form is None else expert(shared_form)
    kernels = (Kernels.choose(tier, threads=threads), Kernels.choose("reference"))
    ours, reference = (each.experts(COUNT, experts.__getitem__, shared) for each in kernels)
    return ours, reference


def batch(count: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(count)
    ids = torch.stack([torch.randperm(COUNT)[:TOP] for _ in range(count)])
    return torch.randn(count, HIDDEN), ids, torch.rand(count, TOP)


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize(
    ("form", "shared"),
    [("int4", "int4"), ("int4", "int8"), ("int4", "bf16"), ("int8", None), ("nf4", "int8"), ("bf16", "bf16")],
)
@pytest.mark.parametrize("count", [1, 3, 8, 50])
def test_the_sum_is_the_references(tier: str, form: str, shared: str | None, count: int) -> None:
    ours, reference = layers(tier, form, shared)
    found, wanted = ours(*batch(count)), reference(*batch(count))
    assert (found - wanted).norm() / wanted.norm() < (1e-5 if form == "bf16" else ROUNDING)


@pytest.mark.parametrize("tier", cpu.available_tiers())
def test_a_row_has_the_same_bits_in_any_batch_slot_order_and_team(tier: str) -> None:
    ours, _ = layers(tier, "int4", "int8")
    alone, _ = layers(tier, "int4", "int8", threads=1)
    hidden, ids, weights = batch(8)
    together = ours(hidden, ids, weights)
    for first, last in itertools.combinations(range(9), 2):
        part = slice(first, last)
        assert torch.equal(alone(hidden[part], ids[part], weights[part]), together[part])
    slots = torch.tensor([2, 0, 3, 1])
    assert torch.equal(ours(hidden, ids[:, slots], weights[:, slots]), together)


@pytest.mark.parametrize("count", [1, 8, 50])
def test_one_expert_for_all_and_all_experts_for_one(count: int) -> None:
    ours, reference = layers("auto", "int4", None)
    hidden = torch.randn(count, HIDDEN)
    one = torch.full((count, 1), 5), torch.full((count, 1), 0.5)
    every = torch.arange(COUNT).expand(count, COUNT).contiguous(), torch.full((count, COUNT), 0.1)
    for ids, weights in (one, every):
        found, wanted = ours(hidden, ids, weights), reference(hidden, ids, weights)
        assert (found - wanted).norm() / wanted.norm() < ROUNDING


def test_an_expert_without_a_native_kernel_takes_the_reference() -> None:
    torch.manual_seed(0)
    experts = [tuple(DenseWeight(torch.randn(*s) / 8) for s in ((32, 64), (32, 64), (64, 32))) for _ in range(3)]
    hidden, ids, weights = torch.randn(2, 64), torch.tensor([[0, 1], [2, 1]]), torch.rand(2, 2)
    ours, reference = (Kernels.choose(tier).experts(3, experts.__getitem__) for tier in ("auto", "reference"))
    assert torch.equal(ours(hidden, ids, weights), reference(hidden, ids, weights))
