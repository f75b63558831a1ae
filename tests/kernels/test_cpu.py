"""The native kernels, every tier, against the reference.

Two bounds. Against the same product with activations rounded as the kernel rounds them, in float64: float32
summation error only, and for NF4, whose values are kept in 14 bits, half a step of theirs. Against the reference:
what rounding activations to int8 explains, half a step of each activation's scale times the weight's magnitude.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from localmoe.errors import DeviceError, UsageError
from localmoe.formats import int4, int8
from localmoe.formats.weights import DenseWeight, Int4Weight, Int8Weight, Nf4Weight, Weight, dequantize
from localmoe.kernels import cpu, dispatch, reference
from localmoe.kernels.cpu import MATVEC_TOKENS
from localmoe.kernels.dispatch import Kernels

SUMMATION = 5e-7  # float32 additions in another order, relative to the sum of magnitudes

FIXED_POINT = 0.5 / 8128  # NF4's values in the kernels, relative to absmax

IN_FEATURES = (32, 64, 96, 160, 1408, 2048)


def random_weight(kind: str, out_features: int, in_features: int, group: int) -> Weight:
    """Every stored value occurs; scales span magnitudes, with negative, zero and the largest ones."""
    torch.manual_seed(in_features * 131 + group)
    if kind == "bf16":
        return DenseWeight(torch.randn(out_features, in_features).bfloat16())
    scale = torch.randn(out_features, in_features // group) * torch.logspace(-4, 1, in_features // group)
    scale[0] = 0
    scale[1, 0] = 2.0**100
    if kind == "nf4":
        return Nf4Weight(torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8), scale.abs())
    if kind == "int4":
        q = torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8)
        return Int4Weight(int4.pack(q), scale.bfloat16(), group)
    q = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int16).to(torch.int8)
    return Int8Weight(int8.pack(q), scale.bfloat16(), group)


def random_activations(tokens: int, in_features: int) -> Tensor:
    torch.manual_seed(tokens)
    x = torch.randn(tokens, in_features)
    x[:, ::17] *= 100  # outliers, as residual streams have
    x[0, :32] = 0
    return x


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as the kernels round them, float64, and each one's step."""
    groups = x.reshape(x.shape[0], -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / torch.tensor(127.0)
    inverse = torch.where(scale > 0, 1 / scale, 0)
    q = (groups * inverse).round().clamp(-127, 127)
    return (q.double() * scale.double()).flatten(1), scale.expand_as(groups).flatten(1).double()


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize("in_features", IN_FEATURES)
@pytest.mark.parametrize(
    ("kind", "group"),
    [("int4", 32), ("int4", 64), ("int4", 128), ("int8", 32), ("int8", 64), ("int8", 128), ("nf4", 64)],
)
@pytest.mark.parametrize("tokens", [1, 5, 9, 300])
def test_quantized_products(tier: str, kind: str, group: int, in_features: int, tokens: int) -> None:
    if in_features % group:
        in_features += group - in_features % group
    weight = random_weight(kind, 37, in_features, group)
    x = random_activations(tokens, in_features)
    found = Kernels.choose(tier, threads=2).linear(x, weight).double()

    matrix = dequantize(weight).double()
    x_rounded, step = rounded(x)
    magnitude = x_rounded.abs() @ matrix.abs().T
    own_error = SUMMATION * magnitude
    if isinstance(weight, Nf4Weight):
        own_error += FIXED_POINT * x_rounded.abs() @ weight.absmax.double().repeat_interleave(64, dim=1).T
    assert ((found - x_rounded @ matrix.T).abs() <= own_error).all()
    explained = (0.5 + 1e-3) * step @ matrix.abs().T + own_error
    assert ((found - reference.linear(x, weight).double()).abs() <= explained).all()


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_extremes_do_not_saturate(tier: str, kind: str, tokens: int) -> None:
    form, pack = (Int4Weight, int4.pack) if kind == "int4" else (Int8Weight, int8.pack)
    lowest, highest = (-8, 7) if kind == "int4" else (-128, 127)
    for value in (lowest, highest):
        for sign in (1.0, -1.0):
            q = torch.full((3, 256), value, dtype=torch.int8)
            weight = form(pack(q), torch.ones(3, 8, dtype=torch.bfloat16), 32)
            found = Kernels.choose(tier, threads=1).linear(torch.full((tokens, 256), sign * 127.0), weight)
            assert found.tolist() == [[sign * 127.0 * 256 * value] * 3] * tokens


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize("tokens", [1, 9])
def test_nf4s_extremes_do_not_saturate(tier: str, tokens: int) -> None:
    for codes, value in ((0x00, -1.0), (0xFF, 1.0), (0x77, 0.0)):
        weight = Nf4Weight(torch.full((3, 128), codes, dtype=torch.uint8), torch.ones(3, 4))
        for sign in (1.0, -1.0):
            found = Kernels.choose(tier, threads=1).linear(torch.full((tokens, 256), sign * 127.0), weight)
            assert torch.allclose(found, torch.tensor(sign * 127.0 * 256 * value), rtol=1e-6)


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize("in_features", [1, 15, 16, 33, 576, 2048])
def test_bf16_products(tier: str, in_features: int) -> None:
    weight = random_weight("bf16", 19, in_features, 32)
    x = random_activations(3, in_features)
    found = Kernels.choose(tier, threads=2).linear(x, weight).double()
    matrix = dequantize(weight).double()
    assert ((found - x.double() @ matrix.T).abs() <= SUMMATION * (x.abs().double() @ matrix.abs().T)).all()


@pytest.mark.parametrize("tier", cpu.available_tiers())
@pytest.mark.parametrize(("kind", "in_features"), [("int4", 416), ("int8", 416), ("nf4", 448), ("bf16", 416)])
def test_a_row_does_not_depend_on_other_rows_or_threads(tier: str, kind: str, in_features: int) -> None:
    weight = random_weight(kind, 1000, in_features, 64 if kind == "nf4" else 32)
    x = random_activations(MATVEC_TOKENS, in_features)
    together = Kernels.choose(tier, threads=3).linear(x, weight)
    alone = Kernels.choose(tier, threads=1)
    for t in range(MATVEC_TOKENS):
        assert torch.equal(together[t : t + 1], alone.linear(x[t : t + 1], weight))


def test_the_pool_survives_many_short_runs_and_idle_times() -> None:
    weight = random_weight("int4", 4096, 64, 32)
    x = random_activations(1, 64)
    kernels = Kernels.choose("auto", threads=4)  # more threads than cores: sleeping and waking are exercised
    first = kernels.linear(x, weight)
    for _ in range(2000):
        assert torch.equal(kernels.linear(x, weight), first)


def test_an_expert_is_the_reference_with_rounded_activations() -> None:
    """Normal activations rounded to 1/127 of a group's largest cost about 0.6 % a product; two are in a row."""
    gate, up, down = (random_weight("int8", *shape, 32) for shape in ((96, 64), (96, 64), (64, 96)))
    gate, up, down = (Int8Weight(w.packed, torch.full_like(w.scale, 0.001), 32) for w in (gate, up, down))
    x = torch.randn(2, 64)
    found = Kernels.choose("auto", threads=2).expert(x, gate, up, down)
    wanted = reference.expert(x, gate, up, down)
    assert (found - wanted).norm() / wanted.norm() < 0.02


def test_shapes_that_disagree_never_reach_a_kernel() -> None:
    weight = random_weight("int4", 8, 64, 32)
    backend = cpu.Backend("portable", 1)
    matrix = backend.matrix(weight)
    with pytest.raises(ValueError, match="in_features"):
        backend.linear(torch.zeros(1, 96), matrix)
    assert isinstance(weight, Int4Weight)
    with pytest.raises(ValueError, match="scale"):
        backend.matrix(Int4Weight(weight.packed, weight.scale[:4], 32))


def test_choosing_a_tier() -> None:
    assert Kernels.choose("auto").tier == cpu.available_tiers()[-1]
    assert Kernels.choose("reference").threads is None
    with pytest.raises(UsageError, match="portable"):
        Kernels.choose("sse")
    with pytest.raises(UsageError, match="threads"):
        Kernels.choose("auto", threads=0)


def test_a_tier_this_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available_tiers", lambda: ("portable",))
    with pytest.raises(DeviceError, match="avx512"):
        Kernels.choose("avx512")
    assert Kernels.choose("auto").tier == "portable"


@pytest.mark.parametrize("tier", ["auto", "reference"])
def test_memory_of_a_prompt_is_given_back_when_decode_begins(monkeypatch: pytest.MonkeyPatch, tier: str) -> None:
    given: list[int] = []
    monkeypatch.setattr(dispatch, "_malloc_trim", given.append)
    kernels = Kernels.choose(tier)
    for tokens, times in (
        (1, 0),
        (dispatch.LONG_PASS, 0),
        (1, 0),
        (512, 0),
        (512, 0),
        (2, 1),
        (1, 1),
        (300, 1),
        (8, 2),
    ):
        kernels.share_cores(tokens)
        assert len(given) == times
    monkeypatch.setattr(dispatch, "_malloc_trim", None)  # not glibc
    kernels.share_cores(512)
    kernels.share_cores(1)
