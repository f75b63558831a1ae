"""From logits to a token: pure functions of the logits, the settings, what was said before, and a seed.

A draw takes its random numbers from (seed, position in the sequence, token id) and from nothing else. So the same
seed gives the same text however the tokens were computed: alone, several in one pass after a correct guess
(`localmoe.speculative`), or after a session was closed and opened again.

V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from localmoe.errors import CheckpointError, UsageError

_HEADS = (64, 1024)
"""Top-p looks at so many of the likeliest tokens, and at more where those are not enough, before it looks for the
place of the cut in the whole vocabulary: sorting 129,280 tokens takes as long as some layers."""

_BIN = 16  # bits of a float that its bin leaves out
_EXACT = 2.0**-29
"""Sums up to 1 of float32 numbers from here on are exact in float64, whatever their order."""

_COLDEST = 1e-6
"""Below this temperature, float32 division itself would overflow; the result is the likeliest token anyway."""

_MOST_BIAS = 1e4  # beyond any logit, and far from float32's end


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn. Applied in this order, as transformers does:

    1. `logit_bias` adds to single tokens' logits (-inf: never this token);
    2. `repetition_penalty` divides the positive and multiplies the negative logits of tokens in the prompt or the
       answer so far (https://arxiv.org/abs/1909.05858); 1 is off;
    3. `presence_penalty` is taken off the logits of tokens in the answer so far, `frequency_penalty` once for each
       time they are there (as OpenAI's interface defines them); 0 is off;
    4. `temperature` divides the logits; 0 takes the likeliest token, and nothing below matters then;
    5. `top_k` keeps the k likeliest tokens; 0 keeps all;
    6. `top_p` keeps the smallest set of likeliest tokens that holds at least this much of what is left
       (Holtzman et al., https://arxiv.org/abs/1904.09751);
    7. `min_p` keeps tokens at least this fraction as likely as the likeliest (https://arxiv.org/abs/2407.01082).

    Raises UsageError for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        self._check("temperature", _is_number(self.temperature) and self.temperature >= 0, "0 or more")
        self._check("top_k", type(self.top_k) is int and self.top_k >= 0, "a whole number, 0 (off) or more")
        self._check("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1 (off)")
        self._check("min_p", _is_number(self.min_p) and 0 <= self.min_p <= 1, "between 0 (off) and 1")
        repetition = self.repetition_penalty
        self._check("repetition_penalty", _is_number(repetition) and 0 < repetition <= 100, "above 0 and at most 100")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            self._check(name, _is_number(value) and abs(value) <= 100, "between -100 and 100; 0 is off")
        for token_id, bias in self.logit_bias:
            valid = type(token_id) is int and token_id >= 0 and (bias == -math.inf or _is_number(bias))
            self._check("logit_bias", valid and bias <= _MOST_BIAS, "pairs of a token id and a number or -inf")

    @property
    def uses_history(self) -> bool:
        """Whether what was said before changes what is drawn."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def _check(self, name: str, valid: bool, wanted: str) -> None:
        if not valid:
            raise UsageError(f"{name} must be {wanted}, not {getattr(self, name)!r}")


class History:
    """The tokens that the penalties look at: which are in the prompt or the answer, and how often in the answer."""

    def __init__(self, vocabulary: int, prompt_ids: Sequence[int]) -> None:
        self.seen = torch.zeros(vocabulary, dtype=torch.bool)  # [V]
        self.seen[torch.tensor(list(prompt_ids), dtype=torch.int64)] = True
        self.counts = torch.zeros(vocabulary)  # [V], of the answer

    def add(self, token_id: int) -> None:
        """Count one more token of the answer."""
        self.seen[token_id] = True
        self.counts[token_id] += 1


def sample(
    logits: Tensor, params: SamplingParams, *, seed: int = 0, position: int = 0, history: History | None = None
) -> int:
    """Draw the token at `position` of its sequence from float32 logits [V].

    Raises CheckpointError when they are no numbers: then the weights are damaged, not the request.
    """
    best = int(logits.argmax())  # NaN counts as the largest
    if not math.isfinite(float(logits[best])):
        raise CheckpointError("the model's output is not finite: its weights are damaged; run `localmoe verify`")
    adjusted = adjust(logits, params, history)
    if params.temperature == 0:
        return best if adjusted is logits else int(adjusted.argmax())
    token_ids, probabilities = distribution(adjusted, params)
    # A race of exponential clocks at the rates p is won by a token with its probability p (the Gumbel-max trick)
    winner = (exponentials(seed, position, token_ids) / probabilities.double()).argmin()
    return int(token_ids[winner])


def adjust(logits: Tensor, params: SamplingParams, history: History | None) -> Tensor:
    """Logits [V] after bias and penalties: the same tensor where there are none. Without a history, bias alone."""
    if params.logit_bias:
        logits = logits.clone()
        for token_id, bias in params.logit_bias:
            logits[token_id] += bias
    if history is None or not params.uses_history:
        return logits
    if params.repetition_penalty != 1:
        penalty = params.repetition_penalty
        logits = torch.where(history.seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if params.presence_penalty or params.frequency_penalty:
        present = (history.counts > 0).float()
        logits = logits - params.presence_penalty * present - params.frequency_penalty * history.counts
    return logits


def distribution(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn from adjusted logits [V] at a temperature above 0, with their probabilities.

    Returns int64 [N] and float32 [N], 1 <= N <= V, summing to 1, in no particular order.
    """
    # Relative to the best one, so that a tiny temperature makes -inf of the others and never inf of the best
    scaled = (logits - logits.max()) / max(params.temperature, _COLDEST)  # [V]
    token_ids = None  # all
    if 0 < params.top_k < len(logits):
        scaled, token_ids = scaled.topk(params.top_k)
    probabilities = scaled.softmax(dim=0)
    if params.top_p < 1:
        probabilities, places = _nucleus(probabilities, params.top_p)
        token_ids = places if token_ids is None else token_ids[places]
    if params.min_p > 0:
        places = (probabilities >= params.min_p * probabilities.max()).nonzero()[:, 0]
        probabilities, token_ids = probabilities[places], places if token_ids is None else token_ids[places]
    return torch.arange(len(logits)) if token_ids is None else token_ids, _normalized(probabilities)


def exponentials(seed: int, position: int, token_ids: Tensor) -> Tensor:
    """Standard exponential random numbers float64 [N], one a token id int64 [N].

    A token's number depends on the seed, the position and its id alone. The bits are SplitMix64's (Steele, Lea,
    Flood, https://doi.org/10.1145/2660193.2660195), used as a hash.
    """
    stream = _mix(_mix(seed * _GOLDEN) + position * _GOLDEN)
    bits = token_ids.numpy().view(np.uint64) * np.uint64(_GOLDEN) + np.uint64(stream)  # modulo 2**64
    for shift, factor in _STEPS:
        bits ^= bits >> np.uint64(shift)
        bits *= np.uint64(factor)
    bits ^= bits >> np.uint64(31)
    uniform = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53  # inside (0, 1)
    return torch.from_numpy(-np.log(uniform))


def logprob(logits: Tensor, token_id: int) -> float:
    """Natural logarithm of the token's probability under logits [V] as the model gives them.

    That is at temperature 1 and before any filter, so values compare across sampling settings.
    """
    return float(logits[token_id] - logits.logsumexp(dim=0))


def top_logprobs(logits: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens under logits [V] as the model gives them: (id, logprob), the likeliest first."""
    values, token_ids = (logits - logits.logsumexp(dim=0)).topk(min(count, len(logits)))
    return tuple(zip(token_ids.tolist(), values.tolist(), strict=True))


_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio
_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # (shift, factor)


def _mix(value: int) -> int:
    """SplitMix64's finalizer, of any integer modulo 2**64."""
    value &= (1 << 64) - 1
    for shift, factor in _STEPS:
        value = (value ^ (value >> shift)) * factor & ((1 << 64) - 1)
    return value ^ (value >> 31)


def _normalized(probabilities: Tensor) -> Tensor:
    """[N], summing to 1. The sum's bits do not depend on the order, as float32's would."""
    return probabilities / probabilities.sum(dtype=torch.float64).float()


def _nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest of [N] and their places."""
    highest = float(probabilities.max())
    for size in _HEADS:
        if size * highest < 0.99 * top_p:  # so many cannot be enough
            continue
        head, places = probabilities.topk(min(size, len(probabilities)))
        if float(head.sum()) >= top_p:
            break
    else:
        found = _nucleus_by_bins(probabilities, top_p)
        if found is not None:
            return probabilities[found], found
        head, places = probabilities.sort(descending=True, stable=True)
    count = max(1, int(_in_nucleus(head, head.cumsum(dim=0), top_p).sum()))
    return head[:count], places[:count]


def _in_nucleus(head: Tensor, mass: Tensor, top_p: float) -> Tensor:
    """Bool [N] for probabilities [N], the likeliest first, and the mass up to and with each."""
    return mass - head < top_p  # of everything likelier


def _nucleus_by_bins(probabilities: Tensor, top_p: float) -> Tensor | None:
    """The places of the nucleus in [N], the same set as sorting finds: only the tokens near the cut are sorted.

    A bin holds the numbers that share a float's exponent and seven bits behind it. Sums in float64 are exact, so that
    rounding to float32 afterwards is the same in any order. None where they are not: beyond the cut or so near to it
    that rounding decides are numbers too small for that.
    """
    values = probabilities.numpy()
    mass = np.bincount(values.view(np.int32) >> _BIN, weights=values)[::-1].cumsum()  # from the likeliest bin on
    near = 4 * 2.0**-24  # rounding to float32, twice, moves a sum up to 1 by less
    first, last = np.searchsorted(mass, (top_p - near, top_p + near))
    if last == len(mass):
        return None
    lowest, beyond = (np.array([len(mass) - 1 - last, len(mass) - first], dtype=np.int32) << _BIN).view(np.float32)
    if lowest < _EXACT:
        return None
    border = np.flatnonzero((values >= lowest) & (values < beyond))
    border = border[np.argsort(-values[border], kind="stable")]
    head = torch.from_numpy(values[border])
    above = mass[first - 1] if first else 0.0
    through = (above + head.double().cumsum(dim=0)).float()
    kept = border[_in_nucleus(head, through, top_p).numpy()]
    return torch.from_numpy(np.concatenate([np.flatnonzero(values >= beyond), kept]))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
