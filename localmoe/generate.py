"""Prefill and decode, as a generator of typed steps.

T = tokens of a pass, V = vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from localmoe.errors import ContextOverflowError, InputError, UsageError
from localmoe.model.kv_cache import LatentCache
from localmoe.sampling import SamplingParams, logprob, sample
from localmoe.text import StreamingDetokenizer, overlap

PREFILL_CHUNK = 512
"""Tokens of a prompt computed in one pass. Large enough that an expert meets a batch worth reading its weights
for (V2-Lite: 512 * 6 / 64 = 48 tokens an expert), small enough that activations stay in tens of MB and Ctrl-C is
noticed between passes."""


class LanguageModel(Protocol):
    """What generation needs of a model: `localmoe.model.deepseek.Model`, or a fake in tests."""

    def forward(self, token_ids: Tensor, cache: LatentCache, *, last_only: bool = False) -> Tensor:
        """Logits float32 [T, V], or [1, V] of the last token; `cache` then holds the tokens."""
        ...


@dataclass(frozen=True)
class Stats:
    """What one generation took. Only the model's own time counts, not the time a reader takes between steps."""

    prompt_tokens: int
    completion_tokens: int  # every token drawn, a final end token included
    prefill_seconds: float  # until the first token's logits
    decode_seconds: float  # for all tokens after the first
    reused_tokens: int = 0  # of the prompt, found in the cache

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens computed (not those reused) per second."""
        computed = self.prompt_tokens - self.reused_tokens
        return computed / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first per second; 0 when there was one token only."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True)
class Step:
    """One token drawn.

    `text` is what became certain with it: empty while a character or a possible stop string is unfinished,
    and for an end token. `logprob` is under the model's own distribution (`sampling.logprob`).
    """

    token_id: int
    text: str
    logprob: float
    finish_reason: Literal["stop", "length"] | None = None  # on the last step
    stats: Stats | None = None  # on the last step


@dataclass(frozen=True)
class Settings:
    """How to generate. `max_tokens` None: until the context is full. `seed` None: a new one each time."""

    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise UsageError(f"seed must be between 0 and 2**63 - 1, not {self.seed}")
        if not all(isinstance(word, str) and word for word in self.stop):
            raise UsageError("a stop string must be a text of at least one character")


class CachedTokens:
    """A latent cache and the ids of the tokens in it, so that a prompt with the same beginning can go on there."""

    def __init__(self, cache: LatentCache) -> None:
        self._cache = cache
        self._ids: list[int] = []
        self._turn = 0

    @property
    def capacity(self) -> int:
        """Tokens it can hold."""
        return self._cache.capacity

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What it holds."""
        return tuple(self._ids)

    def begin(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """Keep what `token_ids` begins with and forget the rest. Returns (tokens kept, turn).

        At least the last token is left to compute: its logits are wanted. `turn` is to be given to `extend`.
        """
        # An interrupt may have come between the model's pass and our note of it
        held = min(len(self._ids), self._cache.length)
        longest = min(held, len(token_ids) - 1)
        kept = next((n for n in range(longest) if self._ids[n] != token_ids[n]), longest)
        self._cache.truncate(kept)
        del self._ids[kept:]
        self._turn += 1
        return kept, self._turn

    def extend(self, model: LanguageModel, token_ids: Sequence[int], turn: int) -> Tensor:
        """Run the model over more tokens; float32 logits [V] of the last. Raises UsageError for an old turn."""
        if turn != self._turn:
            raise UsageError("another generation has begun on the same cache; finish one before the next")
        with torch.inference_mode():
            logits = model.forward(torch.tensor(token_ids), self._cache, last_only=True)  # [1, V]
        self._ids += token_ids
        return logits[-1]


def generate(
    model: LanguageModel,
    cached: CachedTokens,
    prompt_ids: Sequence[int],
    settings: Settings,
    *,
    end_ids: Collection[int] = (),
    detokenizer: StreamingDetokenizer | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Generator[Step]:
    """Continue `prompt_ids`, one step a token; the last step has a finish reason and the statistics.

    Tokens that `cached` already holds are not computed again. Closing the generator at any point, or an
    exception out of it, leaves `cached` fit for the next one. Without a detokenizer every text is empty.

    Raises, before anything is computed, InputError for an empty prompt, ContextOverflowError for one that
    leaves no room for an answer, UsageError for stop strings without a detokenizer.
    """
    if not prompt_ids:
        raise InputError("the prompt is empty; there is nothing to continue")
    room = cached.capacity - len(prompt_ids)
    if room < 1:
        raise ContextOverflowError(
            f"the prompt has {len(prompt_ids):,} tokens and the context holds {cached.capacity:,}, answer included; "
            "shorten the prompt or choose a larger --ctx"
        )
    if settings.stop and detokenizer is None:
        raise UsageError("stop strings need the model's tokenizer, and it has none")
    limit = room if settings.max_tokens is None else min(room, settings.max_tokens)
    answer = _Answer(detokenizer, settings.stop, frozenset(end_ids), limit)
    return _steps(model, cached, list(prompt_ids), settings, answer, prefill_chunk)


def _steps(
    model: LanguageModel,
    cached: CachedTokens,
    prompt_ids: list[int],
    settings: Settings,
    answer: _Answer,
    prefill_chunk: int,
) -> Generator[Step]:
    random = torch.Generator()
    random.seed() if settings.seed is None else random.manual_seed(settings.seed)
    started = time.perf_counter()
    reused, turn = cached.begin(prompt_ids)
    for start in range(reused, len(prompt_ids), prefill_chunk):
        logits = cached.extend(model, prompt_ids[start : start + prefill_chunk], turn)
    prefill_seconds = time.perf_counter() - started
    decode_seconds = 0.0
    while True:
        started = time.perf_counter()
        token_id = sample(logits, settings.sampling, random)
        text, finish_reason = answer.push(token_id)
        step = Step(token_id, text, logprob(logits, token_id), finish_reason)
        if answer.tokens > 1:
            decode_seconds += time.perf_counter() - started
        if finish_reason is not None:
            stats = Stats(len(prompt_ids), answer.tokens, prefill_seconds, decode_seconds, reused)
            yield Step(step.token_id, step.text, step.logprob, finish_reason, stats)
            return
        yield step
        started = time.perf_counter()
        logits = cached.extend(model, [token_id], turn)
        decode_seconds += time.perf_counter() - started


class _Answer:
    """Turns drawn tokens into text to show and says when it is over."""

    def __init__(
        self, detokenizer: StreamingDetokenizer | None, stop: tuple[str, ...], end_ids: frozenset[int], limit: int
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stop)
        self._end_ids = end_ids
        self._limit = limit
        self.tokens = 0

    def push(self, token_id: int) -> tuple[str, Literal["stop", "length"] | None]:
        """The text to show for this token, and why it is the last one if it is."""
        self.tokens += 1
        ended = token_id in self._end_ids
        text = "" if ended or self._detokenizer is None else self._stops.push(self._detokenizer.push(token_id))
        if not (ended or self._stops.found or self.tokens == self._limit):
            return text, None
        if self._detokenizer is not None and not self._stops.found:
            text += self._stops.push(self._detokenizer.finish()) + self._stops.finish()
        return text, "stop" if ended or self._stops.found else "length"


class StopStrings:
    """Cuts streamed text before the first stop string, which may come in pieces.

    Text that could be the beginning of one is held back until it is clear. Of several that match, the one that
    begins first counts, so the result does not depend on how the text was cut into tokens.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(words)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain not to be part of a stop string. Nothing more after `found`."""
        if self.found:
            return ""
        text = self._held + text
        starts = [start for word in self._words if (start := text.find(word)) >= 0]
        held = max((overlap(text, word) for word in self._words), default=0)
        if starts and min(starts) <= len(text) - held:
            self.found = True
            self._held = ""
            return text[: min(starts)]
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, when no more text comes; a stop string inside it still cuts."""
        starts = [start for word in self._words if (start := self._held.find(word)) >= 0]
        text = self._held[: min(starts)] if starts else self._held
        self.found = self.found or bool(starts)
        self._held = ""
        return text
