"""Every kernel against the reference or the torch code of `localmoe.model`, on the interpreter where there is no GPU.

The interpreter multiplies float32, so tolerances are those of another order of summation. On a GPU the tensor-core
kernels round their operands to bfloat16: 1 % of the largest result.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from localmoe.formats.weights import Weight
from localmoe.kernels import reference
from localmoe.kernels.triton.experts import ExpertStack, add_experts
from localmoe.kernels.triton.latent import store_latents
from localmoe.kernels.triton.launch import launch_for
from localmoe.kernels.triton.matmul import matmul
from localmoe.kernels.triton.matvec import matvec, new_output
from localmoe.kernels.triton.mla_decode import attend
from localmoe.kernels.triton.norm import rms_norm
from localmoe.kernels.triton.router import route
from localmoe.kernels.triton.weights import octets, upload
from localmoe.model.kv_cache import pack_int8, unpack_int8
from localmoe.model.mla import absorbed_attention
from localmoe.model.moe import Router
from localmoe.model.rope import rotate

FORMS = ("int4", "int8", "nf4", "bf16")
Make = Callable[..., Weight]


def assert_near(ours: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest of `wanted`."""
    assert ours.shape == wanted.shape
    assert torch.isfinite(ours).all()
    assert float((ours.cpu() - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def tolerance(device: torch.device) -> float:
    return 1e-2 if device.type == "cuda" else 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "columns", "group"), [(70, 320, 32), (3, 64, 64), (129, 192, 32)])
def test_matvec(form: str, rows: int, columns: int, group: int, matrix: Make, device: torch.device) -> None:
    weight = matrix(form, rows, columns, group=group, largest=1e4)
    stored = upload([weight], device)
    x, bias = torch.randn(3, columns), torch.randn(rows)
    vectors = (octets(x) if stored.octets else x).to(device)
    ours = matvec(vectors, stored, new_output(vectors, stored), launch_for(device))
    assert_near(ours, reference.linear(x, weight), 1e-5)
    again = matvec(vectors, stored, ours, launch_for(device), addend=bias.to(device))
    assert_near(again, reference.linear(x, weight) + bias, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_its_bits_in_any_batch(form: str, matrix: Make, device: torch.device) -> None:
    stored = upload([matrix(form, 40, 128)], device)
    x = torch.randn(8, 128, device=device)
    alone = matvec(x[5:6], stored, new_output(x[:1], stored), launch_for(device))
    for count in (6, 8):
        together = matvec(x[:count], stored, new_output(x[:count], stored), launch_for(device))
        assert torch.equal(together[5], alone[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(9, 70, 320), (33, 48, 64)])
def test_matmul(form: str, tokens: int, rows: int, columns: int, matrix: Make, device: torch.device) -> None:
    weight = matrix(form, rows, columns, largest=1e4)
    x = torch.randn(tokens, columns)
    stored = upload([weight], device)
    ours = matmul(x.to(device), stored, torch.empty(tokens, rows, device=device), launch_for(device))
    assert_near(ours, reference.linear(x, weight), tolerance(device))


@pytest.mark.parametrize("form", FORMS)
def test_experts_with_a_slot_are_added_and_the_others_left_out(form: str, matrix: Make, device: torch.device) -> None:
    hidden, inner, top = 128, 192, 3
    experts = [
        (matrix(form, inner, hidden), matrix(form, inner, hidden), matrix(form, hidden, inner)) for _ in range(4)
    ]
    slots = torch.tensor([2, -1, 0, 3, 1], dtype=torch.int32)  # of experts 0 to 4
    gate, up, down = (upload([expert[part] for expert in experts], device) for part in range(3))
    x, weights = torch.randn(3, hidden), torch.rand(3, top)
    ids = torch.tensor([[0, 1, 4], [3, 2, 0], [1, 4, 3]], dtype=torch.int32)
    base = torch.randn(3, hidden)
    wanted = base.clone()
    for token in range(3):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            if slots[expert] >= 0:
                wanted[token] += weight * reference.expert(x[token : token + 1], *experts[int(slots[expert])])[0]
    vectors = (octets(x) if gate.octets else x).to(device)
    stack = ExpertStack(gate, up, down, slots.to(device))

    def run(rows: slice) -> Tensor:
        room = torch.full((len(ids[rows]) * top, inner), float("nan"), device=device)
        chosen, scales = ids[rows].to(device), weights[rows].to(device)
        return add_experts(
            vectors[rows], stack, chosen, scales, room, base[rows].clone().to(device), launch_for(device)
        )

    together = run(slice(0, 3))
    assert_near(together, wanted, 1e-5)
    assert torch.equal(run(slice(1, 2))[0], together[1])


@pytest.mark.parametrize("width", [64, 200])
def test_norm(width: int, device: torch.device) -> None:
    x, delta, weight = torch.randn(5, width), torch.randn(5, width), torch.randn(width)
    stream, second = x.clone().to(device), torch.empty(5, width, device=device)
    out = torch.empty_like(second)
    rms_norm(stream, weight.to(device), 1e-6, out, second, delta.to(device))
    wanted = torch.nn.functional.rms_norm(x + delta, (width,), weight, 1e-6)
    assert_near(out, wanted, 1e-5)
    assert torch.equal(second, octets(out))
    assert torch.equal(stream.cpu(), x + delta)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"topk_method": "group_limited_greedy"},
        {"norm_topk_prob": True},
        {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True},
        {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "topk_group": 5, "num_experts_per_tok": 1},
    ],
)
def test_router(changes: dict[str, Any], device: torch.device) -> None:
    torch.manual_seed(3)
    choices = {
        "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "n_group": 5, "topk_group": 2,
        "num_experts_per_tok": 6, "n_routed_experts": 40, "routed_scaling_factor": 2.5,
    } | changes  # fmt: skip
    config = SimpleNamespace(**choices)
    logits = torch.randn(17, 40) * 2
    bias = torch.randn(40) * 0.3 - 0.5 if config.topk_method == "noaux_tc" else None
    router = Router.__new__(Router)
    router._config, router._logits, router._bias = config, lambda x: x, bias  # type: ignore[assignment]
    wanted_ids, wanted_weights = router(logits)
    ids = torch.empty(17, config.num_experts_per_tok, dtype=torch.int32, device=device)
    weights = torch.empty(ids.shape, device=device)
    route(
        logits.to(device), None if bias is None else bias.to(device), ids, weights, groups=5,
        top_groups=5 if config.topk_method == "greedy" else config.topk_group,
        sigmoid=config.scoring_func == "sigmoid", normalise=config.norm_topk_prob, factor=2.5,
    )  # fmt: skip
    assert torch.equal(ids.cpu().long(), wanted_ids)
    torch.testing.assert_close(weights.cpu(), wanted_weights, rtol=1e-5, atol=1e-7)


CACHES = [torch.float32, torch.bfloat16, torch.uint8]


def empty_cache(rows: int, rank: int, rope: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    width = rank + 2 * rope + 4 if dtype == torch.uint8 else rank + rope
    return torch.zeros(rows, width, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", CACHES)
def test_latents_are_stored_and_queries_rotated(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(5)
    tokens, heads, nope, rank, rope, start = 3, 5, 12, 24, 8, 4
    q, kv, norm = torch.randn(tokens, heads, nope + rope), torch.randn(tokens, rank + rope), torch.rand(rank) + 0.5
    turns = torch.polar(torch.ones(16, rope // 2), torch.randn(16, rope // 2))
    flat = torch.view_as_real(turns).flatten(1)
    cache, queries = empty_cache(16, rank, rope, dtype, device), q.clone().to(device)
    at = torch.tensor([start], dtype=torch.int32, device=device)
    store_latents(queries, kv.to(device), norm.to(device), flat.to(device), at, cache, nope=nope, epsilon=1e-6)
    own = turns[start : start + tokens]
    wanted_q = torch.cat((q[..., :nope], rotate(q[..., nope:].transpose(0, 1), own).transpose(0, 1)), dim=-1)
    assert_near(queries, wanted_q, 1e-5)
    latent = torch.nn.functional.rms_norm(kv[:, :rank], (rank,), norm, 1e-6)
    wanted = torch.cat((latent, rotate(kv[:, rank:], own)), dim=1)
    rows = cache[start : start + tokens].cpu()
    if dtype == torch.uint8:
        # one step of the latent's grid: a half may be rounded the other way
        packed = unpack_int8(pack_int8(wanted, rank), rank)
        assert_near(unpack_int8(rows, rank), packed, 1 / 127)
        assert (rows[:, :rank].int() - pack_int8(wanted, rank)[:, :rank].int()).abs().float().mean() < 0.02
    else:
        assert_near(rows.float(), wanted, 1e-5 if dtype == torch.float32 else 2**-8)
    assert not cache[:start].any()
    assert not cache[start + tokens :].any()


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize(("start", "heads"), [(0, 4), (75, 20), (130, 4)])
def test_decode_attention(dtype: torch.dtype, start: int, heads: int, device: torch.device) -> None:
    torch.manual_seed(start)
    tokens, nope, rank, rope, scale = 3, 12, 24, 8, 0.2
    rows = torch.randn(start + tokens, rank + rope)
    cache = pack_int8(rows, rank) if dtype == torch.uint8 else rows.to(dtype)
    rows = unpack_int8(cache, rank) if dtype == torch.uint8 else cache.float()
    q_latent, q = torch.randn(tokens, heads, rank), torch.randn(tokens, heads, nope + rope)
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu_(1)
    # with an identity for k_b and v_b absorbed attention is attention over the latents
    identity = torch.eye(rank).expand(heads, rank, rank)
    wanted = absorbed_attention(
        q_latent.transpose(0, 1) * scale, q[..., nope:].transpose(0, 1) * scale, rows, identity, identity, future
    ).transpose(0, 1)
    cache = cache.to(device)

    def run(first: int, count: int) -> Tensor:
        part = slice(first, first + count)
        at = torch.tensor([start + first], dtype=torch.int32, device=device)
        out = torch.empty(count, heads, rank, device=device)
        return attend(
            q_latent[part].to(device), q[part].to(device), cache, at, out, launch_for(device), nope=nope, scale=scale
        )

    together = run(0, tokens)
    assert_near(together, wanted, tolerance(device))
    for token in range(tokens):
        assert torch.equal(run(token, 1)[0], together[token]), "a row's bits do not depend on the batch"
