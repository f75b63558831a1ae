"""From logits to a token: pure functions, and every random number from the generator that is passed in.

V = vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.errors import CheckpointError, UsageError

_HEAD = 1024
"""Top-p looks at so many of the likeliest tokens before it sorts the whole vocabulary, which for 129,280 tokens
takes as long as some layers; a nucleus is nearly always smaller."""

_COLDEST = 1e-6
"""Below this temperature, float32 division itself would overflow; the result is the likeliest token anyway."""


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn. Applied in this order, as transformers does:

    1. `temperature` divides the logits; 0 takes the likeliest token, and nothing below matters then;
    2. `top_k` keeps the k likeliest tokens; 0 keeps all;
    3. `top_p` keeps the smallest set of likeliest tokens that holds at least this much of what is left
       (Holtzman et al., https://arxiv.org/abs/1904.09751);
    4. `min_p` keeps tokens at least this fraction as likely as the likeliest (https://arxiv.org/abs/2407.01082).

    Raises UsageError for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        self._check("temperature", _is_number(self.temperature) and self.temperature >= 0, "0 or more")
        self._check("top_k", type(self.top_k) is int and self.top_k >= 0, "a whole number, 0 (off) or more")
        self._check("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1 (off)")
        self._check("min_p", _is_number(self.min_p) and 0 <= self.min_p <= 1, "between 0 (off) and 1")

    def _check(self, name: str, valid: bool, wanted: str) -> None:
        if not valid:
            raise UsageError(f"{name} must be {wanted}, not {getattr(self, name)!r}")


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw a token from float32 logits [V].

    Raises CheckpointError when they are no numbers: then the weights are damaged, not the request.
    """
    best = int(logits.argmax())  # NaN counts as the largest
    if not math.isfinite(float(logits[best])):
        raise CheckpointError("the model's output is not finite: its weights are damaged; run `localmoe verify`")
    if params.temperature == 0:
        return best
    token_ids, probabilities = distribution(logits, params)
    drawn = int(torch.multinomial(probabilities, 1, generator=generator))
    return int(token_ids[drawn])


def distribution(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn from logits [V] at a temperature above 0, with their probabilities.

    Returns int64 [N] and float32 [N], 1 <= N <= V, summing to 1.
    """
    # Relative to the best one, so that a tiny temperature makes -inf of the others and never inf of the best
    scaled = (logits - logits.max()) / max(params.temperature, _COLDEST)  # [V]
    token_ids = torch.arange(len(logits))
    if 0 < params.top_k < len(logits):
        scaled, token_ids = scaled.topk(params.top_k)
    probabilities = scaled.softmax(dim=0)
    if params.top_p < 1:
        probabilities, token_ids = _nucleus(probabilities, token_ids, params.top_p)
    if params.min_p > 0:
        kept = probabilities >= params.min_p * probabilities.max()
        probabilities, token_ids = probabilities[kept], token_ids[kept]
    return token_ids, probabilities / probabilities.sum()


def logprob(logits: Tensor, token_id: int) -> float:
    """Natural logarithm of the token's probability under logits [V] as the model gives them.

    That is at temperature 1 and before any filter, so values compare across sampling settings.
    """
    return float(logits[token_id] - logits.logsumexp(dim=0))


def _nucleus(probabilities: Tensor, token_ids: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    head, order = probabilities.topk(min(_HEAD, len(probabilities)))
    if float(head.sum()) < top_p:
        head, order = probabilities.sort(descending=True, stable=True)
    before = head.cumsum(dim=0) - head  # the mass of everything likelier
    count = max(1, int((before < top_p).sum()))
    return head[:count], token_ids[order[:count]]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
