import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from localmoe.errors import InputError, UsageError
from quantize.evaluate import EvaluationProgress, evaluate


@dataclass(frozen=True)
class Letters:
    """One token a letter; 0 is BOS."""

    bos_id: int | None = 0
    shift: int = 0

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        assert not add_bos
        return [1 + (ord(letter) + self.shift) % 8 for letter in text]


class FakeEngine:
    """Logits are a fixed random row a token: what an engine of one layer would say."""

    def __init__(self, seed: int, vocab: int = 9, context: int = 64, tokenizer: Letters | None = None) -> None:
        self.tokenizer = tokenizer or Letters()
        self.max_context = context
        self.table = torch.randn(9, vocab, generator=torch.Generator().manual_seed(seed)) * 3
        self.calls: list[list[int]] = []

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        assert len(token_ids) <= self.max_context
        self.calls.append(list(token_ids))
        return self.table[list(token_ids)]


def probabilities(engine: FakeEngine, token: int) -> np.ndarray:
    numbers = np.exp(engine.table[token].double().numpy())
    return numbers / numbers.sum()


def test_figures_equal_those_computed_by_hand() -> None:
    model, reference = FakeEngine(1), FakeEngine(2)
    text = "the goat sat on the drum and would not move"
    found = evaluate(model, text, reference=reference, window=11)
    ids = model.tokenizer.encode(text, add_bos=False)
    pairs = []  # (what is known, what comes)
    for start in range(0, len(ids), 10):
        window = [0, *ids[start : start + 10]]
        pairs += list(itertools.pairwise(window))
    p = [probabilities(reference, known) for known, _ in pairs]
    q = [probabilities(model, known) for known, _ in pairs]
    kld = [float((a * np.log(a / b)).sum()) for a, b in zip(p, q, strict=True)]
    likelihood = [math.log(b[target]) for b, (_, target) in zip(q, pairs, strict=True)]
    true_likelihood = [math.log(a[target]) for a, (_, target) in zip(p, pairs, strict=True)]
    assert found.tokens == len(ids)
    assert found.perplexity == pytest.approx(math.exp(-np.mean(likelihood)), rel=1e-6)
    assert found.reference_perplexity == pytest.approx(math.exp(-np.mean(true_likelihood)), rel=1e-6)
    assert found.kld_mean == pytest.approx(np.mean(kld), rel=1e-6)
    assert found.kld_median == pytest.approx(np.median(kld), rel=1e-6)
    assert found.kld_p99 == pytest.approx(np.quantile(kld, 0.99), rel=1e-6)
    assert found.kld_max == pytest.approx(max(kld), rel=1e-6)
    same = np.mean([a.argmax() == b.argmax() for a, b in zip(p, q, strict=True)])
    assert found.same_top1 == pytest.approx(same)
    assert 0 < found.same_top1 < 1


def test_windows_start_with_bos_and_fit_the_shorter_context() -> None:
    model, reference = FakeEngine(1, context=16), FakeEngine(1, context=7)
    found = evaluate(model, "abcdefghijklm", reference=reference, window=512)
    assert [len(call) for call in model.calls] == [7, 7, 2]
    assert all(call[0] == 0 for call in model.calls)
    assert model.calls == reference.calls
    assert found.tokens == 13


def test_a_model_differs_from_itself_by_nothing() -> None:
    found = evaluate(FakeEngine(4), "hello", reference=FakeEngine(4))
    assert (found.kld_mean, found.kld_max, found.same_top1) == (0, 0, 1)
    assert found.perplexity == found.reference_perplexity


def test_differences_below_sixteen_bits_show() -> None:
    model, reference = FakeEngine(4), FakeEngine(4)
    model.table = model.table + 1e-4 * torch.randn(9, 9, generator=torch.Generator().manual_seed(5))
    found = evaluate(model, "hello there", reference=reference)
    assert found.kld_mean is not None
    assert 1e-11 < found.kld_mean < 1e-8


def test_without_a_reference_there_is_only_perplexity() -> None:
    found = evaluate(FakeEngine(1), "hello")
    assert found.perplexity > 1
    assert found.reference_perplexity is None
    assert found.kld_mean is None


def test_without_bos_the_first_token_is_given() -> None:
    model = FakeEngine(1, tokenizer=Letters(bos_id=None))
    assert evaluate(model, "abcdef", window=3).tokens == 4


def test_progress_counts_predicted_tokens() -> None:
    seen: list[EvaluationProgress] = []
    evaluate(FakeEngine(1), "abcdefgh", window=4, progress=seen.append)
    assert [(step.done_tokens, step.total_tokens) for step in seen] == [(3, 8), (6, 8), (8, 8)]


def test_nothing_to_predict() -> None:
    with pytest.raises(InputError, match="too short"):
        evaluate(FakeEngine(1), "")


def test_other_tokens_or_vocabulary_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="other tokens"):
        evaluate(FakeEngine(1), "abc", reference=FakeEngine(1, tokenizer=Letters(shift=1)))
    with pytest.raises(UsageError, match="vocabulary of 8"):
        evaluate(FakeEngine(1), "abc", reference=FakeEngine(1, vocab=8))
    with pytest.raises(UsageError, match="window of 1"):
        evaluate(FakeEngine(1), "abc", window=1)
