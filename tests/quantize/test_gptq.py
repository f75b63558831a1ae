"""GPTQ against a plain slow implementation, and what it is for: a smaller error of the layer's output."""

import pytest
import torch
from torch import Tensor

from localmoe.formats import int4, int8
from localmoe.formats.scheme import Scheme
from quantize.gptq import DAMPING, gptq, inverse_factor, refit
from quantize.quantizers import group_scales

FORMS = {"int4": int4, "int8": int8}


def problem(rows: int = 12, width: int = 192, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """Weights, and correlated inputs [tokens, width] of very different sizes."""
    generator = torch.Generator().manual_seed(11)
    mixing = torch.randn(width, width, generator=generator) * torch.rand(width, generator=generator) ** 2
    inputs = torch.randn(tokens, width, generator=generator) @ mixing
    return torch.randn(rows, width, generator=generator) * 0.05, inputs


def slow_gptq(weight: Tensor, hessian: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """A column at a time, the remaining columns' inverse Hessian made anew for each (Optimal Brain Surgeon)."""
    form, group = FORMS[scheme.kind], scheme.group_size
    left = weight.double()
    damped = hessian.double()
    damped = damped + DAMPING * damped.diagonal().mean() * torch.eye(len(damped), dtype=torch.float64)
    inverses = [torch.linalg.inv(damped[index:, index:]) for index in range(len(damped))]
    importance = torch.stack([1 / inverse[0, 0] for inverse in inverses]).float()
    q = torch.zeros(weight.shape, dtype=torch.int8)
    scales = []
    for index in range(weight.shape[1]):
        if index % group == 0:
            part = slice(index, index + group)
            scales.append(group_scales(left[:, part].float(), scheme, "mse", importance[part])[0][:, 0])
        step = scales[-1].double()
        q[:, index] = (left[:, index] / step).round().clamp(form.LOWEST, form.HIGHEST).to(torch.int8)
        error = left[:, index] - q[:, index] * step
        inverse = inverses[index]
        left[:, index:] -= error[:, None] * inverse[0][None] / inverse[0, 0]
    return q, torch.stack(scales, dim=1)


def output_error(weight: Tensor, q: Tensor, scale: Tensor, inputs: Tensor, scheme: Scheme) -> float:
    form = FORMS[scheme.kind]
    stored = form.dequantize(form.pack(q), scale, scheme.group_size)
    return float((inputs.double() @ (weight - stored).double().T).square().sum())


@pytest.mark.parametrize("scheme", [Scheme("int4", 32), Scheme("int4", 64), Scheme("int8", 32)], ids=str)
def test_equals_the_plain_implementation(scheme: Scheme) -> None:
    weight, inputs = problem()
    hessian = inputs.T @ inputs
    q, scale = gptq(weight, inverse_factor(hessian), scheme)
    slow_q, slow_scale = slow_gptq(weight, hessian, scheme)
    # float32 against float64: a close rounding may fall the other way, and what follows it shifts
    assert (q == slow_q).float().mean() > 0.98
    found = output_error(weight, q, scale, inputs, scheme)
    assert found == pytest.approx(output_error(weight, slow_q, slow_scale, inputs, scheme), rel=0.02)


def test_loses_less_of_the_output_than_rounding() -> None:
    scheme = Scheme("int4", 32)
    weight, inputs = problem(64)
    hessian = inputs.T @ inputs
    errors = {}
    plain = group_scales(weight, scheme, "mse")[0]
    weighted = group_scales(weight, scheme, "mse", hessian.diagonal() / len(inputs))[0]
    for name, scale in (("plain", plain), ("weighted", weighted)):
        errors[name] = output_error(weight, int4.quantize(weight, scale, 32), scale, inputs, scheme)
    errors["gptq"] = output_error(weight, *gptq(weight, inverse_factor(hessian), scheme), inputs, scheme)
    assert errors["weighted"] < errors["plain"]
    assert errors["gptq"] < 0.6 * errors["plain"]


def test_the_weighted_search_is_no_worse_in_its_own_measure() -> None:
    scheme = Scheme("int4", 32)
    weight, inputs = problem(64)
    importance = inputs.square().mean(dim=0)
    scale, errors, norms = group_scales(weight, scheme, "mse", importance)
    difference = weight - int4.dequantize(int4.pack(int4.quantize(weight, scale, 32)), scale, 32)
    assert errors.sum() == pytest.approx(float((difference.square() * importance).sum()), rel=1e-5)
    assert norms.sum() == pytest.approx(float((weight.square() * importance).sum()), rel=1e-5)
    assert (errors <= group_scales(weight, scheme, "absmax", importance)[1]).all()
    ones = group_scales(weight, scheme, "mse", torch.ones(192))
    assert all(map(torch.equal, ones, group_scales(weight, scheme, "mse")))


def test_refitted_scales_are_nearly_the_best_for_their_integers() -> None:
    scheme = Scheme("int4", 32)
    weight, inputs = problem(16)
    hessian = inputs.T @ inputs
    q, scale = gptq(weight, inverse_factor(hessian), scheme)
    fitted = refit(weight, q, scale, hessian, scheme)
    before, after = (output_error(weight, q, found, inputs, scheme) for found in (scale, fitted))
    best = 0.0
    for row in range(16):  # all scales of a row at once, by least squares and not rounded
        parts = inputs.double().view(-1, 6, 32) * q[row].double().view(6, 32)
        design = parts.sum(dim=2)  # [tokens, groups]
        target = inputs.double() @ weight[row].double()
        solution = torch.linalg.lstsq(design, target.unsqueeze(1)).solution[:, 0]
        best += float((target - design @ solution).square().sum())
    assert best < after < before
    assert before - after > 0.3 * (before - best)
    dead = torch.zeros(192, 192)
    assert torch.equal(refit(weight, q, scale, dead, scheme), scale)
    assert torch.equal(refit(weight, torch.zeros_like(q), scale, hessian, scheme), scale)


def test_inputs_that_never_came_and_rows_of_zeros() -> None:
    scheme = Scheme("int4", 32)
    weight, inputs = problem()
    weight[3] = 0
    inputs[:, 40:60] = 0
    q, scale = gptq(weight, inverse_factor(inputs.T @ inputs), scheme)
    assert (q[3] == 0).all()
    assert scale.isfinite().all()
    alone, _ = gptq(weight, inverse_factor(torch.zeros(192, 192)), scheme)  # nothing is known: plain rounding
    assert torch.equal(alone, int4.quantize(weight, group_scales(weight, scheme, "mse")[0], 32))


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    _, inputs = problem(width=320)  # more columns than are inverted at once
    hessian = (inputs.T @ inputs).double()
    factor = inverse_factor(hessian.float()).double()
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(320, dtype=torch.float64)
    wanted = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert torch.equal(factor, factor.triu())
    assert (factor - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_deterministic() -> None:
    weight, inputs = problem()
    first = gptq(weight, inverse_factor(inputs.T @ inputs), Scheme("int4", 32))
    assert all(map(torch.equal, first, gptq(weight, inverse_factor(inputs.T @ inputs), Scheme("int4", 32))))
