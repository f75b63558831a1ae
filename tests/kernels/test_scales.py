"""The C++ search against the one in torch: the same bits, on every tier and from every form of source."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from localmoe.errors import CheckpointError
from localmoe.formats import fp8, int4, int8
from localmoe.formats.safetensors import TensorInfo
from localmoe.formats.scheme import Scheme
from localmoe.kernels import scales
from localmoe.kernels.cpu import available_tiers
from quantize.quantizers import group_scales, quantize_rows
from quantize.search import quantize_slab, searched_grid, searched_scales
from quantize.sources import Slab

FORMS = {"int4": int4, "int8": int8}
SCHEMES = [Scheme(kind, size) for kind in ("int4", "int8") for size in (32, 64, 128)]
ROWS, COLUMNS = 41, 256  # not a whole number of any tier's vectors


def weights(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(ROWS, COLUMNS, generator=generator)
    match kind:
        case "normal":
            return normal * 0.02
        case "outliers":
            return normal * 0.02 * (1 + 30 * (torch.rand(ROWS, COLUMNS, generator=generator) > 0.98))
        case "half zeros":
            return torch.where(torch.arange(COLUMNS) < 128, 0.0, normal)
        case "ties":  # what is rounded lies between two numbers
            return torch.randint(-15, 16, (ROWS, COLUMNS), generator=generator) / 16.0
        case "tiny":
            return normal * 1e-34
        case "large":
            return normal * 1e18  # squares and their sums still fit
        case _:
            return normal * 1e30  # their squares do not


def same(found: scales.SearchedRows, rows: Tensor, scheme: Scheme, grid: str, importance: Tensor | None = None) -> None:
    """All four results of torch, to the bit."""
    scale, errors, norms = group_scales(rows, scheme, grid, importance)  # type: ignore[arg-type]
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.errors.view(-1).view(torch.int32), errors.view(torch.int32))
    assert torch.equal(found.norms.view(-1).view(torch.int32), norms.view(torch.int32))
    form = FORMS[scheme.kind]
    assert found.packed is not None
    assert torch.equal(found.packed, form.pack(form.quantize(rows, scale, scheme.group_size)))


@pytest.mark.parametrize("tier", available_tiers())
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_tiers_give_the_bits_of_torch(scheme: Scheme, tier: str) -> None:
    importance = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(6)) ** 3
    importance[:64] = 0.0  # a group that no input reaches
    for kind, grid in itertools.product(
        ("normal", "outliers", "half zeros", "ties", "tiny", "large", "huge"), ("mse", "absmax")
    ):
        rows = weights(kind)
        searched = searched_grid(scheme, grid)  # type: ignore[arg-type]
        same(scales.search(rows, searched, tier=tier), rows, scheme, grid)
        same(scales.search(rows, searched, importance=importance, tier=tier), rows, scheme, grid, importance)


@pytest.mark.parametrize("tier", available_tiers())
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_sources_are_read_as_torch_reads_them(scheme: Scheme, tier: str) -> None:
    half = weights("normal").bfloat16()
    grid = searched_grid(scheme, "mse")
    same(scales.search(half, grid, tier=tier), half.float(), scheme, "mse")
    generator = torch.Generator().manual_seed(8)
    codes = torch.randint(0, 256, (300, 384), dtype=torch.uint8, generator=generator)
    codes[codes & 127 == 127] = 0  # the codes of NaN
    values = codes.view(torch.float8_e4m3fn)
    factors = torch.rand(3, 3, generator=generator) * 1e-3  # an edge block of 44 rows below
    same(
        scales.search(values, grid, factors=factors, tier=tier),
        fp8.dequantize(values, factors),
        scheme,
        "mse",
    )


def slab_of(values: Tensor, factors: Tensor | None = None, block: tuple[int, int] = (128, 128)) -> Slab:
    info = TensorInfo("a.weight", values.dtype, tuple(values.shape), Path("shard"), 0, values.nbytes)
    return Slab(info, 0, values, factors, block)


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme("nf4", 64)], ids=str)
def test_slabs_are_quantized_as_rows_are(scheme: Scheme) -> None:
    values = (weights("normal") * 1000).to(torch.float8_e4m3fn)
    slabs = [slab_of(weights("normal").to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    slabs += [slab_of(values, torch.rand(1, 2)), slab_of(values, torch.rand(5, 6), (10, 48))]  # odd blocks go by torch
    for slab in slabs:
        found, wanted = quantize_slab(slab, scheme, "mse"), quantize_rows(slab.rows, scheme, "mse")
        assert found.parts.keys() == wanted.parts.keys()
        assert all(torch.equal(found.parts[suffix], wanted.parts[suffix]) for suffix in wanted.parts)
        assert (found.squared_error, found.squared_norm) == (wanted.squared_error, wanted.squared_norm)
        assert found.zero_groups == wanted.zero_groups


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_refused(value: float, dtype: torch.dtype) -> None:
    rows = weights("normal").to(dtype)
    rows[40, 200] = value
    with pytest.raises(CheckpointError, match=r"a\.weight has NaN or infinite values"):
        quantize_slab(slab_of(rows), Scheme("int4", 32), "mse")
    huge = quantize_slab(slab_of(weights("huge").to(dtype)), Scheme("int4", 32), "mse")
    assert huge.squared_norm == float("inf")


@pytest.mark.parametrize("tier", available_tiers())
def test_every_fp8_code_is_read(tier: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(40, 1)
    codes[codes & 127 == 127] = 0
    values, factors = codes.view(torch.float8_e4m3fn), torch.tensor([[3e-3, 1e-30]])
    scheme = Scheme("int8", 32)
    grid = searched_grid(scheme, "mse")
    same(scales.search(values, grid, factors=factors, tier=tier), fp8.dequantize(values, factors), scheme, "mse")
    for row, code in itertools.product((0, 39), (127, 255)):  # NaN
        damaged = codes.clone()
        damaged[row, 37] = code
        found = scales.search(damaged.view(torch.float8_e4m3fn), grid, factors=factors, tier=tier)
        assert found.norms.isnan().nonzero().tolist() == [[row, 1]]


def test_scales_alone() -> None:
    scheme, importance = Scheme("int4", 32), torch.rand(COLUMNS)
    rows = weights("outliers")
    assert torch.equal(searched_scales(rows, scheme, importance), group_scales(rows, scheme, "mse", importance)[0])


def test_misfits_are_refused() -> None:
    grid = searched_grid(Scheme("int4", 64), "mse")
    with pytest.raises(ValueError, match="does not divide"):
        scales.search(torch.ones(4, 96), grid)
    with pytest.raises(ValueError, match="importance"):
        scales.search(torch.ones(4, 128), grid, importance=torch.ones(64))
    values = torch.ones(256, 128).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="no factors"):
        scales.search(values, grid)
    with pytest.raises(ValueError, match="too few factors"):
        scales.search(values, grid, factors=torch.ones(1, 1))
    with pytest.raises(ValueError, match="blocks"):
        scales.search(values, grid, factors=torch.ones(32, 2), block=(8, 64))
    with pytest.raises(ValueError, match="no kernel tier"):
        scales.search(torch.ones(4, 128), grid, tier="altivec")
