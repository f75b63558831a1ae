from __future__ import annotations

import math

import pytest
import torch

from localmoe.errors import CheckpointError, UsageError
from localmoe.sampling import SamplingParams, distribution, logprob, sample

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


def test_temperature_zero_takes_the_likeliest_whatever_else_is_set() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert sample(LOGITS, SamplingParams(0.0, top_k=3, top_p=0.1, min_p=0.9), generator) == 1
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_tiny_temperature_is_greedy_and_finite(temperature: float) -> None:
    wide = torch.tensor([-1e30, 5.0, 80.0, 79.0, float("-inf")])
    assert sample(wide, SamplingParams(temperature), torch.Generator().manual_seed(1)) == 2


def test_a_huge_temperature_is_uniform() -> None:
    assert list(allowed(temperature=1e30).values()) == pytest.approx([1 / 6] * 6, rel=1e-5)


def test_logprob_is_that_of_the_unmodified_distribution() -> None:
    for token, probability in enumerate(PROBABILITIES.tolist()):
        assert logprob(LOGITS, token) == pytest.approx(math.log(probability), rel=1e-5)


def drawn(settings: SamplingParams, seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [sample(LOGITS, settings, generator) for _ in range(count)]


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
        sample(logits, SamplingParams(temperature), torch.Generator())
