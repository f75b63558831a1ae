"""What a model lost: perplexity, and the Kullback-Leibler divergence to a reference, over a text.

    KLD = sum over the vocabulary of p (log p - log q), p the reference's next-token probabilities, q the model's

taken at every predicted token, as llama.cpp's `perplexity --kl-divergence` does. The text is cut into windows that
each start from BOS with an empty cache. Logits stay in float32 and logarithms are taken in float64:
differences of 1e-5 are what there is to see. T = tokens of a window, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from localmoe.errors import InputError, UsageError
from localmoe.formats.checkpoint import Checkpoint
from localmoe.model.config import ModelConfig
from quantize.layerwise import LayerByLayer
from quantize.positions import Positions, TokenText
from quantize.stream import workers

DEFAULT_WINDOW = 512
_ROWS = 64  # positions whose float64 log-probabilities are held at a time


class EvaluatedTokenizer(TokenText, Protocol):
    """The part of a tokenizer that is used here."""

    @property
    def bos_id(self) -> int | None: ...

    def encode(self, text: str, *, add_bos: bool) -> list[int]: ...


class EvaluatedEngine(Protocol):
    """The part of `localmoe.Engine` that is used here."""

    @property
    def tokenizer(self) -> EvaluatedTokenizer: ...

    @property
    def max_context(self) -> int: ...

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """float32 [T, V]."""
        ...


OnLayer = Callable[[int, int], None]
"""Told how many layers are done, of how many."""


@dataclass(frozen=True)
class LayerwiseModel:
    """A checkpoint that is run layer by layer over all windows at once, in float32: it need not fit into memory.

    The caller keeps torch at one thread (`stream.one_thread_each`): the work is shared out in whole items.
    """

    checkpoint: Checkpoint
    tokenizer: EvaluatedTokenizer
    progress: OnLayer = field(default=lambda done, total: None)

    @property
    def max_context(self) -> int:
        """No cache limits it, only what the model was made for."""
        return ModelConfig.from_dict(self.checkpoint.config).max_position_embeddings

    def predictions(self, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """float32 logits [T, V] of each window."""
        with ThreadPoolExecutor(workers()) as pool:
            model = LayerByLayer(self.checkpoint, windows, pool)
            layers = model.config.num_hidden_layers
            for layer in range(layers):
                for _ in model.advance(layer, lambda module, statistics: None):
                    raise AssertionError("no statistics were asked for")
                self.progress(layer + 1, layers)
            yield from model.logits()


@dataclass(frozen=True)
class EvaluationProgress:
    """Predicted tokens done, of all."""

    done_tokens: int
    total_tokens: int


def evaluate(
    model: EvaluatedEngine | LayerwiseModel,
    text: str,
    *,
    reference: EvaluatedEngine | LayerwiseModel | None = None,
    window: int = DEFAULT_WINDOW,
    progress: Callable[[EvaluationProgress], None] | None = None,
) -> Positions:
    """Predict `text` with `model`, and with `reference` where there is one; `window` is in tokens, BOS included.

    A context shorter than `window` makes the windows shorter. Raises InputError for a text with nothing to
    predict, UsageError for a window too short and for a reference with other tokens.
    """
    if window < 2:
        raise UsageError(f"a window of {window} tokens predicts nothing: it must be 2 or more")
    ids = model.tokenizer.encode(text, add_bos=False)
    bos = model.tokenizer.bos_id
    window = min(window, model.max_context)
    if reference is not None:
        window = min(window, reference.max_context)
        if reference.tokenizer.encode(text, add_bos=False) != ids or reference.tokenizer.bos_id != bos:
            raise UsageError("the reference splits the text into other tokens: only models of one tokenizer compare")
    windows = windows_of(model.tokenizer, text, window)
    total = sum(len(tokens) - 1 for tokens in windows)
    found = _predictions(model, windows)
    truth = _predictions(reference, windows) if reference is not None else None
    done: list[Positions] = []
    count = 0
    for tokens in windows:
        done.append(_compare(next(found), next(truth) if truth is not None else None, tokens))
        count += len(tokens) - 1
        if progress is not None:
            progress(EvaluationProgress(count, total))
    return Positions.joined(done)


def windows_of(tokenizer: EvaluatedTokenizer, text: str, longest: int) -> list[list[int]]:
    """The text in windows of at most `longest` tokens, each from BOS. Raises InputError."""
    ids = tokenizer.encode(text, add_bos=False)
    windows = list(_windows(ids, tokenizer.bos_id, longest))
    if not windows:
        raise InputError("the text is too short: there is no token to predict")
    return windows


def _windows(ids: Sequence[int], bos: int | None, window: int) -> Iterator[list[int]]:
    """Sequences of at most `window` tokens. Without a BOS the first of each is given and not predicted."""
    first = [] if bos is None else [bos]
    step = window - len(first)
    for start in range(0, len(ids), step):
        tokens = [*first, *ids[start : start + step]]
        if len(tokens) > 1:
            yield tokens


def _predictions(model: EvaluatedEngine | LayerwiseModel, windows: list[list[int]]) -> Iterator[Tensor]:
    return model.predictions(windows) if isinstance(model, LayerwiseModel) else map(model.logits, windows)


def _compare(logits: Tensor, truth: Tensor | None, tokens: list[int]) -> Positions:
    """All predicted positions of one window, a few rows of float64 [rows, V] at a time."""
    logits = logits[:-1]  # [T - 1, V]
    if truth is not None:
        truth = truth[:-1]
        if truth.shape != logits.shape:
            raise UsageError(
                f"the reference has a vocabulary of {truth.shape[1]:,}, the model one of {logits.shape[1]:,}"
            )
    targets = torch.tensor(tokens[1:])  # [T - 1]
    parts = []
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        wanted = targets[rows].unsqueeze(1)
        log_q = torch.log_softmax(logits[rows].double(), dim=-1)
        log_p = log_q if truth is None else torch.log_softmax(truth[rows].double(), dim=-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp_min_(0.0)  # rounding may go below
        parts.append(
            Positions(
                with_reference=truth is not None,
                targets=targets[rows],
                places=torch.arange(start + 1, start + 1 + len(wanted)),
                nll=-log_q.gather(1, wanted)[:, 0],
                reference_nll=-log_p.gather(1, wanted)[:, 0],
                kld=divergence,
                same=log_q.argmax(dim=-1) == log_p.argmax(dim=-1),
                certainty=log_p.amax(dim=-1).exp(),
            )
        )
    return Positions.joined(parts)
