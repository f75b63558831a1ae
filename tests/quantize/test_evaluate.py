import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from localmoe.errors import InputError, UsageError
from quantize import evaluate as evaluation
from quantize import plots
from quantize.evaluate import EvaluationProgress, LayerwiseModel
from quantize.positions import KINDS, Evaluation, Positions, kind_of
from quantize.stream import one_thread_each


def evaluate(*arguments: Any, **options: Any) -> Evaluation:
    return evaluation.evaluate(*arguments, **options).summary()


@dataclass(frozen=True)
class Letters:
    """One token a letter; 0 is BOS."""

    bos_id: int | None = 0
    shift: int = 0

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        assert not add_bos
        return [1 + (ord(letter) + self.shift) % 8 for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join("\ufffd a1.\n?b"[id_ % 8] for id_ in ids)


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
    assert found.kld_p90 == pytest.approx(np.quantile(kld, 0.9), rel=1e-6)
    assert found.kld_p99 == pytest.approx(np.quantile(kld, 0.99), rel=1e-6)
    count = math.sqrt(len(kld))
    assert found.kld_error == pytest.approx(np.std(kld, ddof=1) / count, rel=1e-6)
    error = found.perplexity * np.std(likelihood, ddof=1) / count
    assert found.perplexity_error == pytest.approx(error, rel=1e-6)
    error = found.reference_perplexity * np.std(true_likelihood, ddof=1) / count
    assert found.reference_perplexity_error == pytest.approx(error, rel=1e-6)
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


def measured(text: str = "the goat sat on the drum and would not move") -> tuple[FakeEngine, FakeEngine, Positions]:
    model, reference = FakeEngine(1), FakeEngine(2)
    return model, reference, evaluation.evaluate(model, text, reference=reference, window=11)


def test_classes_part_the_tokens() -> None:
    model, reference, found = measured()
    classes = found.classes(model.tokenizer)
    whole = found.summary()
    for by in ("token", "certainty"):
        figures = [entry.figures for entry in classes if entry.by == by]
        assert sum(part.tokens for part in figures) == whole.tokens
        assert sum(part.tokens * (part.kld_mean or 0) for part in figures) / whole.tokens == pytest.approx(
            whole.kld_mean
        )
    targets = model.tokenizer.encode("the goat sat on the drum and would not move", add_bos=False)
    kinds = [kind_of(model.tokenizer.decode([token])) for token in targets]
    found_kinds = {entry.name: entry.figures.tokens for entry in classes if entry.by == "token"}
    assert found_kinds == {kind: kinds.count(kind) for kind in KINDS if kind in kinds}
    assert len(found_kinds) > 3
    certain = next(entry for entry in classes if entry.name == "0.75 to 0.95")
    known = [0 if at % 10 == 0 else targets[at - 1] for at in range(len(targets))]
    tops = [probabilities(reference, token).max() for token in known]
    assert certain.figures.tokens == sum(0.75 <= top < 0.95 for top in tops)


def test_kinds_of_tokens() -> None:
    texts = {"letters": [" the", "a1", "好"], "digits": ["12", " 7"], "space": ["\n", "  "], "punctuation": [".", " ("]}
    assert {kind: [text for text in some if kind_of(text) == kind] for kind, some in texts.items()} == texts
    assert {kind_of(text) for text in ("", "\ufffd", "\x1b")} == {"other"}


def test_the_plot_is_a_png_of_every_position(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, _, found = measured()
    plots.check_plot(tmp_path / "kld.png")
    plots.plot_divergence(found, tmp_path / "kld.png", "a title")
    assert (tmp_path / "kld.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["kld.png"]
    places, means, high = plots.by_position(found)
    assert places.tolist() == list(range(1, 11))
    for place, mean in zip(places, means, strict=True):
        assert mean == pytest.approx(found.kld[found.places == place].mean().item())
    assert (high >= means * 0.5).all()


def test_plots_that_cannot_be_drawn_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"does not end in \.png"):
        plots.check_plot(tmp_path / "kld.pdf")
    with pytest.raises(UsageError, match="directory of"):
        plots.check_plot(tmp_path / "nowhere" / "kld.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'localmoe\[plot\]'"):
        plots.check_plot(tmp_path / "kld.png")


@pytest.mark.parametrize("recipe", ["balanced", "nf4"])
def test_layer_by_layer_finds_what_the_engine_finds(
    recipe: str, demo: Path, demo_artifacts: Callable[..., Path]
) -> None:
    import localmoe
    from localmoe.formats.checkpoint import ReadingCheckpoint

    directory = demo_artifacts(recipe)
    text = "The goat sat on the drum and would not move. " * 12
    with localmoe.load(directory, kernels="reference") as engine, localmoe.load(demo, kernels="reference") as source:
        tokenizer = engine.tokenizer
        wanted = evaluate(engine, text, reference=source, window=70)
    layers: list[tuple[int, int]] = []
    with one_thread_each():
        models = [
            LayerwiseModel(ReadingCheckpoint.open(path), tokenizer, lambda done, total: layers.append((done, total)))
            for path in (directory, demo)
        ]
        found = evaluate(models[0], text, reference=models[1], window=70)
    assert astuple(found) == pytest.approx(astuple(wanted), rel=2e-3)
    assert found.kld_mean == pytest.approx(wanted.kld_mean, rel=2e-4)
    assert layers == [(layer, 5) for layer in range(1, 6)] * 2
