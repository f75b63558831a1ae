"""`localmoe run`: one question, one answer, made for pipes."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmoe.cli import options, prompt, settings, streams
from localmoe.cli.answer import Answer, Request, collect, guesses
from localmoe.cli.failure import INTERRUPTED, Failure, describe
from localmoe.cli.kept import Kept, turns_to_drop
from localmoe.errors import ContextOverflowError, LocalMoeError, StorageError, UsageError

if TYPE_CHECKING:
    from typing import TextIO

    from localmoe.cli.conversation import Conversation
    from localmoe.engine import Engine
    from localmoe.speculative import SpeculationStats
    from localmoe.text import Message, Segment

_JSON_KEYS = (
    "model, text, thinking, finish_reason (stop, length, interrupted), prompt_tokens, reused_tokens (found in a "
    "session), completion_tokens, prefill_seconds, decode_seconds, decode_tokens_per_second, speculation {drafter "
    "(mtp, lookup), drafts (at a time), passes, drafted_tokens, accepted_tokens, acceptance_rate} or null, with "
    "--logprobs also logprobs [{id, text, logprob, top [{id, text, logprob}]}], thinking included"
)


def run(
    model: options.Model,
    prompt_text: Annotated[
        str | None, typer.Argument(metavar="PROMPT", show_default=False, help="What to ask.")
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option("-f", "--file", metavar="FILE", show_default=False, help="Add a text file. May be repeated."),
    ] = None,
    max_tokens: options.MaxTokens = None,
    temp: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    logit_bias: options.LogitBias = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    system: options.System = None,
    session: options.Session = None,
    when_full: options.WhenFull = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text: no chat template, output byte for byte.")
    ] = False,
    schema: Annotated[
        Path | None,
        typer.Option("--schema", metavar="FILE", help="Answer in JSON that fulfils the JSON schema in FILE."),
    ] = None,
    grammar: Annotated[
        Path | None,
        typer.Option("--grammar", metavar="FILE", help="Answer in the language of a grammar (Lark or GBNF) in FILE."),
    ] = None,
    choice: Annotated[
        list[str] | None,
        typer.Option("--choice", metavar="TEXT", show_default=False, help="Answer with one of these. Repeat it."),
    ] = None,
    think: options.Think = None,
    show_thinking: Annotated[bool, typer.Option("--show-thinking", help="Send the thinking to stderr.")] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            "--logprobs",
            metavar="N",
            min=0,
            max=100,
            help="With --json: every token with its log probability, and the N likeliest at its place.",
        ),
    ] = None,
    think_to: Annotated[
        Path | None, typer.Option("--think-to", metavar="FILE", help="Write the thinking to a file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help(_JSON_KEYS))] = False,
    device: options.Device = "auto",
    kernels: options.KernelTier = "auto",
    threads: options.Threads = None,
    vram: options.Vram = None,
    ram: options.Ram = None,
    ctx: options.Context = None,
    cache_dtype: options.CacheDtype = "auto",
    mtp: options.Mtp = "0",
    deterministic: options.Deterministic = False,
    debug: options.Debug = False,
) -> None:
    """Ask MODEL one thing and print its answer, alone, on standard output.

    The prompt is PROMPT, a newline, then standard input less one final newline. The answer streams as it comes;
    statistics go to stderr when that is a terminal. The answer ends in a newline (with --raw, as it ends).
    --schema, --grammar and --choice hold the answer (not the thinking) to a form; status 1 when it was cut off.
    With --session NAME the question follows what was said under that name, and the answer is kept with it.
    """
    penalties = (repetition_penalty, presence_penalty, frequency_penalty)
    flags = options.SamplingFlags(temp, top_p, top_k, min_p, *penalties).given()
    bias = options.parse_bias(logit_bias)
    machine = options.machine(device, kernels, threads, vram, ram, ctx, cache_dtype)
    machine = replace(machine, mtp=options.parse_mtp(mtp))
    if raw and session is not None:
        raise UsageError("--session keeps a conversation, and --raw goes without one")
    if raw and (system is not None or think is not None or show_thinking or think_to is not None):
        raise UsageError("--raw goes without the chat template, so --system and the thinking options mean nothing")
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs: they are a part of the JSON object; add --json")
    options.check_stop(stop)
    constraint = _constraint(schema, grammar, choice)
    options.check_when_full(when_full)
    question = prompt.assemble(prompt_text, file or [], may_be_empty=raw)

    from localmoe.cli.opening import label, open_engine

    thoughts = None if think_to is None else _open_for_thinking(think_to)  # a wrong path is said before the work
    with Kept.open(session) as kept:
        conversation = kept.conversation(system)
        resolved, engine = open_engine(model, kept.machine(machine))
        with engine:
            kept.restore(engine, label(resolved))
            request = Request(
                sampling=settings.sampling(kept.flags(flags), resolved.name, engine.generation_defaults),
                max_tokens=max_tokens,
                seed=seed,
                stop=stop or (),
                thinking=think,
                logit_bias=bias,
                top_logprobs=logprobs,
                constraint=constraint,
            )
            request = kept.request(request)
            if kept.name is not None:
                _make_room(engine, conversation, question, think, kept.name, when_full)
            printer = _Printer(answer=not as_json, thinking=show_thinking)
            asked: str | list[Message] = question if raw else conversation.asking(question)
            answer = collect(engine, asked, request, printer.show, reuse_prefix=kept.name is not None)
            printer.finish(add_newline=not raw or streams.is_terminal(sys.stdout))
            failure = _unmet(answer) or _keep(kept, engine, label(resolved), conversation, question, answer, request)
            if thoughts is not None:
                _write_thinking(think_to, thoughts, answer.thinking)
            if as_json:
                streams.write_json(_as_json(label(resolved), answer, failure))
            streams.remark(statistics(answer, engine.max_context))
    if failure is not None:
        streams.tell(f"localmoe: {failure.message}")
        raise typer.Exit(failure.exit_code)
    if answer.finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _open_for_thinking(path: Path) -> TextIO:
    """Raises StorageError where `path` cannot be written. An old file stays as it is until there is a new text."""
    try:
        return path.open("a", encoding="utf-8", errors="replace")
    except OSError as error:
        raise StorageError(f"--think-to: {path}: cannot be written: {error.strerror}") from error


def _constraint(schema: Path | None, grammar: Path | None, choice: list[str] | None) -> dict[str, Any]:
    """What the answer has to be, for `Engine.generate`. Raises UsageError for more than one, InputError for a file
    that cannot be read."""
    given = {"schema": schema, "grammar": grammar, "choice": choice}
    asked = {name: value for name, value in given.items() if value is not None}
    if len(asked) > 1:
        raise UsageError(f"--{' and --'.join(asked)}: an answer can be held to one of them")
    if choice is not None and "" in choice:
        raise UsageError("--choice: an empty text is no answer")
    return {name: prompt.read_file(value) if isinstance(value, Path) else value for name, value in asked.items()}


def _unmet(answer: Answer) -> Failure | None:
    """The failure of an answer that ended before it was what it had to be."""
    if answer.fulfils_grammar is not False or answer.finish_reason == "interrupted":
        return None
    why = "it was cut off" if answer.finish_reason == "length" else "it ended too early"
    more = "; allow more tokens with -n or --ctx" if answer.finish_reason == "length" else ""
    return Failure("grammar", f"the answer does not fulfil what was asked of it: {why}{more}", 1)


def _make_room(
    engine: Engine, conversation: Conversation, question: str, thinking: bool | None, name: str, when_full: str | None
) -> None:
    """Let go of a session's oldest turns where it no longer fits, if that was asked for."""
    used = len(engine.prompt_ids(conversation.asking(question), thinking=thinking))
    if used < engine.max_context:
        return
    count = turns_to_drop(engine, conversation, question, thinking)
    full = f"session {name} and the prompt have {used:,} tokens and the context holds {engine.max_context:,}"
    if not count:
        raise ContextOverflowError(f"{full}; even alone the prompt is too long: shorten it")
    if when_full != "drop":
        raise ContextOverflowError(
            f"{full}; --when-full drop lets go of the oldest {count} of {len(conversation.turns)} turns"
        )
    conversation.drop_oldest(count)
    streams.remark(f"the context is full: dropped the oldest {count} turns, {len(conversation.turns)} are left")


def _keep(
    kept: Kept, engine: Engine, name: str, conversation: Conversation, question: str, answer: Answer, request: Request
) -> Failure | None:
    """Write the session with its new turn; what went wrong, if something did. An answer that was interrupted is asked
    for again, so it is no turn."""
    if kept.name is None or answer.finish_reason == "interrupted" or not answer.text:
        return None
    conversation.add(question, answer.text)
    seed = None if request.seed is None else (request.seed + 1) % (1 << 63)
    try:
        kept.save(engine, name, conversation, replace(request, seed=seed))
    except LocalMoeError as error:
        return describe(error)
    return None


def _write_thinking(path: Path | None, file: TextIO, text: str) -> None:
    try:
        with file:
            if file.seekable():
                file.truncate(0)
            file.write(text if text.endswith("\n") or not text else text + "\n")
    except OSError as error:
        raise StorageError(f"--think-to: {path}: cannot be written: {error.strerror}") from error


def statistics(answer: Answer, max_context: int) -> str:
    """One line for the person at the terminal."""
    parts = [f"{answer.completion_tokens} tokens"]
    if answer.decode_tokens_per_second is not None:
        parts[0] += f", {answer.decode_tokens_per_second:.1f} tokens/s"
    if answer.prefill_seconds is not None:
        parts.append(f"prompt {answer.prompt_tokens} tokens, {answer.prefill_seconds:.2f} s")
        if answer.finish_reason == "length":
            used = answer.prompt_tokens + answer.completion_tokens
            parts.append(f"the context of {max_context} is full" if used >= max_context else "stopped by -n")
    if answer.speculation is not None:
        parts.append(guesses(answer.speculation))
    if answer.finish_reason == "interrupted":
        parts.append("interrupted")
    return " · ".join(parts)


def _as_json(model: str, answer: Answer, failure: Failure | None) -> dict[str, Any]:
    error = {} if failure is None else {"error": {"kind": failure.kind, "message": failure.message}}
    logprobs = {} if answer.logprobs is None else {"logprobs": answer.logprobs}
    return {
        "model": model,
        "text": answer.text,
        "thinking": answer.thinking or None,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "reused_tokens": answer.reused_tokens,
        "completion_tokens": answer.completion_tokens,
        "prefill_seconds": answer.prefill_seconds,
        "decode_seconds": answer.decode_seconds,
        "decode_tokens_per_second": answer.decode_tokens_per_second,
        "speculation": None if answer.speculation is None else _speculation(answer.speculation),
        **logprobs,
        **error,
    }


def _speculation(stats: SpeculationStats) -> dict[str, Any]:
    return asdict(stats) | {"acceptance_rate": stats.acceptance_rate}


class _Printer:
    """Sends the answer to standard output and the thinking to standard error, or drops them."""

    def __init__(self, *, answer: bool, thinking: bool) -> None:
        self._answer = answer
        self._thinking = thinking
        self._last = {"answer": "\n", "thinking": "\n"}

    def show(self, segment: Segment) -> None:
        if segment.kind == "answer" and self._answer:
            self._end_thinking()
            streams.write(segment.text)
        elif segment.kind == "thinking" and self._thinking:
            streams.tell(segment.text, end="", faint=True)
        self._last[segment.kind] = segment.text[-1]

    def finish(self, *, add_newline: bool) -> None:
        self._end_thinking()
        if self._answer and add_newline and self._last["answer"] != "\n":
            streams.write("\n")

    def _end_thinking(self) -> None:
        if self._thinking and self._last["thinking"] != "\n":
            streams.tell("")
            self._last["thinking"] = "\n"
