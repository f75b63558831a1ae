"""Prefill and decode, as a generator of typed steps.

T = tokens of a pass, V = vocabulary.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from localmoe.draft_length import DraftLength
from localmoe.errors import ContextOverflowError, InputError, UsageError
from localmoe.grammar import Grammar
from localmoe.model.deepseek import PREFILL_CHUNK
from localmoe.sampling import History, SamplingParams, logprob, sample, top_logprobs
from localmoe.session import CachedTokens, LanguageModel
from localmoe.speculative import SpeculationStats
from localmoe.text import StreamingDetokenizer, overlap


@dataclass(frozen=True)
class Stats:
    """What one generation took. Only the model's own time counts, not the time a reader takes between steps."""

    prompt_tokens: int
    completion_tokens: int  # every token drawn, a final end token included
    prefill_seconds: float  # until the first token's logits
    decode_seconds: float  # for all tokens after the first
    reused_tokens: int = 0  # of the prompt, found in the cache
    speculation: SpeculationStats | None = None  # where tokens could be guessed
    sampling_seconds: float = 0.0  # of the decode's: drawing tokens and turning them into text
    fulfils_grammar: bool | None = None  # where there was one; an answer that was cut off does not

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

    `text` is what became certain with it: empty while a character or a possible stop string is unfinished, and for
    tokens that are no text, an end token or another control token. `logprob` is under the model's own distribution
    (`sampling.logprob`), and so are those of `top`, the likeliest tokens at this place, as many as were asked for.
    """

    token_id: int
    text: str
    logprob: float
    finish_reason: Literal["stop", "length"] | None = None  # on the last step
    stats: Stats | None = None  # on the last step
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob)


@dataclass(frozen=True)
class Settings:
    """How to generate. `max_tokens` None: until the context is full. `seed` None: a new one each time. `top_logprobs`
    is how many of the likeliest tokens each step names. `grammar` is what the answer has to be, from its beginning or,
    with `grammar_after`, from behind that text on (thinking is free)."""

    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    grammar: Grammar | None = None
    grammar_after: str = ""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise UsageError(f"seed must be between 0 and 2**63 - 1, not {self.seed}")
        if not all(isinstance(word, str) and word for word in self.stop):
            raise UsageError("a stop string must be a text of at least one character")
        if self.top_logprobs < 0:
            raise UsageError(f"top_logprobs must be 0 or more, not {self.top_logprobs}")


def generate(
    model: LanguageModel,
    cached: CachedTokens,
    prompt_ids: Sequence[int],
    settings: Settings,
    *,
    end_ids: Collection[int] = (),
    detokenizer: StreamingDetokenizer | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    lengths: DraftLength | None = None,
) -> Generator[Step]:
    """Continue `prompt_ids`, one step a token; the last step has a finish reason and the statistics.

    Tokens that `cached` already holds are not computed again. Closing the generator at any point, or an
    exception out of it, leaves `cached` fit for the next one. Without a detokenizer every text is empty. With a
    drafter in `cached`, `lengths` says how many tokens it guesses at a time; the steps are the same ones.

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
    if (settings.stop or settings.grammar) and detokenizer is None:
        raise UsageError("stop strings and grammars need the model's tokenizer, and it has none")
    limit = room if settings.max_tokens is None else min(room, settings.max_tokens)
    answer = _Answer(detokenizer, settings.stop, frozenset(end_ids), limit)
    passes = _Passes(model, cached, settings, lengths if cached.drafter is not None else None)
    return _steps(passes, list(prompt_ids), settings, answer, prefill_chunk)


class _Passes:
    """The model's passes of one generation, and the tokens drawn from their logits."""

    def __init__(
        self, model: LanguageModel, cached: CachedTokens, settings: Settings, lengths: DraftLength | None
    ) -> None:
        self._model = model
        self._cached = cached
        self._params = settings.sampling
        self._seed = secrets.randbits(63) if settings.seed is None else settings.seed
        self._lengths = lengths
        self._constraint = None if settings.grammar is None else _Constraint(settings.grammar, settings.grammar_after)
        self._history: History | None = None
        self._turn = self._position = 0
        self._drafts: list[int] = []  # draft i was guessed to be drawn from row i
        self._count = self._drafted = self._accepted = 0
        self._seconds = 0.0  # that the last pass took

    def prefill(self, prompt_ids: list[int], chunk: int) -> tuple[Tensor, int]:
        """Logits [1, V] after the prompt, and how many of its tokens were not computed again."""
        reused, self._turn = self._cached.begin(prompt_ids)
        for start in range(reused, len(prompt_ids), chunk):
            rows = self._cached.extend(self._model, prompt_ids[start : start + chunk], self._turn)
        self._position = len(prompt_ids)
        if self._params.uses_history:
            self._history = History(rows.shape[1], prompt_ids)
        return rows, reused

    def draw(self, logits: Tensor, place: int) -> tuple[int, bool]:
        """The token drawn from row `place` of a pass, logits [V], and whether it was guessed, so that the next row
        counts."""
        if self._constraint is not None:
            logits = self._constraint.masked(logits)
        token_id = sample(logits, self._params, seed=self._seed, position=self._position, history=self._history)
        if self._constraint is not None:
            self._constraint.accept(token_id)
        self._position += 1
        if self._history is not None:
            self._history.add(token_id)
        return token_id, place < len(self._drafts) and token_id == self._drafts[place]

    def settle(self, accepted: int) -> None:
        """Take the wrong guesses back: only the first `accepted` were right."""
        self._cached.forget(len(self._drafts) - accepted, self._turn)
        self._accepted += accepted

    def next(self, token_id: int, most: int) -> Tensor:
        """Compute `token_id` and what is guessed to follow it, `most` tokens at most; a row of logits for each."""
        started = time.perf_counter()
        wanted, guessing = 0, False
        if self._lengths is not None:
            wanted, guessing = min(self._lengths.next(), most), not self._lengths.rests
        self._drafts = self._cached.draft(token_id, wanted, self._guess, self._turn) if wanted else []
        if self._constraint is not None:
            self._drafts = self._constraint.fitting(self._drafts)
        self._count += 1
        self._drafted += len(self._drafts)
        tokens = [token_id, *self._drafts]
        rows = self._cached.extend(self._model, tokens, self._turn, every=True, guessing=guessing)
        self._seconds = time.perf_counter() - started
        return rows

    def learn(self, accepted: int) -> None:
        """What the pass before took and gave decides how many tokens are guessed from now on."""
        if self._lengths is not None and self._count:
            self._lengths.record(len(self._drafts), accepted, self._seconds)

    @property
    def stats(self) -> SpeculationStats | None:
        if self._lengths is None or self._cached.drafter is None:
            return None
        name, best = self._cached.drafter.name, self._lengths.best
        return SpeculationStats(name, self._count, self._drafted, self._accepted, best)

    def _guess(self, logits: Tensor, ahead: int) -> int:
        """What is drawn from a drafter's logits, with the random numbers of the model's own draw there."""
        if self._constraint is not None:
            logits = self._constraint.masked(logits)
        token_id = sample(logits, self._params, seed=self._seed, position=self._position + ahead, history=self._history)
        if self._constraint is not None:
            self._constraint.suppose(token_id)
        return token_id

    @property
    def fulfils_grammar(self) -> bool | None:
        return None if self._constraint is None else self._constraint.is_met

    def heard(self, text: str) -> bool:
        """Take note of the answer's text; whether a grammar says that it is over."""
        return self._constraint is not None and self._constraint.heard(text)


class _Constraint:
    """A grammar along one answer: in force from a certain text on, tried out on guesses and taken back."""

    def __init__(self, grammar: Grammar, after: str) -> None:
        self._matcher = grammar.start()
        self._after = after  # empty once it was there
        self._tail = ""
        self._supposed = 0

    def masked(self, logits: Tensor) -> Tensor:
        """Logits [V], -inf where the grammar does not allow the token. Raises InputError where it allows none."""
        if self._after or self._matcher.is_over:
            return logits
        allowed = self._matcher.allowed()
        if not bool((allowed & (logits != -math.inf)).any()):
            raise InputError("no token that the grammar allows here is possible")
        return logits.masked_fill(~allowed, -math.inf)

    def accept(self, token_id: int) -> None:
        """The token was drawn."""
        if not self._after and not self._matcher.is_over and not self._matcher.accept(token_id):
            raise InputError("no token that the grammar allows here is possible: a logit bias forbids it")

    def suppose(self, token_id: int) -> None:
        """The token was guessed."""
        if not self._after and not self._matcher.is_over and self._matcher.accept(token_id):
            self._supposed += 1

    def fitting(self, guesses: list[int]) -> list[int]:
        """The guesses as far as the grammar allows them; what was supposed is taken back."""
        self._matcher.back(self._supposed)
        self._supposed = 0
        return guesses if self._after else guesses[: self._matcher.fitting(guesses)]

    @property
    def is_met(self) -> bool:
        """Whether the answer may end here."""
        return not self._after and self._matcher.is_complete

    def heard(self, text: str) -> bool:
        """Take note of the answer's text; whether nothing may follow."""
        if self._after:
            self._tail += text
            if self._after in self._tail:
                self._after = ""
            self._tail = self._tail[-len(self._after) :]
            return False
        return self._matcher.is_over


def _steps(
    passes: _Passes, prompt_ids: list[int], settings: Settings, answer: _Answer, prefill_chunk: int
) -> Generator[Step]:
    started = time.perf_counter()
    rows, reused = passes.prefill(prompt_ids, prefill_chunk)
    prefill_seconds = time.perf_counter() - started
    decode_seconds = sampling_seconds = 0.0
    while True:
        for place, logits in enumerate(rows):
            started = time.perf_counter()
            token_id, guessed = passes.draw(logits, place)
            text, finish_reason = answer.push(token_id)
            if passes.heard(text) and finish_reason != "stop":
                text, finish_reason = text + answer.finish(), "stop"
            top = top_logprobs(logits, settings.top_logprobs) if settings.top_logprobs else ()
            step = Step(token_id, text, logprob(logits, token_id), finish_reason, top=top)
            if finish_reason is not None or not guessed:
                passes.settle(place)
            spent = time.perf_counter() - started
            if answer.tokens > 1:
                decode_seconds += spent
                sampling_seconds += spent
            if finish_reason is not None:
                stats = Stats(
                    len(prompt_ids),
                    answer.tokens,
                    prefill_seconds,
                    decode_seconds,
                    reused,
                    passes.stats,
                    sampling_seconds,
                    passes.fulfils_grammar,
                )
                yield replace(step, stats=stats)
                return
            yield step
            if not guessed:
                break
        started = time.perf_counter()
        passes.learn(place)
        rows = passes.next(token_id, answer.limit - answer.tokens - 1)
        decode_seconds += time.perf_counter() - started


class _Answer:
    """Turns drawn tokens into text to show and says when it is over."""

    def __init__(
        self, detokenizer: StreamingDetokenizer | None, stop: tuple[str, ...], end_ids: frozenset[int], limit: int
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stop)
        self._end_ids = end_ids
        self.limit = limit
        self.tokens = 0

    def push(self, token_id: int) -> tuple[str, Literal["stop", "length"] | None]:
        """The text to show for this token, and why it is the last one if it is."""
        self.tokens += 1
        ended = token_id in self._end_ids
        text = "" if ended or self._detokenizer is None else self._stops.push(self._detokenizer.push(token_id))
        if not (ended or self._stops.found or self.tokens == self.limit):
            return text, None
        text += self.finish()
        return text, "stop" if ended or self._stops.found else "length"

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if self._detokenizer is None or self._stops.found:
            return ""
        return self._stops.push(self._detokenizer.finish()) + self._stops.finish()


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
