import math

import pytest
import torch
from torch import Tensor

from localmoe.formats import int4, int8
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.nf4 import dequantize as dequantize_nf4
from localmoe.formats.scheme import Scheme
from localmoe.formats.weights import dequantize
from quantize.quantizers import group_scales, ordered_sum, quantize_rows, relative_error

FORMS = {"int4": int4, "int8": int8}


def weights(kind: str, rows: int = 24, columns: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(rows, columns, generator=generator)
    match kind:
        case "normal":
            return normal * 0.02
        case "outliers":
            return normal * 0.02 * (1 + 30 * (torch.rand(rows, columns, generator=generator) > 0.98))
        case "one-sided":
            return normal.abs() * 0.02
        case "one value":
            return torch.where(torch.arange(columns) % 32 == 5, 0.3, 0.0).expand(rows, columns).contiguous()
        case "tiny":
            return normal * 1e-34
        case "huge":
            return normal * 1e30
        case _:
            return torch.where(torch.arange(columns) < 128, 0.0, normal)


KINDS = ("normal", "outliers", "one-sided", "one value", "tiny", "huge", "half zeros")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", [Scheme(kind, size) for kind in ("int4", "int8") for size in (32, 64, 128)], ids=str)
def test_mse_is_never_worse_than_absmax(kind: str, scheme: Scheme) -> None:
    rows = weights(kind)
    absmax = group_scales(rows, scheme, "absmax")[1]
    scale, errors, _ = group_scales(rows, scheme, "mse")
    assert (errors <= absmax).all()
    if kind in ("normal", "outliers"):
        assert errors.sum() < 0.99 * absmax.sum()
    assert scale.isfinite().all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("tiny", "huge")])
@pytest.mark.parametrize("grid", ["mse", "absmax"])
@pytest.mark.parametrize("scheme", [Scheme("int4", 32), Scheme("int8", 64), Scheme("nf4", 64)], ids=str)
def test_reported_error_is_that_of_what_is_stored(kind: str, grid: str, scheme: Scheme) -> None:
    rows = weights(kind)
    result = quantize_rows(rows, scheme, grid)  # type: ignore[arg-type]
    if scheme.kind == "nf4":
        stored = dequantize_nf4(result.parts["weight_nf4"], result.parts["weight_absmax"])
    else:
        form = FORMS[scheme.kind]
        stored = form.dequantize(result.parts["weight_packed"], result.parts["weight_scale"], scheme.group_size)
    norm = rows.double().square().sum().item()
    assert (rows - stored).double().square().sum().item() == pytest.approx(
        result.squared_error, rel=1e-5, abs=1e-9 * norm
    )
    assert result.squared_norm == pytest.approx(norm, rel=1e-5)


def test_search_is_within_a_percent_of_an_exhaustive_one() -> None:
    rows = weights("normal", 64)
    groups = rows.reshape(-1, 32)
    best = torch.full((len(groups),), math.inf)
    largest = groups.abs().amax(dim=1)
    for step in range(600):
        for sign in (1, -1):
            scale = (sign * largest / (4 + step / 50)).bfloat16()
            q = int4.quantize(groups, scale.unsqueeze(1), 32)
            error = (groups - q * scale.float().unsqueeze(1)).square().sum(dim=1)
            best = torch.minimum(best, error)
    found = group_scales(rows, Scheme("int4", 32), "mse")[1]
    assert found.sum() < 1.01 * best.sum()


def test_weights_on_a_grid_come_back_exactly() -> None:
    generator = torch.Generator().manual_seed(3)
    for kind, low, high in (("int4", -8, 8), ("int8", -128, 128)):
        q = torch.randint(low, high, (16, 128), generator=generator)
        q[:, ::32] = low
        scale = torch.rand(16, 4, generator=generator).bfloat16().float()
        rows = (q.reshape(16, 4, 32) * scale.unsqueeze(-1)).reshape(16, 128)
        result = quantize_rows(rows, Scheme(kind, 32), "mse")  # type: ignore[arg-type]
        stored = FORMS[kind].dequantize(result.parts["weight_packed"], result.parts["weight_scale"], 32)
        assert torch.equal(stored, rows)
        assert result.squared_error == 0


def test_zeros_have_scale_zero_and_one_encoding() -> None:
    result = quantize_rows(torch.zeros(3, 64), Scheme("int4", 32), "mse")
    assert torch.equal(result.parts["weight_scale"], torch.zeros(3, 2, dtype=torch.bfloat16))
    assert (result.parts["weight_packed"].view(torch.uint8) == 0x88).all()
    assert (result.squared_error, result.squared_norm) == (0, 0)
    nf4 = quantize_rows(torch.zeros(3, 64), Scheme("nf4", 64), "mse")
    assert torch.equal(dequantize_nf4(nf4.parts["weight_nf4"], nf4.parts["weight_absmax"]), torch.zeros(3, 64))


@pytest.mark.parametrize("scheme", [Scheme("int4", 32), Scheme("int8", 32), Scheme("nf4", 64)], ids=str)
def test_threads_and_chunks_change_nothing(scheme: Scheme) -> None:
    rows = weights("outliers", 700, 1024)  # several chunks of the search
    torch.set_num_threads(2)
    whole = quantize_rows(rows, scheme, "mse")
    torch.set_num_threads(1)
    single = quantize_rows(rows, scheme, "mse")
    assert (single.squared_error, single.squared_norm) == (whole.squared_error, whole.squared_norm)
    halves = [quantize_rows(part, scheme, "mse") for part in (rows[:333], rows[333:])]
    for suffix, tensor in whole.parts.items():
        assert torch.equal(single.parts[suffix], tensor)
        assert torch.equal(torch.cat([half.parts[suffix] for half in halves]), tensor)


def test_the_demos_experts_lose_what_was_measured(demo: object) -> None:
    """Figures of demo weights, so that a worse search shows: absmax 0.0956, signed and searched 0.0812."""
    found = {}
    with Checkpoint.open(demo) as checkpoint:  # type: ignore[arg-type]
        experts = [dequantize(checkpoint.weight(name)) for name in checkpoint.modules() if ".3.mlp.experts." in name]
    for grid in ("absmax", "mse"):
        results = [quantize_rows(weight, Scheme("int4", 32), grid) for weight in experts]  # type: ignore[arg-type]
        found[grid] = relative_error(
            sum(result.squared_error for result in results), sum(result.squared_norm for result in results)
        )
    assert found["absmax"] == pytest.approx(0.0956, abs=2e-4)
    assert found["mse"] == pytest.approx(0.0812, abs=2e-4)


def test_ordered_sum() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 1e3
    assert ordered_sum(values) == pytest.approx(math.fsum(values.tolist()), rel=1e-12)
    assert ordered_sum(torch.ones(3)) == 3
    assert ordered_sum(torch.empty(0)) == 0


def test_relative_error_has_six_digits() -> None:
    assert relative_error(2.0, 9.0) == 0.471405
    assert relative_error(0.0, 0.0) == 0
