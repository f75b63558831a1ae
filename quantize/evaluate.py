"""What a model lost: perplexity, and the Kullback-Leibler divergence to a reference, over a text.

    KLD = sum over the vocabulary of p (log p - log q), p the reference's next-token probabilities, q the model's

taken at every predicted token, as llama.cpp's `perplexity --kl-divergence` does. The text is cut into windows that
each start from BOS with an empty cache. Logits stay in float32 and logarithms are taken in float64:
differences of 1e-5 are what there is to see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from localmoe.errors import InputError, UsageError

DEFAULT_WINDOW = 512
_ROWS = 64  # positions whose float64 log-probabilities are held at a time


class _Tokenizer(Protocol):
    @property
    def bos_id(self) -> int | None: ...

    def encode(self, text: str, *, add_bos: bool) -> list[int]: ...


class EvaluatedEngine(Protocol):
    """The part of `localmoe.Engine` that is used here."""

    @property
    def tokenizer(self) -> _Tokenizer: ...

    @property
    def max_context(self) -> int: ...

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """float32 [T, V]."""
        ...


@dataclass(frozen=True)
class EvaluationProgress:
    """Predicted tokens done, of all."""

    done_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class Evaluation:
    """`tokens` were predicted. Divergences are in nats; without a reference they and what compares are None."""

    tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    kld_mean: float | None = None
    kld_median: float | None = None
    kld_p99: float | None = None
    kld_max: float | None = None
    same_top1: float | None = None


@dataclass(frozen=True)
class _Positions:
    """One number a predicted token: negative log-likelihoods, divergence, whether the likeliest tokens agree."""

    nll: Tensor
    reference_nll: Tensor
    kld: Tensor
    same: Tensor


def evaluate(
    engine: EvaluatedEngine,
    text: str,
    *,
    reference: EvaluatedEngine | None = None,
    window: int = DEFAULT_WINDOW,
    progress: Callable[[EvaluationProgress], None] | None = None,
) -> Evaluation:
    """Predict `text` with `engine`, and with `reference` where there is one; `window` is in tokens, BOS included.

    A context shorter than `window` makes the windows shorter. Raises InputError for a text with nothing to
    predict, UsageError for a window too short and for a reference with other tokens.
    """
    if window < 2:
        raise UsageError(f"a window of {window} tokens predicts nothing: it must be 2 or more")
    ids = engine.tokenizer.encode(text, add_bos=False)
    bos = engine.tokenizer.bos_id
    window = min(window, engine.max_context)
    if reference is not None:
        window = min(window, reference.max_context)
        if reference.tokenizer.encode(text, add_bos=False) != ids or reference.tokenizer.bos_id != bos:
            raise UsageError("the reference splits the text into other tokens: only models of one tokenizer compare")
    windows = list(_windows(ids, bos, window))
    total = sum(len(tokens) - 1 for tokens in windows)
    if total == 0:
        raise InputError("the text is too short: there is no token to predict")
    done: list[_Positions] = []
    count = 0
    for tokens in windows:
        done.append(_compare(engine, reference, tokens))
        count += len(tokens) - 1
        if progress is not None:
            progress(EvaluationProgress(count, total))
    return _summary(done, with_reference=reference is not None)


def _windows(ids: Sequence[int], bos: int | None, window: int) -> Iterator[list[int]]:
    """Sequences of at most `window` tokens. Without a BOS the first of each is given and not predicted."""
    first = [] if bos is None else [bos]
    step = window - len(first)
    for start in range(0, len(ids), step):
        tokens = [*first, *ids[start : start + step]]
        if len(tokens) > 1:
            yield tokens


def _compare(engine: EvaluatedEngine, reference: EvaluatedEngine | None, tokens: list[int]) -> _Positions:
    """All positions of one window, a few rows of float64 [rows, V] at a time."""
    logits = engine.logits(tokens)[:-1]  # [T - 1, V]
    truth = logits if reference is None else reference.logits(tokens)[:-1]
    if truth.shape != logits.shape:
        raise UsageError(f"the reference has a vocabulary of {truth.shape[1]:,}, the model one of {logits.shape[1]:,}")
    targets = torch.tensor(tokens[1:]).unsqueeze(1)  # [T - 1, 1]
    parts = []
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        log_q = torch.log_softmax(logits[rows].double(), dim=-1)
        log_p = log_q if reference is None else torch.log_softmax(truth[rows].double(), dim=-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp_min_(0.0)  # rounding may go below
        parts.append(
            _Positions(
                nll=-log_q.gather(1, targets[rows])[:, 0],
                reference_nll=-log_p.gather(1, targets[rows])[:, 0],
                kld=divergence,
                same=log_q.argmax(dim=-1) == log_p.argmax(dim=-1),
            )
        )
    return _joined(parts)


def _joined(parts: Sequence[_Positions]) -> _Positions:
    return _Positions(
        nll=torch.cat([part.nll for part in parts]),
        reference_nll=torch.cat([part.reference_nll for part in parts]),
        kld=torch.cat([part.kld for part in parts]),
        same=torch.cat([part.same for part in parts]),
    )


def _summary(parts: Sequence[_Positions], *, with_reference: bool) -> Evaluation:
    every = _joined(parts)
    tokens = len(every.nll)
    perplexity = _perplexity(every.nll)
    if not with_reference:
        return Evaluation(tokens, perplexity)
    kld = every.kld.numpy()
    return Evaluation(
        tokens=tokens,
        perplexity=perplexity,
        reference_perplexity=_perplexity(every.reference_nll),
        kld_mean=math.fsum(kld.tolist()) / tokens,
        kld_median=float(np.median(kld)),
        kld_p99=float(np.quantile(kld, 0.99)),
        kld_max=float(kld.max()),
        same_top1=int(every.same.sum()) / tokens,
    )


def _perplexity(nll: Tensor) -> float:
    """exp of the mean negative log-likelihood."""
    mean = math.fsum(nll.tolist()) / len(nll)
    return math.exp(mean) if mean < 700 else math.inf
