"""`scripts/check_speculation` in small: its parts on the demo, and that its statistics find a bias."""

from __future__ import annotations

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
    assert len(right) == len(biased) == 400
    assert 0 < int((right != biased).sum()) < 20
    assert (biased <= right + 1e-6).sum() >= 380  # the likeliest token stands first
    assert script.against_uniform(right) > 0.01


def test_the_statistics_find_a_bias_of_two_percent_and_no_other(script: ModuleType) -> None:
    """50,000 draws of one distribution, whose likeliest token has 0.3."""
    probabilities = torch.tensor([0.3, 0.21, 0.19, 0.11, 0.09, 0.06, 0.04])
    dice = torch.Generator().manual_seed(2)

    def sample(bias: float) -> torch.Tensor:
        tokens = torch.multinomial(probabilities, 50_000, replacement=True, generator=dice)
        tokens = torch.where(torch.rand(50_000, generator=dice) < bias, 0, tokens)
        share = torch.rand(50_000, generator=dice)
        return torch.cat(
            [
                script.place(probabilities.expand(500, 7), *pair)
                for pair in zip(tokens.split(500), share.split(500), strict=True)
            ]
        )

    right, again, biased = sample(0.0), sample(0.0), sample(script.BIAS)
    assert script.against_uniform(right) > script.LEVEL
    assert script.against_each_other(right, again) > script.LEVEL
    assert script.against_uniform(biased) < 0.01
    assert script.against_each_other(right, biased) < script.LEVEL
    # The tables' values: 16.92 is exceeded by one in twenty with nine degrees of freedom
    assert script.survival(16.919, 9) == pytest.approx(0.05, abs=1e-4)
    assert script.survival(3.841, 1) == pytest.approx(0.05, abs=1e-4)
