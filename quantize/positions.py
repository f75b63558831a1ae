"""What was measured at every predicted token of a text, and the figures that are made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

CERTAINTIES = (0.25, 0.5, 0.75, 0.95)
"""Where the classes by certainty are cut: the probability that the reference gives its likeliest token."""

KINDS = ("letters", "digits", "space", "punctuation", "other")
"""The classes by kind of token: the first of letters and digits that its text has; white space alone; other visible
characters; the rest, which is control tokens and pieces of a character."""


class TokenText(Protocol):
    """What a token's kind is found by."""

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Evaluation:
    """`tokens` were predicted. Divergences are in nats; without a reference they and what compares are None.

    An `_error` is a standard error, taking the tokens for independent as llama.cpp does: of the mean
    divergence, and of the perplexity (the mean's standard error times the perplexity). None for a single token.
    """

    tokens: int
    perplexity: float
    perplexity_error: float | None
    reference_perplexity: float | None = None
    reference_perplexity_error: float | None = None
    kld_mean: float | None = None
    kld_error: float | None = None
    kld_median: float | None = None
    kld_p90: float | None = None
    kld_p99: float | None = None
    kld_max: float | None = None
    same_top1: float | None = None


@dataclass(frozen=True)
class TokenClass:
    """The figures of some of the tokens: `by` is "token" (its kind) or "certainty" (the reference's)."""

    by: str
    name: str
    figures: Evaluation


@dataclass(frozen=True)
class Positions:
    """One number a predicted token, [N] each: the token, its place in its window, negative log-likelihoods, the
    divergence, whether the likeliest tokens agree, and how likely the reference finds its likeliest."""

    with_reference: bool
    targets: Tensor
    places: Tensor
    nll: Tensor
    reference_nll: Tensor
    kld: Tensor
    same: Tensor
    certainty: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Positions]) -> Positions:
        """All positions of `parts`, in order."""
        names = [field.name for field in fields(cls)[1:]]
        columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(parts[0].with_reference, **columns)

    def where(self, chosen: Tensor) -> Positions:
        """Those positions where bool `chosen` [N] is true."""
        names = [field.name for field in fields(self)[1:]]
        return Positions(self.with_reference, **{name: getattr(self, name)[chosen] for name in names})

    def summary(self) -> Evaluation:
        """The figures of all positions, of which there must be one."""
        tokens = len(self.nll)
        perplexity, error = _perplexity(self.nll)
        if not self.with_reference:
            return Evaluation(tokens, perplexity, error)
        reference_perplexity, reference_error = _perplexity(self.reference_nll)
        kld = self.kld.numpy()
        median, p90, p99 = (float(value) for value in np.quantile(kld, (0.5, 0.9, 0.99)))
        return Evaluation(
            tokens=tokens,
            perplexity=perplexity,
            perplexity_error=error,
            reference_perplexity=reference_perplexity,
            reference_perplexity_error=reference_error,
            kld_mean=_mean(self.kld),
            kld_error=_mean_error(self.kld),
            kld_median=median,
            kld_p90=p90,
            kld_p99=p99,
            kld_max=float(kld.max()),
            same_top1=int(self.same.sum()) / tokens,
        )

    def classes(self, tokenizer: TokenText) -> list[TokenClass]:
        """The figures by kind of token, then by certainty; classes without a token are left out.

        Without a reference the certainty is the model's own.
        """
        distinct, places = torch.unique(self.targets, return_inverse=True)
        kinds = torch.tensor([KINDS.index(kind_of(tokenizer.decode([token]))) for token in distinct.tolist()])[places]
        found = [("token", name, kinds == index) for index, name in enumerate(KINDS)]
        bounds = [0.0, *CERTAINTIES, 1.0]
        cuts = torch.bucketize(self.certainty, torch.tensor(CERTAINTIES, dtype=self.certainty.dtype), right=True)
        for index in range(len(bounds) - 1):
            found.append(("certainty", f"{bounds[index]:g} to {bounds[index + 1]:g}", cuts == index))
        return [TokenClass(by, name, self.where(chosen).summary()) for by, name, chosen in found if chosen.any()]


def kind_of(text: str) -> str:
    """Which of `KINDS` a token with this text is."""
    if any(letter.isalpha() for letter in text):
        return "letters"
    if any(letter.isdigit() for letter in text):
        return "digits"
    if text.isspace():
        return "space"
    visible = text.strip()
    return "punctuation" if visible and visible.isprintable() and "\ufffd" not in visible else "other"


def _perplexity(nll: Tensor) -> tuple[float, float | None]:
    """exp of the mean negative log-likelihood, and its standard error to the first order."""
    mean = _mean(nll)
    if mean >= 700:
        return math.inf, None
    perplexity, error = math.exp(mean), _mean_error(nll)
    return perplexity, None if error is None else error * perplexity


def _mean(values: Tensor) -> float:
    return math.fsum(values.tolist()) / len(values)


def _mean_error(values: Tensor) -> float | None:
    """Standard error of the mean."""
    count, mean = len(values), _mean(values)
    if count < 2:
        return None
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values.tolist()) / (count - 1) / count)
