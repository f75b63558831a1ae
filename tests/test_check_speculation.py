"""`scripts/check_speculation` in small: its parts on the demo, and that its statistics find a bias."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import localmoe
from localmoe.load import Engine, load

DEMO = Path(localmoe.__file__).parent / "data" / "demo"


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("check_speculation")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    from quantize.pipeline import quantize

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("proof") / "compact"
    quantize(DEMO, directory, "compact", grid="absmax")
    with load(directory, ctx=256, threads=1) as plain, load(directory, ctx=256, threads=1, mtp=2) as guessing:
        yield plain, guessing
    torch.set_num_threads(before)


def test_a_thousand_prompts_are_a_thousand(script: ModuleType) -> None:
    assert len(set(script.prompts())) == 1000


def test_greedy_answers_are_identical(script: ModuleType, engines: tuple[Engine, Engine]) -> None:
    found = script.greedy(*engines, script.prompts()[::50], 12)
    assert found["passed"]
    assert (found["prompts"], found["identical"]) == (20, 20)


def test_acceptance_is_the_independent_count(script: ModuleType, engines: tuple[Engine, Engine]) -> None:
    found = script.acceptance(*engines, script.prompts()[::50], 24)  # one guess is 0.3 %
    assert found["passed"]
    assert found["drafted"] > 50
    # But for near-ties, where one number rounded otherwise moves every place after it: 0 to 3 of 295 by the CPU
    assert abs(found["drafted"] - found["counted"]) <= 0.02 * found["counted"]
    guessing = engines[1]
    guessing.speculate(guessing._mtp, 2)


def test_drawn_tokens_are_the_models(script: ModuleType, engines: tuple[Engine, Engine]) -> None:
    plain, guessing = engines
    right, biased = script.drawn(guessing, plain, script.prompts()[::50], 400, seed=5)
    more = biased.surplus - right.surplus
    assert 0 < more[0] < 20  # the likeliest token
    assert more[1:].max() <= 0
    assert float(right.covariance.diagonal().max()) < 400 / 4
    assert right.p > 0.01


def test_the_statistics_find_a_bias_of_two_percent_and_no_other(script: ModuleType) -> None:
    """50,000 draws, most of them where the likeliest token has 0.3, the others where it has 0.96."""
    rows = torch.full((2, 20), 0.002)
    rows[0, :6] = torch.tensor([0.19, 0.3, 0.2, 0.12, 0.092, 0.07])
    rows[1, 3] = 0.962
    probabilities = rows[[0, 0, 0, 0, 1]].repeat(10_000, 1)
    dice = torch.Generator().manual_seed(2)

    def sample(bias: float) -> object:
        tokens = torch.multinomial(probabilities, 1, generator=dice)[:, 0]
        tokens = torch.where(torch.rand(50_000, generator=dice) < bias, probabilities.argmax(dim=1), tokens)
        parts = zip(probabilities.split(500), tokens.split(500), strict=True)
        return functools.reduce(operator.add, (script.Ranks.of(*part) for part in parts))

    right, biased = [sample(0.0) for _ in range(40)], [sample(script.BIAS) for _ in range(10)]
    # Where nothing is biased p is uniform: below 0.05 in 2 of 40, and hardly ever in 8
    assert sum(each.p < script.LEVEL for each in right) < 8
    assert 0.3 < sum(each.p for each in right) / 40 < 0.7
    assert sum((first - second).p < script.LEVEL for first, second in itertools.pairwise(right)) < 8
    assert sum(each.p < script.LEVEL for each in biased) >= 9
    assert sum((each - other).p < script.LEVEL for each, other in zip(biased, right[:10], strict=True)) >= 7
    # The tables' values: 16.92 is exceeded by one in twenty with nine degrees of freedom
    assert script.survival(16.919, 9) == pytest.approx(0.05, abs=1e-4)
    assert script.survival(3.841, 1) == pytest.approx(0.05, abs=1e-4)
