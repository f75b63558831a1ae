"""The routers of `localmoe.model.moe`, from logits to experts and weights, in one program a token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def router_kernel(
    logits, bias, expert_ids, weights, counts, logits_stride, factor,
    COUNT: tl.constexpr, TOP: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SIGMOID: tl.constexpr, BIASED: tl.constexpr, NORMALISE: tl.constexpr, SCALE: tl.constexpr, COUNTED: tl.constexpr,
    BLOCK: tl.constexpr, TOP_BLOCK: tl.constexpr,
):  # fmt: skip
    """SCALE: weights are multiplied by `factor`. TOP_GROUPS == GROUPS: no limit to groups."""
    token = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    known = at < COUNT
    logit = tl.load(logits + token * logits_stride + at, mask=known, other=-float("inf"))
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logit))
    else:
        power = tl.exp(logit - tl.max(logit, axis=0))
        score = power / tl.sum(power, axis=0)
    choice = score
    if BIASED:
        choice += tl.load(bias + at, mask=known, other=0.0)
    choice = tl.where(known, choice, -float("inf"))
    if TOP_GROUPS < GROUPS:
        choice = _limit_to_groups(choice, at, COUNT // GROUPS, GROUPS, TOP_GROUPS, BIASED, BLOCK)
        choice = tl.where(known, choice, -float("inf"))
    place_at = tl.arange(0, TOP_BLOCK)
    found = tl.zeros((TOP_BLOCK,), tl.int32)
    weight = tl.zeros((TOP_BLOCK,), tl.float32)
    for place in tl.static_range(TOP):
        best = tl.minimum(tl.argmax(choice, axis=0), COUNT - 1)
        # V2 takes the weight as limited: 0 for an expert outside the groups
        own = tl.sum(tl.where(at == best, score if BIASED else choice, 0.0), axis=0)
        found = tl.where(place_at == place, best, found)
        weight = tl.where(place_at == place, own, weight)
        choice = tl.where(at == best, -float("inf"), choice)
    if NORMALISE:
        weight = weight / (tl.sum(weight, axis=0) + 1e-20)
    if SCALE:
        weight = weight * factor
    tl.store(expert_ids + token * TOP + place_at, found, mask=place_at < TOP)
    tl.store(weights + token * TOP + place_at, weight, mask=place_at < TOP)
    if COUNTED:
        tl.atomic_add(counts + found, tl.full((TOP_BLOCK,), 1, tl.int32), mask=place_at < TOP)


@triton.jit
def _limit_to_groups(
    choice, at, width: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Experts outside the best groups to -inf (V3: a group counts its best two) or 0 (V2: its best one)."""
    own = at // width
    group_score = tl.full((BLOCK,), -float("inf"), tl.float32)  # of the group an expert is in
    for group in tl.static_range(GROUPS):
        members = tl.where(own == group, choice, -float("inf"))
        best = tl.max(members, axis=0)
        if BIASED:
            first = tl.argmax(members, axis=0)
            best += tl.max(tl.where(at == first, -float("inf"), members), axis=0)
        group_score = tl.where(own == group, best, group_score)
    inside = at < 0
    for _ in tl.static_range(TOP_GROUPS):
        chosen = tl.argmax(group_score, axis=0) // width
        inside = inside | (own == chosen)
        group_score = tl.where(own == chosen, -float("inf"), group_score)
    return tl.where(inside, choice, -float("inf") if BIASED else 0.0)


def route(
    logits: Tensor,
    bias: Tensor | None,
    expert_ids: Tensor,
    weights: Tensor,
    *,
    groups: int,
    top_groups: int,
    sigmoid: bool,
    normalise: bool,
    factor: float,
    counts: Tensor | None = None,
) -> None:
    """float32 logits [T, E] -> expert_ids int32 [T, k] and weights float32 [T, k], as `localmoe.model.moe.Router`.

    With a `bias` float32 [E] it is V3's router, without one V2's: normalised weights are not multiplied by `factor`
    then. `top_groups` == `groups` chooses among all experts. One expert a token is never normalised.
    `counts` int32 [E] goes up by one for each use of an expert.
    """  # fmt: skip
    normalised = normalise and expert_ids.shape[1] > 1
    router_kernel[(logits.shape[0],)](
        logits, logits if bias is None else bias, expert_ids, weights, expert_ids if counts is None else counts,
        logits.stride(0), factor,
        COUNT=logits.shape[1], TOP=expert_ids.shape[1], GROUPS=groups, TOP_GROUPS=top_groups, SIGMOID=sigmoid,
        BIASED=bias is not None, NORMALISE=normalised, SCALE=bias is not None or not normalised,
        COUNTED=counts is not None, BLOCK=triton.next_power_of_2(logits.shape[1]),
        TOP_BLOCK=triton.next_power_of_2(expert_ids.shape[1]), num_warps=1,
    )  # fmt: skip
