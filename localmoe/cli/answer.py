"""One answer as it comes: its text told apart from its thinking, and what it took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from localmoe.errors import TemplateError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from localmoe.engine import Engine
    from localmoe.explain import PartTimer
    from localmoe.generate import Stats, Step
    from localmoe.speculative import SpeculationStats
    from localmoe.text import Message, Segment, ThinkingSplitter

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Request:
    """How to answer. `sampling` holds the settings that `cli.settings` names; `top_logprobs` None asks for none."""

    sampling: dict[str, float]
    max_tokens: int | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    thinking: bool | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    constraint: Mapping[str, Any] = field(default_factory=dict)
    """`schema`, `grammar` or `choice`, as `Engine.generate` takes them."""


@dataclass
class Answer:
    """What the model said, and how long it took. `prefill_seconds` is None when no token came, `logprobs` when they
    were not asked for, `speculation` when nothing was to be guessed or the answer was interrupted."""

    text: str = ""
    thinking: str = ""
    finish_reason: FinishReason = "interrupted"
    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, found in the latent cache
    completion_tokens: int = 0
    prefill_seconds: float | None = None
    decode_seconds: float = 0.0
    decode_tokens_per_second: float | None = None
    logprobs: list[dict[str, Any]] | None = None
    speculation: SpeculationStats | None = None
    fulfils_grammar: bool | None = None
    sampling_seconds: float = 0.0
    thinking_tokens: int = 0
    thinking_seconds: float = 0.0

    def add(self, segment: Segment) -> None:
        """Append a piece to the part it belongs to."""
        if segment.kind == "thinking":
            self.thinking += segment.text
        else:
            self.text += segment.text


def splitter(engine: Engine, prompt: str | Sequence[Message], thinking: bool | None) -> ThinkingSplitter | None:
    """What tells thinking from answer after `prompt`; None for a text prompt, which is continued as it is.

    Raises TemplateError when the model has no chat template, UsageError when it cannot do what `thinking` asks.
    """
    from localmoe.text import ThinkingSplitter

    if isinstance(prompt, str):
        return None
    template = engine.chat_template
    if template is None:
        raise TemplateError(f"{engine.path.name} has no chat template; `run --raw` continues text without one")
    if thinking is not None and not template.switches_thinking:
        flag = "--think" if thinking else "--no-think"
        raise UsageError(f"{flag}: this model's chat template has no switch for thinking; leave the option out")
    return ThinkingSplitter.after(template.render(prompt, thinking=thinking))


def collect(
    engine: Engine,
    prompt: str | Sequence[Message],
    request: Request,
    show: Callable[[Segment], None],
    *,
    reuse_prefix: bool = False,
    into: Answer | None = None,
    timed: PartTimer | None = None,
) -> Answer:
    """Generate an answer, passing each piece to `show` as it comes.

    Ctrl-C ends the answer, not the program: what came so far is returned, its finish_reason "interrupted". `into` is
    the answer to fill, for a `show` that wants to see its counts; `timed` is told of the first token.
    """
    from localmoe.text import Segment

    answer = Answer() if into is None else into
    if request.top_logprobs is not None:
        answer.logprobs = []
    split = splitter(engine, prompt, request.thinking)

    def give(segments: Sequence[Segment]) -> None:
        for segment in segments:
            answer.add(segment)
            show(segment)

    started = time.perf_counter()
    try:
        for step in _steps(engine, prompt, request, reuse_prefix):
            now = time.perf_counter() - started
            answer.completion_tokens += 1
            if answer.prefill_seconds is None:
                answer.prefill_seconds = now
                if timed is not None:
                    timed.first_token()
            answer.decode_seconds = now - answer.prefill_seconds
            if answer.logprobs is not None:
                answer.logprobs.append(_logprobs(engine, step))
            if split is not None and split.is_thinking:
                answer.thinking_tokens += 1
                answer.thinking_seconds = answer.decode_seconds
            give(split.push(step.text) if split else [Segment("answer", step.text)] if step.text else [])
            if step.finish_reason is not None:
                answer.finish_reason = step.finish_reason
            if step.stats is not None:
                _take(answer, step.stats)
        give(split.finish() if split else [])
    except KeyboardInterrupt:
        answer.finish_reason = "interrupted"
        answer.prompt_tokens = len(engine.prompt_ids(prompt, thinking=request.thinking))
    if answer.decode_tokens_per_second is None and answer.completion_tokens > 1 and answer.decode_seconds > 0:
        # The first token comes out of the prefill.
        answer.decode_tokens_per_second = (answer.completion_tokens - 1) / answer.decode_seconds
    return answer


def _steps(engine: Engine, prompt: str | Sequence[Message], request: Request, reuse_prefix: bool) -> Iterator[Step]:
    sampling: dict[str, Any] = request.sampling | {"top_k": int(request.sampling["top_k"])}
    return engine.generate(
        prompt,
        max_tokens=request.max_tokens,
        seed=request.seed,
        stop=tuple(request.stop),
        thinking=request.thinking,
        reuse_prefix=reuse_prefix,
        logit_bias=request.logit_bias,
        top_logprobs=request.top_logprobs or 0,
        **sampling,
        **request.constraint,
    )


def _logprobs(engine: Engine, step: Step) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {"id": token_id, "text": engine.tokenizer.decode([token_id]), "logprob": logprob}

    return entry(step.token_id, step.logprob) | {"top": [entry(*each) for each in step.top]}


def _take(answer: Answer, stats: Stats) -> None:
    answer.prompt_tokens = stats.prompt_tokens
    answer.reused_tokens = stats.reused_tokens
    answer.completion_tokens = stats.completion_tokens
    answer.prefill_seconds = stats.prefill_seconds
    answer.decode_seconds = stats.decode_seconds
    answer.decode_tokens_per_second = stats.decode_tokens_per_second
    answer.speculation = stats.speculation
    answer.fulfils_grammar = stats.fulfils_grammar
    answer.sampling_seconds = stats.sampling_seconds


def guesses(speculation: SpeculationStats) -> str:
    """What guessing did, in words."""
    if speculation.acceptance_rate is None:
        return f"{speculation.drafter}: nothing guessed"
    counted = f"{speculation.accepted_tokens} of {speculation.drafted_tokens} guesses"
    now = f"{speculation.drafts} at a time" if speculation.drafts else "none now"
    return f"{speculation.drafter}: {counted} right ({speculation.acceptance_rate:.0%}), {now}"


def unmet(answer: Answer) -> str | None:
    """What is wrong with an answer that ended before it was what a schema, grammar or choice asks, if that is so."""
    if answer.fulfils_grammar is not False or answer.finish_reason == "interrupted":
        return None
    why = "it was cut off" if answer.finish_reason == "length" else "it ended too early"
    more = "; allow more tokens with -n or --ctx" if answer.finish_reason == "length" else ""
    return f"the answer does not fulfil what was asked of it: {why}{more}"
