from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from localmoe.errors import CheckpointError, UsageError
from localmoe.sampling import (
    History,
    SamplingParams,
    adjust,
    distribution,
    exponentials,
    logprob,
    sample,
    top_logprobs,
)

# Tokens 0..5 with these probabilities at temperature 1
PROBABILITIES = torch.tensor([0.05, 0.40, 0.25, 0.02, 0.08, 0.20])
LOGITS = PROBABILITIES.log() + 3.7


def allowed(**settings: float) -> dict[int, float]:
    token_ids, probabilities = distribution(LOGITS, SamplingParams(**{"temperature": 1.0, **settings}))
    return dict(zip(token_ids.tolist(), probabilities.tolist(), strict=True))


def test_no_filter_leaves_the_softmax() -> None:
    assert allowed() == pytest.approx(dict(enumerate(PROBABILITIES.tolist())), rel=1e-5)


def test_temperature_is_a_power_of_the_probabilities() -> None:
    squared = PROBABILITIES.double() ** 2
    assert allowed(temperature=0.5) == pytest.approx(dict(enumerate((squared / squared.sum()).tolist())), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, [1, 2]),
        ({"top_k": 6}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 1000}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.64}, [1, 2]),
        ({"top_p": 0.66}, [1, 2, 5]),
        ({"top_p": 1e-9}, [1]),
        ({"min_p": 0.49}, [1, 2, 5]),
        ({"min_p": 0.51}, [1, 2]),
        ({"min_p": 1.0}, [1]),
        # 0.40 + 0.25 of the remaining 0.85 is 0.76: top-p works on what top-k left
        ({"top_k": 3, "top_p": 0.75}, [1, 2]),
        ({"top_p": 0.75}, [1, 2, 5]),
        # At temperature 2 the ratio 0.20 / 0.40 grows to 0.71: min-p works on what temperature made
        ({"temperature": 2.0, "min_p": 0.7}, [1, 2, 5]),
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.55}, [1, 2]),
    ],
)
def test_filters_keep_the_right_tokens_in_the_documented_order(settings: dict[str, float], kept: list[int]) -> None:
    found = allowed(**settings)
    assert sorted(found) == kept
    assert sum(found.values()) == pytest.approx(1, rel=1e-6)
    if "temperature" not in settings:
        weights = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
        assert [found[token] for token in kept] == pytest.approx(weights.tolist(), rel=1e-5)


@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.999])
def test_top_p_over_a_large_vocabulary_equals_a_full_sort(top_p: float) -> None:
    """Flat enough at 0.9 and above that the nucleus is beyond the short cut over the likeliest 1,024."""
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(3))
    token_ids, probabilities = distribution(logits, SamplingParams(temperature=1.0, top_p=top_p))
    softmax = logits.double().softmax(0)
    order = softmax.argsort(descending=True)
    count = int((softmax[order].cumsum(0) < top_p).sum()) + 1
    assert abs(len(token_ids) - count) <= 1  # float32 sums
    assert set(order[: count - 1].tolist()) <= set(token_ids.tolist()) <= set(order[: count + 1].tolist())
    assert (count > 1024) == (top_p >= 0.9)
    assert float(probabilities.sum()) == pytest.approx(1, rel=1e-5)


def sorted_nucleus(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-p as it is defined: everything sorted."""
    head, places = probabilities.sort(descending=True, stable=True)
    before = head.cumsum(dim=0) - head
    count = max(1, int((before < top_p).sum()))
    return head[:count], places[:count]


def many_logits() -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
    random = torch.Generator().manual_seed(11)
    for number in range(60):
        size = (50, 3_000, 40_000)[number % 3]
        spread = (0.0, 0.01, 0.3, 1.0, 2.0, 4.0)[number % 6]
        logits = spread * torch.randn(size, generator=random)
        if number % 4 == 1:  # many equal ones, also at the cut
            logits = (8 * logits).round() / 8
        if number % 5 == 2:
            logits[:3] += 6 * torch.rand(3, generator=random) + 4
        for top_p in (0.3, 0.9, 0.95, 0.999, 0.9999999):
            yield logits, {"top_p": top_p, "temperature": (0.7, 1.0, 1.5)[number % 3]}
        yield logits, {"top_p": 0.9, "temperature": 1.0, "min_p": 0.2}
        yield logits, {"top_p": 0.9, "temperature": 1.0, "top_k": 2_000}


def test_draws_are_those_of_a_full_sort_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens with the same probabilities, and so the same draws; no tolerance. Of equal ones on both sides of
    the cut, the likeliest 1,024 alone may hold others."""
    compared = 0
    for logits, settings in many_logits():
        params = SamplingParams(**settings)
        found = dict(zip(*(each.tolist() for each in distribution(logits, params)), strict=True))
        drawn = [sample(logits, params, seed=5, position=position) for position in range(4)]
        with monkeypatch.context() as plain:
            plain.setattr("localmoe.sampling._nucleus", sorted_nucleus)
            wanted = dict(zip(*(each.tolist() for each in distribution(logits, params)), strict=True))
            drawn_so = [sample(logits, params, seed=5, position=position) for position in range(4)]
        cut = logits[list(wanted)].min()
        tied = any(token not in wanted for token in (logits == cut).nonzero()[:, 0].tolist())
        if len(found) > 1024 or not tied:
            compared += 1
            assert found == wanted, settings
            assert drawn == drawn_so, settings
    assert compared > 300


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
def test_a_flat_vocabulary_is_not_sorted(monkeypatch: pytest.MonkeyPatch, spread: float) -> None:
    """Only the tokens near the cut are. Where all are equal the bin with the cut is everything: numpy sorts it."""
    logits = spread * torch.randn(129_280, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(torch.Tensor, "sort", None)
    token_ids, _ = distribution(logits, SamplingParams(temperature=1.0, top_p=0.95))
    assert len(token_ids) > 10_000


def test_temperature_zero_takes_the_likeliest_whatever_else_is_set() -> None:
    assert sample(LOGITS, SamplingParams(0.0, top_k=3, top_p=0.1, min_p=0.9), seed=3) == 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_tiny_temperature_is_greedy_and_finite(temperature: float) -> None:
    wide = torch.tensor([-1e30, 5.0, 80.0, 79.0, float("-inf")])
    assert sample(wide, SamplingParams(temperature), seed=1) == 2


def test_a_huge_temperature_is_uniform() -> None:
    assert list(allowed(temperature=1e30).values()) == pytest.approx([1 / 6] * 6, rel=1e-5)


def test_logprob_is_that_of_the_unmodified_distribution() -> None:
    for token, probability in enumerate(PROBABILITIES.tolist()):
        assert logprob(LOGITS, token) == pytest.approx(math.log(probability), rel=1e-5)


def drawn(settings: SamplingParams, seed: int, count: int) -> list[int]:
    return [sample(LOGITS, settings, seed=seed, position=position) for position in range(count)]


def test_a_seed_fixes_the_sequence() -> None:
    settings = SamplingParams(1.0)
    assert drawn(settings, 5, 50) == drawn(settings, 5, 50)
    assert drawn(settings, 5, 50) != drawn(settings, 6, 50)


@pytest.mark.parametrize(
    "settings", [SamplingParams(1.0), SamplingParams(0.7, top_p=0.9), SamplingParams(1.3, top_k=4, min_p=0.2)]
)
def test_draws_follow_the_distribution(settings: SamplingParams) -> None:
    count = 8000
    token_ids, probabilities = distribution(LOGITS, settings)
    counts = torch.bincount(torch.tensor(drawn(settings, 11, count)), minlength=6).double()
    assert counts.sum() == counts[token_ids].sum()
    expected = probabilities.double() * count

    def chi_square(expected: torch.Tensor) -> float:
        return float(((counts[token_ids] - expected) ** 2 / expected).sum())

    # 99.9th percentile of chi-square with up to 5 degrees of freedom
    assert chi_square(expected) < 20.5
    biased = probabilities.double() * torch.linspace(0.85, 1.15, len(token_ids), dtype=torch.float64)
    assert chi_square(biased / biased.sum() * count) > 20.5  # the test has the power to tell


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more, not -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": -0.01}, "min_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 101}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": ((1, float("nan")),)}, "logit_bias"),
        ({"logit_bias": ((1, float("inf")),)}, "logit_bias"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SamplingParams(**settings)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_name_the_weights(bad: float, temperature: float) -> None:
    logits = LOGITS.clone()
    logits[3] = bad
    with pytest.raises(CheckpointError, match="not finite"):
        sample(logits, SamplingParams(temperature))


def test_penalties_and_bias_are_what_their_definitions_say() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 3.0, -2.0])
    history = History(5, [0, 1])
    for token in (3, 3, 4):
        history.add(token)
    repeated = adjust(logits, SamplingParams(repetition_penalty=2.0), history)
    assert repeated.tolist() == [1.0, -2.0, 0.5, 1.5, -4.0]  # in the prompt and in the answer
    said = adjust(logits, SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), history)
    assert said.tolist() == [2.0, -1.0, 0.5, 2.0, -2.75]  # in the answer only, the second counts twice
    biased = adjust(logits, SamplingParams(logit_bias=((2, 1.0), (3, -math.inf))), None)
    assert biased.tolist() == [2.0, -1.0, 1.5, -math.inf, -2.0]
    assert logits.tolist() == [2.0, -1.0, 0.5, 3.0, -2.0]
    assert adjust(logits, SamplingParams(), history) is logits


def test_greedy_obeys_bias_and_penalties() -> None:
    assert sample(LOGITS, SamplingParams(logit_bias=((1, -math.inf),))) == 2
    history = History(6, [1, 2])
    assert sample(LOGITS, SamplingParams(repetition_penalty=5.0), history=history) == 5


def test_random_numbers_depend_on_seed_position_and_token_alone() -> None:
    ids = torch.arange(4096)
    whole = exponentials(7, 100, ids)
    some = torch.tensor([5, 4000, 17])
    assert torch.equal(exponentials(7, 100, some), whole[some])
    assert not torch.equal(exponentials(8, 100, ids), whole)
    assert not torch.equal(exponentials(7, 101, ids), whole)
    assert float(whole.mean()) == pytest.approx(1, abs=0.05)
    # no correlation with the next position, the next token, or the next seed
    for other in (exponentials(7, 101, ids), exponentials(7, 100, ids + 1), exponentials(8, 100, ids)):
        assert abs(float(torch.corrcoef(torch.stack((whole, other)))[0, 1])) < 0.06


def test_the_likeliest_tokens_with_their_logprobs() -> None:
    top = top_logprobs(LOGITS, 2)
    assert [token for token, _ in top] == [1, 2]
    assert [value for _, value in top] == pytest.approx([math.log(0.40), math.log(0.25)], rel=1e-5)
    assert len(top_logprobs(LOGITS, 100)) == 6
