"""Section `knobs` of `scripts/gpu_check`: a few launches of a kernel against the one that `launch_for` gives.

Nothing is applied: `localmoe/kernels/triton/launch.py` has the table. A variant that does not compile, or does not fit
into shared memory or registers, is a row that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gpu_sections import Bench

    from localmoe.kernels.triton.launch import Launch

Change = dict[str, int]
Prepared = tuple[Callable[[], object], Tensor, int]
"""What a sweep runs, where its last result lands, and how many calls it is."""
Prepare = Callable[["Launch"], Prepared]


def knobs(bench: Bench) -> Iterator[dict[str, Any]]:
    """`gain` is the default's time over the variant's, of the CUDA graphs where there are any."""
    processors = torch.cuda.get_device_properties(bench.device).multi_processor_count if bench.on_gpu else 3
    for form in ("int4", "int8"):
        sizes = ((4, 1, 1024), (4, 1, 512), (8, 4, 1024), (8, 2, 1024))
        changes: list[Change] = [
            {"packed_rows": rows, "packed_warps": warps, "packed_columns": columns, "packed_columns_int8": columns}
            for rows, warps, columns in sizes
        ]
        yield from compared(bench, f"experts {form}", changes, experts(bench, form))
    changes = [
        {"decode_stages": stages, "decode_programs": programs}
        for programs in (processors, 2 * processors)
        for stages in (1, 2, 3)
    ]
    yield from compared(bench, "attend bf16", changes, attention(bench))
    names = ("matmul_tokens", "grouped_columns", "matmul_columns", "matmul_stages")
    sets = ((64, 64, 128, 2), (128, 32, 64, 2), (64, 64, 64, 3))
    yield from compared(bench, "grouped int4", named(names, sets), grouped(bench, "int4"))
    sets = ((32, 64), (128, 64), (128, 32))
    yield from compared(bench, "fold int8", named(("fold_rows", "fold_columns"), sets), fold(bench, "int8"))


def named(names: tuple[str, ...], sets: Iterable[tuple[int, ...]]) -> list[Change]:
    return [dict(zip(names, values, strict=True)) for values in sets]


def compared(bench: Bench, what: str, changes: list[Change], prepare: Prepare) -> Iterator[dict[str, Any]]:
    """A row for the default and one for each change to it."""
    from localmoe.kernels.triton.launch import launch_for

    default, base = launch_for(bench.device), 0.0
    for change in ({}, *changes):
        said = ", ".join(f"{knob} {value}" for knob, value in change.items()) or "default"
        row: dict[str, Any] = {"what": what, "change": said}
        try:
            run, out, calls = prepare(replace(default, **change))
            took = bench.eager_and_graph(run, out, calls)
        except Exception as error:
            if not change:
                raise
            yield row | {"skipped": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
            continue
        spent = took["graph_us"] or took["eager_us"]
        base = base or spent
        wrong = {key: took[key] for key in ("error",) if key in took}
        yield row | {"graph_us": took["graph_us"], "gain": base / spent} | wrong


def experts(bench: Bench, form: str) -> Prepare:
    """One token's."""
    from gpu_sections import expert_calls, expert_stacks

    run, out, calls, _ = expert_calls(bench, expert_stacks(bench, form), 1)
    return lambda launch: (lambda: run(launch), out, calls)


def attention(bench: Bench) -> Prepare:
    """One row's over the longest context, in bf16 and of the fewest heads."""
    from gpu_sections import attention_calls, latent_caches

    from localmoe.kernels.triton.mla_decode import new_workspace

    context, heads = bench.sizes.contexts[-1], bench.sizes.heads[0]
    caches = latent_caches(bench, "bf16", context)
    run, out = attention_calls(bench, caches, context, heads)

    def prepare(launch: Launch) -> Prepared:
        room = new_workspace(1, heads, bench.sizes.latent[0], launch, bench.device)
        return lambda: run(launch, room), out, len(caches)

    return prepare


def grouped(bench: Bench, form: str) -> Prepare:
    """All experts of a long pass whose tokens choose at random."""
    from gpu_sections import expert_stacks

    from localmoe.kernels.triton.grouped import grouped_experts, sort_pairs

    (stack, *_), (count, top, hidden, width) = expert_stacks(bench, form), bench.sizes.experts
    tokens = bench.sizes.tokens[-1]
    ids = torch.rand(tokens, count, generator=torch.Generator().manual_seed(2)).topk(top).indices.int().to(bench.device)
    x, weights, out = bench.random(tokens, hidden), bench.random(tokens, top), bench.random(tokens * top, hidden)

    def prepare(launch: Launch) -> Prepared:
        blocks = sort_pairs(ids, count, launch)
        room = torch.empty(tokens * top, width, dtype=launch.dot, device=bench.device)
        return lambda: grouped_experts(x, stack, blocks, weights, room, out, launch), out, 1

    return prepare


def fold(bench: Bench, form: str) -> Prepare:
    """One row's queries through k_b."""
    from gpu_sections import matrix_copies

    from localmoe.kernels.triton.absorb import fold_queries

    (rank, rope, nope), heads = bench.sizes.latent, bench.sizes.heads[0]
    rank = max(rank, 32)  # whole groups, in tiny
    parts = matrix_copies(bench, form, heads * 2 * nope, rank)
    q, out = bench.random(1, heads, nope + rope), bench.random(1, heads, rank)

    def prepare(launch: Launch) -> Prepared:
        def run() -> None:
            for part in parts:
                fold_queries(q, part, out, launch, nope=nope, value=nope)

        return run, out, len(parts)

    return prepare
