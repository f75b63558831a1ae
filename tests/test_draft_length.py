"""Guessing goes on where it pays, and may lose little where it does not."""

from __future__ import annotations

import random
from statistics import mean

import pytest

from localmoe.draft_length import FixedLength, MeasuredLength

PLAIN = 0.01  # seconds of a plain pass
TEXTS = 15


def speed(
    share: float, cost: float, tokens: int, *, noisy: bool = False, lengths: MeasuredLength | None = None
) -> float:
    """Tokens a second over those of plain passes, on average. A guess is right with the same share as any
    other, and costs `cost` plain passes."""
    return mean(_speed(share, cost, tokens, seed, noisy, lengths) for seed in range(TEXTS))


def _speed(share: float, cost: float, tokens: int, seed: int, noisy: bool, known: MeasuredLength | None) -> float:
    dice, lengths = random.Random(seed), known or MeasuredLength(3)
    done, seconds, plain, pace = 0, 0.0, 0.0, PLAIN
    while done < tokens:
        if noisy and dice.random() < 1 / 300:  # another program comes or goes
            pace = PLAIN * dice.choice((1, 1.5, 2))
        drafted = lengths.next()
        accepted = 0
        while accepted < drafted and dice.random() < share:
            accepted += 1
        took = pace * (1 + cost * drafted)
        outlier = 5 if noisy and dice.random() < 0.01 else 1
        lengths.record(drafted, accepted, took * dice.lognormvariate(0, 0.1) * outlier)
        done += 1 + accepted
        seconds += took
        plain += pace * (1 + accepted)
    return plain / seconds


def ideal(share: float, cost: float) -> float:
    return max(sum(share**distance for distance in range(k + 1)) / (1 + cost * k) for k in range(4))


LOSING = [(0.5, 0.6), (0.0, 0.1), (0.0, 0.6), (0.1, 1.0), (0.3, 0.6), (0.0, 3.0)]
WINNING = [(0.85, 0.3), (0.85, 0.6), (0.6, 0.3), (0.5, 0.3)]


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(("share", "cost"), LOSING)
def test_it_loses_little_where_guessing_does_not_pay(share: float, cost: float, noisy: bool) -> None:
    assert speed(share, cost, 200, noisy=noisy) > 0.97  # an answer of a new process
    assert speed(share, cost, 2000, noisy=noisy) > 0.98


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(("share", "cost"), WINNING)
def test_it_gains_most_of_what_there_is(share: float, cost: float, noisy: bool) -> None:
    gain = ideal(share, cost) - 1
    assert speed(share, cost, 200, noisy=noisy) > 1 + 0.6 * gain
    assert speed(share, cost, 2000, noisy=noisy) > 1 + 0.7 * gain


def test_it_follows_a_text_that_changes() -> None:
    """When it notices is chance: a mean of twelve texts."""
    again = []
    for seed in range(0, 36, 3):
        lengths = MeasuredLength(3)
        assert _speed(0.9, 0.2, 1000, seed, False, lengths) > 1.8
        assert lengths.best == 3
        assert _speed(0.0, 0.6, 1000, seed + 1, False, lengths) > 0.95
        again.append(_speed(0.9, 0.2, 2000, seed + 2, False, lengths))
    assert mean(again) > 1.4


def test_no_guess_follows_where_it_says_so() -> None:
    dice, lengths, rested = random.Random(1), MeasuredLength(3), 0
    share = 0.0
    for step in range(20_000):
        rests = lengths.rests
        drafted = lengths.next()
        assert not (rests and drafted)
        rested += lengths.rests
        share = dice.random() if step % 700 == 0 else share
        accepted = sum(dice.random() < share for _ in range(drafted))
        lengths.record(drafted, accepted, PLAIN * (1 + 0.5 * drafted) * dice.lognormvariate(0, 0.1))
    assert rested > 5000
    assert FixedLength(0).rests
    assert not FixedLength(2).rests


def test_one_slow_pass_decides_nothing() -> None:
    """The first guess reads the MTP layer's weights from the disk."""
    lengths = MeasuredLength(3)
    slow, seconds, tokens = 100 * PLAIN, 0.0, 0
    while tokens < 1000:
        drafted = lengths.next()
        took = PLAIN * (1 + 0.2 * drafted) + (slow if drafted else 0.0)
        slow = 0.0 if drafted else slow
        lengths.record(drafted, drafted, took)
        seconds += took
        tokens += 1 + drafted
    assert lengths.best == 3


def test_passes_that_had_nothing_to_guess_are_plain_ones() -> None:
    """Prompt lookup finds nothing in most places; what it finds there counts."""
    lengths = MeasuredLength(7)
    for number in range(400):
        drafted = min(lengths.next(), 7) if number % 5 == 0 else 0
        lengths.record(drafted, drafted, PLAIN * (1 + 0.1 * drafted))
    assert lengths.best > 3


def test_a_fixed_length_stays() -> None:
    lengths = FixedLength(2)
    for _ in range(50):
        assert lengths.next() == 2
        lengths.record(2, 0, 9.0)
    assert lengths.best == 2
