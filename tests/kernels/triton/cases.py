"""Every kernel against the reference or the torch code of `localmoe.model`: on a GPU, or on Triton's interpreter.

No case needs pytest, so that `scripts/gpu_check` runs them on a bare machine too. A case raises AssertionError.

The interpreter multiplies float32, so tolerances are those of another order of summation. On a GPU the tensor-core
kernels round their operands to bfloat16: 1 % of the largest result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from localmoe.formats import int4, int8
from localmoe.formats.weights import DenseWeight, Int4Weight, Int8Weight, Nf4Weight, Weight, dequantize
from localmoe.kernels import reference
from localmoe.kernels.triton.absorb import fold_queries, unfold_values
from localmoe.kernels.triton.experts import ExpertStack, add_experts
from localmoe.kernels.triton.grouped import grouped_experts, sort_pairs
from localmoe.kernels.triton.latent import store_latents
from localmoe.kernels.triton.launch import launch_for
from localmoe.kernels.triton.matmul import matmul
from localmoe.kernels.triton.matvec import matvec, new_output
from localmoe.kernels.triton.mla_decode import attend, new_workspace
from localmoe.kernels.triton.norm import rms_norm
from localmoe.kernels.triton.router import route
from localmoe.kernels.triton.weights import octets, upload
from localmoe.model.kv_cache import pack_int8, unpack_int8
from localmoe.model.mla import absorbed_attention
from localmoe.model.moe import Router
from localmoe.model.rope import rotate

FORMS = ("int4", "int8", "nf4", "bf16")
CACHES = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}
Case = Callable[[torch.device], None]


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


def assert_near(ours: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest of `wanted`."""
    ours = ours.cpu()
    assert ours.shape == wanted.shape, f"shape {list(ours.shape)}, not {list(wanted.shape)}"
    assert torch.isfinite(ours).all(), "not finite"
    error, largest = float((ours - wanted).abs().max()), float(wanted.abs().max())
    assert error <= tolerance * largest, f"off by {error / largest:.2g} of the largest, {tolerance:g} allowed"


def assert_same_bits(ours: Tensor, wanted: Tensor) -> None:
    assert torch.equal(ours, wanted), f"{int((ours != wanted).sum())} of {ours.numel()} numbers have other bits"


def tensor_core_tolerance(device: torch.device) -> float:
    return 1e-2 if device.type == "cuda" else 1e-5


def check_matvec(form: str, rows: int, columns: int, device: torch.device, group: int = 32, tokens: int = 3) -> None:
    weight = random_matrix(form, rows, columns, group=group, largest=1e4)
    stored = upload([weight], device)
    x, bias = torch.randn(tokens, columns), torch.randn(rows)
    vectors = (octets(x) if stored.octets else x).to(device)
    launch, wanted = launch_for(device), reference.linear(x, weight)
    ours = matvec(vectors, stored, new_output(vectors, stored), launch)
    assert_near(ours, wanted, 1e-5)
    one = matvec(vectors[:1], stored, new_output(vectors[:1], stored), launch, addend=bias.to(device))
    assert_near(one, wanted[:1] + bias, 1e-5)
    assert_near(matvec(vectors, stored, ours, launch, addend=ours), 2 * wanted, 1e-5)


def check_matvec_bits(form: str, rows: int, columns: int, device: torch.device) -> None:
    """A row has its bits alone and among eight."""
    stored = upload([random_matrix(form, rows, columns)], device)
    x = torch.randn(8, columns).to(device)
    together = matvec(x, stored, new_output(x, stored), launch_for(device))
    for row in (0, 5):
        own = x[row : row + 1]
        assert_same_bits(matvec(own, stored, new_output(own, stored), launch_for(device))[0], together[row])


def check_matmul(form: str, tokens: int, rows: int, columns: int, device: torch.device) -> None:
    weight = random_matrix(form, rows, columns, largest=1e4)
    x = torch.randn(tokens, columns)
    stored = upload([weight], device)
    ours = matmul(x.to(device), stored, torch.empty(tokens, rows, device=device), launch_for(device))
    assert_near(ours, reference.linear(x, weight), tensor_core_tolerance(device))


def check_experts(form: str, tokens: int, hidden: int, inner: int, top: int, device: torch.device) -> None:
    """Experts with a slot are added and the others left out; a token has its bits alone and among others."""
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    experts = [[random_matrix(form, *shape) for shape in shapes] for _ in range(top + 1)]
    slots = torch.full((top + 2,), -1, dtype=torch.int32)  # of experts 0 to top + 1; number 1 is elsewhere
    slots[torch.arange(top + 2) != 1] = torch.randperm(top + 1).int()
    gate, up, down = (upload([expert[part] for expert in experts], device) for part in range(3))
    x, weights, base = torch.randn(tokens, hidden), torch.rand(tokens, top), torch.randn(tokens, hidden)
    ids = torch.stack([torch.randperm(top + 2)[:top] for _ in range(tokens)]).int()
    ids[-1, 0] = 1 if 1 not in ids[-1] else ids[-1, 0]
    wanted = base.clone()
    for token in range(tokens):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            if slots[expert] >= 0:
                wanted[token] += weight * reference.expert(x[token : token + 1], *experts[int(slots[expert])])[0]
    vectors = (octets(x) if gate.octets else x).to(device)
    stack = ExpertStack(gate, up, down, slots.to(device))

    def run(rows: slice, *, fresh: bool = False) -> Tensor:
        room = torch.full((len(ids[rows]) * top, inner), float("nan"), device=device)
        chosen, scales, out = ids[rows].to(device), weights[rows].to(device), base[rows].clone().to(device)
        return add_experts(vectors[rows], stack, chosen, scales, room, out, launch_for(device), fresh=fresh)

    together = run(slice(0, tokens))
    assert_near(together, wanted, 1e-5)
    assert_same_bits(run(slice(tokens - 1, tokens))[0], together[-1])
    assert_near(run(slice(0, tokens), fresh=True), wanted - base, 1e-5)


def check_grouped(
    form: str, tokens: int, hidden: int, inner: int, top: int, device: torch.device, group: int = 32
) -> None:
    """The same sums as one token at a time; of an expert without a slot nothing is written."""
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    experts = [[random_matrix(form, *shape, group=group) for shape in shapes] for _ in range(top + 1)]
    slots = torch.full((top + 3,), -1, dtype=torch.int32)  # number 1 is elsewhere, the last is nobody's
    slots[torch.arange(top + 3) != 1] = torch.cat((torch.randperm(top + 1), torch.tensor([-1]))).int()
    gate, up, down = (upload([expert[part] for expert in experts], device) for part in range(3))
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, top)
    ids = torch.stack([torch.randperm(top + 2)[:top] for _ in range(tokens)]).int()
    launch = launch_for(device)
    blocks = sort_pairs(ids.to(device), top + 3, launch)
    out = torch.full((tokens * top, hidden), 7.0, device=device)
    room = torch.empty(tokens * top, inner, dtype=launch.dot, device=device)
    stack = ExpertStack(gate, up, down, slots.to(device))
    grouped_experts(x.to(device), stack, blocks, weights.to(device), room, out, launch)
    wanted = torch.full((tokens, top, hidden), 7.0)
    for expert, slot in enumerate(slots.tolist()):
        rows, places = (ids == expert).nonzero(as_tuple=True)
        if slot >= 0 and len(rows):
            wanted[rows, places] = weights[rows, places, None] * reference.expert(x[rows], *experts[slot])
    assert_near(out, wanted.flatten(0, 1), tensor_core_tolerance(device))


def check_fold(
    form: str, heads: int, nope: int, rank: int, device: torch.device, value: int = 20, group: int = 32
) -> None:
    """Through k_b; a row has its bits alone and among others."""
    rope, kv_b = 8, random_matrix(form, heads * (nope + value), rank, group=group)
    q = torch.randn(3, heads, nope + 8)
    stored, launch, queries = upload([kv_b], device), launch_for(device), q.to(device)

    def run(rows: slice) -> Tensor:
        out = torch.empty(len(queries[rows]), heads, rank, device=device)
        return fold_queries(queries[rows], stored, out, launch, nope=nope, value=value)

    k_b = dequantize(kv_b).view(heads, nope + value, rank)[:, :nope]
    together = run(slice(0, 3))
    assert_near(together, torch.einsum("tan,anr->tar", q[..., : q.shape[2] - rope], k_b), 1e-5)
    assert_same_bits(run(slice(2, 3))[0], together[2])


def check_unfold(form: str, heads: int, nope: int, rank: int, device: torch.device, value: int = 20) -> None:
    """Through v_b, into octets and not."""
    kv_b, attended = random_matrix(form, heads * (nope + value), rank), torch.randn(3, heads, rank)
    stored, launch = upload([kv_b], device), launch_for(device)
    vectors = (octets(attended) if stored.octets else attended).to(device)
    v_b = dequantize(kv_b).view(heads, nope + value, rank)[:, nope:]
    wanted = torch.einsum("tar,avr->tav", attended, v_b).flatten(1)
    for ordered in (False, True):
        out = torch.empty(3, heads * value, device=device)
        unfold_values(vectors, stored, out, launch, nope=nope, value=value, octets=ordered)
        assert_near(out, octets(wanted) if ordered else wanted, 1e-5)


def check_norm(width: int, device: torch.device) -> None:
    x, delta, weight = torch.randn(5, width), torch.randn(5, width), torch.randn(width)
    stream, second = x.clone().to(device), torch.empty(5, width, device=device)
    out = torch.empty_like(second)
    rms_norm(stream, weight.to(device), 1e-6, out, second, delta.to(device))
    assert_near(out, torch.nn.functional.rms_norm(x + delta, (width,), weight, 1e-6), 1e-5)
    assert_same_bits(second, octets(out))
    assert_same_bits(stream.cpu(), x + delta)
    plain = rms_norm(x.to(device), weight.to(device), 1e-6, torch.empty_like(out))
    assert_near(plain, torch.nn.functional.rms_norm(x, (width,), weight, 1e-6), 1e-5)


def check_router(changes: dict[str, Any], device: torch.device, tokens: int = 5) -> None:
    config = SimpleNamespace(
        **{
            "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "n_group": 5, "topk_group": 2,
            "num_experts_per_tok": 6, "n_routed_experts": 40, "routed_scaling_factor": 2.5,
        } | changes
    )  # fmt: skip
    logits = torch.randn(tokens, config.n_routed_experts) * 2
    biased = config.topk_method == "noaux_tc"
    bias = torch.randn(config.n_routed_experts) * 0.3 - 0.5 if biased else None
    router = Router.__new__(Router)
    router._config, router._bias = config, bias  # all that a choice from logits needs
    wanted_ids, wanted_weights = router.choose(logits)
    ids = torch.empty(tokens, config.num_experts_per_tok, dtype=torch.int32, device=device)
    weights = torch.empty(ids.shape, device=device)
    counts = torch.full((config.n_routed_experts,), 5, dtype=torch.int32, device=device)
    route(
        logits.to(device), None if bias is None else bias.to(device), ids, weights, groups=config.n_group,
        top_groups=config.n_group if config.topk_method == "greedy" else config.topk_group,
        sigmoid=config.scoring_func == "sigmoid", normalise=config.norm_topk_prob, factor=2.5, counts=counts,
    )  # fmt: skip
    assert torch.equal(ids.cpu().long(), wanted_ids), "other experts"
    assert torch.equal(counts.cpu() - 5, wanted_ids.flatten().bincount(minlength=config.n_routed_experts)), "counts"
    # a GPU's exp is an approximation
    torch.testing.assert_close(weights.cpu(), wanted_weights, rtol=1e-4 if ids.is_cuda else 1e-5, atol=1e-7)


def empty_cache(rows: int, rank: int, rope: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    width = rank + 2 * rope + 4 if dtype == torch.uint8 else rank + rope
    return torch.zeros(rows, width, dtype=dtype, device=device)


def check_latents(cache_dtype: str, heads: int, nope: int, rank: int, rope: int, device: torch.device) -> None:
    """Latents are stored and queries rotated, and nothing around them is touched."""
    dtype, tokens, start = CACHES[cache_dtype], 3, 4
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
        steps = (rows[:, :rank].int() - pack_int8(wanted, rank)[:, :rank].int()).abs().float().mean()
        assert steps < 0.02, f"off by {float(steps):.2g} steps in the mean"
    else:
        # a GPU rounds to bf16, the interpreter cuts off
        assert_near(rows.float(), wanted, 1e-5 if dtype == torch.float32 else 2**-8 if cache.is_cuda else 2**-7)
    assert not cache[:start].any(), "rows before were written"
    assert not cache[start + tokens :].any(), "rows behind were written"


def check_decode(
    cache_dtype: str, start: int, heads: int, device: torch.device, tokens: int = 2, rank: int = 24, rope: int = 8
) -> None:
    """Attention over latents; a row has its bits alone and in any batch."""
    nope, scale, dtype = 12, 1.1 / (rank + rope) ** 0.5, CACHES[cache_dtype]
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
    cache, launch = cache.to(device), launch_for(device)
    workspace = new_workspace(tokens + 1, heads, rank, launch, device)

    def run(first: int, count: int) -> Tensor:
        for room in (workspace.partial, workspace.largest, workspace.sums):
            room.fill_(float("nan"))  # what an earlier layer left is never read
        part = slice(first, first + count)
        at = torch.tensor([start + first], dtype=torch.int32, device=device)
        out = torch.empty(count, heads, rank, device=device)
        own_latent, own = q_latent[part].to(device), q[part].to(device)
        return attend(own_latent, own, cache, at, workspace, out, launch, nope=nope, scale=scale)

    together = run(0, tokens)
    assert_near(together, wanted, tensor_core_tolerance(device))
    for token in {0, tokens // 2, tokens - 1}:
        assert_same_bits(run(token, 1)[0], together[token])


_V3_ROUTER = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True}
_ROUTERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "groups": {"topk_method": "group_limited_greedy"},
    "normalised": {"norm_topk_prob": True},
    "v3": _V3_ROUTER,
    "v3, one expert": _V3_ROUTER | {"norm_topk_prob": False, "topk_group": 5, "num_experts_per_tok": 1},
}
_V3_SHAPE = {"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "n_routed_experts": 256}


def small_cases() -> dict[str, dict[str, Case]]:
    """By kernel and name: shapes that divide nothing evenly, for the interpreter and a GPU."""
    return {
        "matvec": {f"{f} 70x320": partial(check_matvec, f, 70, 320, tokens=2) for f in FORMS}
        | {f"{f} 3x64 g64": partial(check_matvec, f, 3, 64, group=64) for f in FORMS}
        | {f"{f} 1 and 8 rows": partial(check_matvec_bits, f, 40, 128) for f in FORMS},
        "matmul": {f"{f} 9x70x320": partial(check_matmul, f, 9, 70, 320) for f in FORMS}
        | {f"{f} 33x48x64": partial(check_matmul, f, 33, 48, 64) for f in FORMS},
        "experts": {f"{f} 2 rows": partial(check_experts, f, 2, 64, 192, 2) for f in FORMS}
        | {"int4 1 and 8 rows": partial(check_experts, "int4", 8, 64, 64, 2)},
        "grouped": {f"{f} 21 rows": partial(check_grouped, f, 21, 64, 192, 2) for f in FORMS}
        | {"int4 g128": partial(check_grouped, "int4", 9, 128, 128, 2, group=128)},
        "fold": {f"{f} {r}": partial(check_fold, f, 3, 12, r) for f in ("bf16", "int8") for r in (64, 160)}
        | {"int8 g128": partial(check_fold, "int8", 2, 12, 256, group=128)},
        "unfold": {f"{f} {r}": partial(check_unfold, f, 2, 12, r) for f in ("bf16", "int8") for r in (64, 160)},
        "norm": {f"width {w}": partial(check_norm, w) for w in (64, 200)},
        "router": {name: partial(check_router, changes, tokens=3) for name, changes in _ROUTERS.items()},
        "latents": {name: partial(check_latents, name, 5, 12, 24, 8) for name in CACHES},
        "decode": {f"{c} at {s}, {h} heads": partial(check_decode, c, s, h) for c in CACHES
                   for s, h in ((0, 4), (75, 20))}
        | {"bf16 at 130": partial(check_decode, "bf16", 130, 4)}
        | {f"{c} 1 and 8 rows": partial(check_decode, c, 40, 4, tokens=8) for c in ("bf16", "int8")},
    }  # fmt: skip


def real_cases() -> dict[str, dict[str, Case]]:
    """By kernel and name: V2-Lite's and V3's shapes. Minutes on the interpreter, so for a GPU only."""
    decode = partial(check_decode, rank=512, rope=64)
    return {
        "matvec": {
            f"{f} {n}x{k}": partial(check_matvec, f, n, k, tokens=8)
            for f in FORMS
            for n, k in ((1408, 2048), (2048, 1408), (7168, 2048))
        }
        | {f"{f} 2048x7168, 1 and 8 rows": partial(check_matvec_bits, f, 2048, 7168) for f in FORMS},
        "matmul": {f"{f} {t}x1408x2048": partial(check_matmul, f, t, 1408, 2048) for f in FORMS for t in (64, 515)},
        "experts": {f"{f} V2-Lite, 8 rows": partial(check_experts, f, 8, 2048, 1408, 6) for f in FORMS},
        "grouped": {f"{f} V2-Lite, 700 rows": partial(check_grouped, f, 700, 2048, 1408, 6) for f in FORMS},
        "fold": {f"{f} V3": partial(check_fold, f, 128, 128, 512, value=128) for f in ("bf16", "int8")},
        "unfold": {f"{f} V3": partial(check_unfold, f, 128, 128, 512, value=128) for f in ("bf16", "int8")},
        "norm": {f"width {w}": partial(check_norm, w) for w in (2048, 7168)},
        "router": {"V3": partial(check_router, _V3_ROUTER | _V3_SHAPE, tokens=64)},
        "latents": {f"{c} V3": partial(check_latents, c, 128, 128, 512, 64) for c in CACHES},
        "decode": {f"{c} at {s}, {h} heads": partial(decode, c, s, h) for c in ("bf16", "int8")
                   for s, h in ((5, 16), (4000, 16), (33000, 16), (4000, 128))}
        | {f"{c} 1 and 8 rows": partial(decode, c, 5000, 16, tokens=8) for c in ("bf16", "int8")},
    }  # fmt: skip
