"""`localmoe run`: one question, one answer, made for pipes."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmoe.cli import asking, batch, model_argument, options, prompt, settings, speed, streams, units
from localmoe.cli.answer import Answer, collect, guesses, unmet
from localmoe.cli.conversation import Turn
from localmoe.cli.failure import INTERRUPTED, Failure, describe
from localmoe.cli.kept import Kept, turns_to_drop
from localmoe.cli.option_groups import AnswerOptions, EngineOptions, grouped
from localmoe.errors import ContextOverflowError, LocalMoeError, StorageError, UsageError

if TYPE_CHECKING:
    from typing import BinaryIO, TextIO

    from localmoe.cli.answer import Request
    from localmoe.cli.conversation import Conversation
    from localmoe.engine import Engine
    from localmoe.speculative import SpeculationStats
    from localmoe.text import Message, Segment

_JSON_KEYS = (
    "model, text, thinking, finish_reason (stop, length, interrupted), prompt_tokens, reused_tokens (found in a "
    "session), completion_tokens, prefill_seconds, decode_seconds, decode_tokens_per_second, speculation {drafter "
    "(mtp, lookup), drafts (at a time), passes, drafted_tokens, accepted_tokens, acceptance_rate} or null, with "
    "--logprobs also logprobs [{id, text, logprob, top [{id, text, logprob}]}], thinking included, with "
    "--explain-speed also " + speed.KEYS
)


@dataclass(frozen=True)
class Asked:
    """What to ask."""

    prompt_text: Annotated[str | None, typer.Argument(metavar="PROMPT", show_default=False, help="What to ask.")] = None
    file: Annotated[
        list[Path] | None,
        typer.Option("-f", "--file", metavar="FILE", show_default=False, help="Add a text file. May be repeated."),
    ] = None
    template: Annotated[
        str | None,
        typer.Option("--template", metavar="NAME", help="Fill in a saved prompt (localmoe templates) with the rest."),
    ] = None
    param: Annotated[
        list[str] | None,
        typer.Option("--param", metavar="NAME=VALUE", show_default=False, help="What {NAME} is in the template."),
    ] = None
    jsonl: Annotated[
        str | None,
        typer.Option("--jsonl", metavar="FILE|-", help="Answer many prompts, one JSON text or object a line."),
    ] = None


@dataclass(frozen=True)
class Form:
    """What the answer has to be."""

    raw: Annotated[bool, typer.Option("--raw", help="Continue the text: no chat template, output byte for byte.")] = (
        False
    )
    schema: Annotated[
        Path | None,
        typer.Option("--schema", metavar="FILE", help="Answer in JSON that fulfils the JSON schema in FILE."),
    ] = None
    grammar: Annotated[
        Path | None,
        typer.Option("--grammar", metavar="FILE", help="Answer in the language of a grammar (Lark or GBNF) in FILE."),
    ] = None
    choice: Annotated[
        list[str] | None,
        typer.Option("--choice", metavar="TEXT", show_default=False, help="Answer with one of these. Repeat it."),
    ] = None

    def constraint(self) -> dict[str, Any]:
        """For `Engine.generate`. Raises UsageError for more than one, InputError for a file that cannot be read."""
        given = {"schema": self.schema, "grammar": self.grammar, "choice": self.choice}
        asked = {name: value for name, value in given.items() if value is not None}
        if len(asked) > 1:
            raise UsageError(f"--{' and --'.join(asked)}: an answer can be held to one of them")
        if self.choice is not None and "" in self.choice:
            raise UsageError("--choice: an empty text is no answer")
        return {name: prompt.read_file(value) if isinstance(value, Path) else value for name, value in asked.items()}


@dataclass(frozen=True)
class Shown:
    """What is shown of the answer, and where."""

    think: options.Think = None
    show_thinking: Annotated[bool, typer.Option("--show-thinking", help="Send the thinking to stderr.")] = False
    logprobs: Annotated[
        int | None,
        typer.Option(
            "--logprobs",
            metavar="N",
            min=0,
            max=100,
            help="With --json: every token with its log probability, and the N likeliest at its place.",
        ),
    ] = None
    think_to: Annotated[
        Path | None, typer.Option("--think-to", metavar="FILE", help="Write the thinking to a file.")
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help(_JSON_KEYS))] = False

    @property
    def thinking(self) -> bool:
        """Whether the thinking goes anywhere."""
        return self.show_thinking or self.think_to is not None


@grouped
def run(
    model: options.Model,
    asked: Asked,
    wanted: AnswerOptions,
    form: Form,
    shown: Shown,
    on: EngineOptions,
    explain_speed: options.ExplainSpeed = False,
    yes: options.Yes = False,
    debug: options.Debug = False,
) -> None:
    """Ask MODEL one thing and print its answer, alone, on standard output.

    The prompt is PROMPT, a newline, then standard input less one final newline. The answer streams as it comes;
    statistics go to stderr when that is a terminal. The answer ends in a newline (with --raw, as it ends).
    --schema, --grammar and --choice hold the answer (not the thinking) to a form; status 1 when it was cut off.
    With --session NAME the question follows what was said under that name, and the answer is kept with it.

    With --jsonl each line is a JSON text or an object: prompt or messages, and if wanted id, system, params, seed,
    stop, think, max_tokens, temperature and the like. Each answer is an object with line, id and the keys of --json
    but model, in the order of the lines, written when it is done; what is wrong with a line is an object with error,
    the others go on, and the exit status is 1 at the end. PROMPT, files and a template stand above every line.
    """
    model, prompt_text = model_argument.with_prompt(model, asked.prompt_text)
    machine = on.machine()
    wanted.check()
    _refuse_what_raw_leaves_out(form, asked, wanted, shown)
    _refuse_what_needs_or_has_json(asked, shown, explain_speed)
    constraint = form.constraint()
    filled = asking.form(form.raw, wanted.system, asked.template, asked.param)
    alone = asked.jsonl is None
    text = prompt.assemble(
        prompt_text, asked.file or [], may_be_empty=form.raw, needed=filled.needs_text and alone, reads_input=alone
    )
    question = filled.ask(text) if alone else ""
    lines = None if asked.jsonl is None else batch.open_lines(asked.jsonl)  # a wrong path is said before the work

    from localmoe.cli.opening import label, open_engine

    thoughts = None if shown.think_to is None else _open_for_thinking(shown.think_to)  # and so is this one
    with Kept.open(wanted.session) as kept:
        resolved, engine = open_engine(model, kept.machine(machine), yes=yes)
        with engine:
            kept.restore(engine, label(resolved))
            sampling = settings.sampling(kept.flags(wanted.flags()), resolved.name, engine.generation_defaults)
            thinks = None if form.raw else settings.thinking(shown.think, "run", engine, filled.wishes_thinking)
            request = wanted.request(sampling, thinks)
            request = kept.request(replace(request, top_logprobs=shown.logprobs, constraint=constraint))
            if lines is not None:
                _answer_lines(engine, lines, batch.Shared(text, filled, request, _record))
                return
            turn = _Turn.of(kept, question)
            if turn is not None:
                question = turn.messages(engine, request.thinking, wanted.when_full)
            answering = _Answering(engine, label(resolved), request, shown, thoughts)
            status = answering.run(question, turn, raw=form.raw, explains=explain_speed)
    if status:
        raise typer.Exit(status)


@dataclass(frozen=True)
class _Answering:
    """One answer of `engine`, called `name`; `thoughts` is the open file of --think-to."""

    engine: Engine
    name: str
    request: Request
    shown: Shown
    thoughts: TextIO | None

    def run(self, question: str | list[Message], turn: _Turn | None, *, raw: bool, explains: bool) -> int:
        """Answer, and show what is to be shown; the exit status."""
        engine, shown = self.engine, self.shown
        printer = _Printer(answer=not shown.as_json, thinking=shown.show_thinking)
        timed = speed.timer(engine) if explains else None
        answer = collect(engine, question, self.request, printer.show, timed=timed, reuse_prefix=turn is not None)
        printer.finish(add_newline=not raw or streams.is_terminal(sys.stdout))
        failure = _unmet(answer)
        if failure is None and turn is not None:  # what does not fulfil its form is no turn to go on from
            failure = turn.keep(engine, self.name, answer, self.request)
        if self.thoughts is not None:
            failure = _write_thinking(shown.think_to, self.thoughts, answer.thinking) or failure
        why = {} if timed is None else {"speed": speed.of_answer(engine, timed, answer)}
        if shown.as_json:
            explained = {key: speed.as_json(value) for key, value in why.items()}
            wrong = {} if failure is None else {"error": {"kind": failure.kind, "message": failure.message}}
            streams.write_json({"model": self.name, **_record(answer)} | explained | wrong)
        streams.remark(statistics(answer, engine.max_context))
        if why and not shown.as_json:
            speed.tell(why["speed"])
        if failure is not None:
            streams.tell(f"localmoe: {failure.message}")
            return failure.exit_code
        return INTERRUPTED if answer.finish_reason == "interrupted" else 0


def _refuse_what_raw_leaves_out(form: Form, asked: Asked, wanted: AnswerOptions, shown: Shown) -> None:
    if wanted.session is not None and (form.raw or asked.jsonl is not None):
        raise UsageError("--session keeps a conversation, and --raw and --jsonl go without one")
    if form.raw and (wanted.system is not None or shown.think is not None or shown.thinking):
        raise UsageError("--raw goes without the chat template, so --system and the thinking options mean nothing")


def _refuse_what_needs_or_has_json(asked: Asked, shown: Shown, explain_speed: bool) -> None:
    if shown.logprobs is not None and not shown.as_json and asked.jsonl is None:
        raise UsageError("--logprobs: they are a part of the JSON object; add --json")
    if asked.jsonl is not None and (shown.as_json or shown.thinking):
        raise UsageError("--jsonl: each answer is a JSON object with its thinking; leave out what else asks for them")
    if asked.jsonl is not None and explain_speed:
        raise UsageError("--explain-speed: it explains one answer, and --jsonl asks for many; leave out one of them")


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


def _unmet(answer: Answer) -> Failure | None:
    """The failure of an answer that is not what it had to be."""
    problem = unmet(answer)
    return None if problem is None else Failure("grammar", problem, 1)


class _Turn:
    """A session's next turn."""

    def __init__(self, kept: Kept, conversation: Conversation, question: str) -> None:
        self._kept = kept
        self._conversation = conversation
        self._question = question

    @classmethod
    def of(cls, kept: Kept, asked: str | list[Message]) -> _Turn | None:
        """What is asked, after what was said before; None where nothing is kept."""
        if kept.name is None or isinstance(asked, str):
            return None
        system = asked[0]["content"] if asked[0]["role"] == "system" else None
        return cls(kept, kept.conversation(system), asked[-1]["content"])

    def messages(self, engine: Engine, thinking: bool | None, when_full: str | None) -> list[Message]:
        """The whole conversation, without its oldest turns where it no longer fits and that was asked for.

        Raises ContextOverflowError where it does not fit.
        """
        conversation, question = self._conversation, self._question
        used = len(engine.prompt_ids(conversation.asking(question), thinking=thinking))
        if used < engine.max_context:
            return conversation.asking(question)
        count = turns_to_drop(engine, conversation, question, thinking)
        name, turns = self._kept.name, len(conversation.turns)
        full = f"session {name} and the prompt have {used:,} tokens and the context holds {engine.max_context:,}"
        if not count:
            raise ContextOverflowError(f"{full}; even alone the prompt is too long: shorten it")
        if when_full != "drop":
            raise ContextOverflowError(
                f"{full}; --when-full drop lets go of the oldest {count} of {units.counted(turns, 'turn')}"
            )
        conversation.drop_oldest(count)
        dropped = units.counted(count, "turn")
        streams.remark(f"the context is full: dropped the oldest {dropped}, {turns - count} are left")
        return conversation.asking(question)

    def keep(self, engine: Engine, name: str, answer: Answer, request: Request) -> Failure | None:
        """Write the session with this turn; what went wrong, if something did. An answer that was interrupted is asked
        for again, so it is no turn."""
        if answer.finish_reason == "interrupted" or not answer.text:
            return None
        self._conversation.add(Turn(self._question, answer.text))
        seed = None if request.seed is None else (request.seed + 1) % (1 << 63)
        try:
            self._kept.save(engine, name, self._conversation, replace(request, seed=seed))
        except LocalMoeError as error:
            return describe(error)
        return None


def _write_thinking(path: Path | None, file: TextIO, text: str) -> Failure | None:
    """What went wrong, if something did: the answer is shown all the same."""
    try:
        with file:
            if file.seekable():
                file.truncate(0)
            file.write(text if text.endswith("\n") or not text else text + "\n")
    except OSError as error:
        return describe(StorageError(f"--think-to: {path}: cannot be written: {error.strerror}"))
    return None


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
        "reused_tokens": answer.reused_tokens,
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
