"""`localmoe run`: one question, one answer, made for pipes."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmoe.cli import asking, batch, model_argument, options, prompt, settings, speed, streams
from localmoe.cli.answer import Answer, Request, collect, guesses
from localmoe.cli.failure import INTERRUPTED
from localmoe.errors import StorageError, UsageError

if TYPE_CHECKING:
    from typing import BinaryIO, TextIO

    from localmoe.load import Engine
    from localmoe.speculative import SpeculationStats
    from localmoe.text import Segment

_JSON_KEYS = (
    "model, text, thinking, finish_reason (stop, length, interrupted), prompt_tokens, completion_tokens, "
    "prefill_seconds, decode_seconds, decode_tokens_per_second, speculation {drafter (mtp, lookup), drafts (at "
    "a time), passes, drafted_tokens, accepted_tokens, acceptance_rate} or null, with --logprobs also logprobs "
    "[{id, text, logprob, top [{id, text, logprob}]}], thinking included, with --explain-speed also " + speed.KEYS
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
    template: Annotated[
        str | None,
        typer.Option("--template", metavar="NAME", help="Fill in a saved prompt (localmoe templates) with the rest."),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", metavar="NAME=VALUE", show_default=False, help="What {NAME} is in the template."),
    ] = None,
    jsonl: Annotated[
        str | None,
        typer.Option("--jsonl", metavar="FILE|-", help="Answer many prompts, one JSON text or object a line."),
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
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text: no chat template, output byte for byte.")
    ] = False,
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
    explain_speed: options.ExplainSpeed = False,
    yes: options.Yes = False,
    debug: options.Debug = False,
) -> None:
    """Ask MODEL one thing and print its answer, alone, on standard output.

    The prompt is PROMPT, a newline, then standard input less one final newline. The answer streams as it comes;
    statistics go to stderr when that is a terminal. The answer ends in a newline (with --raw, as it ends).

    With --jsonl each line is a JSON text or an object: prompt or messages, and if wanted id, system, params, seed,
    stop, think, max_tokens, temperature and the like. Each answer is an object with line, id and the keys of --json
    but model, in the order of the lines, written when it is done; what is wrong with a line is an object with error,
    the others go on, and the exit status is 1 at the end. PROMPT, files and a template stand above every line.
    """
    model, prompt_text = model_argument.with_prompt(model, prompt_text)
    penalties = (repetition_penalty, presence_penalty, frequency_penalty)
    flags = options.SamplingFlags(temp, top_p, top_k, min_p, *penalties).given()
    bias = options.parse_bias(logit_bias)
    machine = options.machine(device, kernels, threads, vram, ram, ctx, cache_dtype)
    machine = replace(machine, mtp=options.parse_mtp(mtp), deterministic=deterministic)
    if raw and (system is not None or think is not None or show_thinking or think_to is not None):
        raise UsageError("--raw goes without the chat template, so --system and the thinking options mean nothing")
    if logprobs is not None and not as_json and jsonl is None:
        raise UsageError("--logprobs: they are a part of the JSON object; add --json")
    options.check_stop(stop)
    form = asking.form(raw, system, template, param)
    if jsonl is not None and (as_json or think_to is not None or show_thinking):
        raise UsageError("--jsonl: each answer is a JSON object with its thinking; leave out what else asks for them")
    text = prompt.assemble(
        prompt_text, file or [], may_be_empty=raw, needed=form.needs_text and jsonl is None, reads_input=jsonl is None
    )
    asked = "" if jsonl is not None else form.ask(text)
    lines = None if jsonl is None else batch.open_lines(jsonl)  # a wrong path is said before the work

    from localmoe.cli.opening import label, open_engine

    thoughts = None if think_to is None else _open_for_thinking(think_to)  # a wrong path is said before the work
    resolved, engine = open_engine(model, machine, yes=yes)
    with engine:
        request = Request(
            sampling=settings.sampling(flags, resolved.name, engine.generation_defaults),
            max_tokens=max_tokens,
            seed=seed,
            stop=stop or (),
            thinking=None if raw else settings.thinking(think, "run", engine, form.wishes_thinking),
            logit_bias=bias,
            top_logprobs=logprobs,
        )
        if lines is not None:
            _answer_lines(engine, lines, batch.Shared(text, form, request, _record))
            return
        printer = _Printer(answer=not as_json, thinking=show_thinking)
        timed = speed.timer(engine) if explain_speed else None
        answer = collect(engine, asked, request, printer.show, timed=timed)
        printer.finish(add_newline=not raw or streams.is_terminal(sys.stdout))
        if thoughts is not None:
            _write_thinking(think_to, thoughts, answer.thinking)
        why = {} if timed is None else {"speed": speed.of_answer(engine, timed, answer)}
        if as_json:
            explained = {key: speed.as_json(value) for key, value in why.items()}
            streams.write_json({"model": label(resolved), **_record(answer)} | explained)
        streams.remark(statistics(answer, engine.max_context))
        if why and not as_json:
            speed.tell(why["speed"])
    if answer.finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _answer_lines(engine: Engine, lines: tuple[BinaryIO, int], shared: batch.Shared) -> None:
    with lines[0] as file:
        tally = batch.answer_lines(engine, file, lines[1], shared)
    streams.remark(str(tally))
    if tally.interrupted:
        raise typer.Exit(INTERRUPTED)
    if tally.failed:
        streams.tell(f"localmoe: {tally.failed} of {tally.done} lines failed; their objects have an error")
        raise typer.Exit(1)


def _open_for_thinking(path: Path) -> TextIO:
    """Raises StorageError where `path` cannot be written. An old file stays as it is until there is a new text."""
    try:
        return path.open("a", encoding="utf-8", errors="replace")
    except OSError as error:
        raise StorageError(f"--think-to: {path}: cannot be written: {error.strerror}") from error


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


def _record(answer: Answer) -> dict[str, Any]:
    logprobs = {} if answer.logprobs is None else {"logprobs": answer.logprobs}
    return {
        "text": answer.text,
        "thinking": answer.thinking or None,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "prefill_seconds": answer.prefill_seconds,
        "decode_seconds": answer.decode_seconds,
        "decode_tokens_per_second": answer.decode_tokens_per_second,
        "speculation": None if answer.speculation is None else _speculation(answer.speculation),
        **logprobs,
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
