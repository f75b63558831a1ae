"""`localmoe chat`: a conversation at the terminal."""

from __future__ import annotations

import difflib
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from localmoe.cli import options, settings, streams
from localmoe.cli.answer import Answer, Request, collect, splitter
from localmoe.cli.conversation import Conversation
from localmoe.errors import ContextOverflowError, LocalMoeError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from localmoe.load import Engine
    from localmoe.text import Segment

COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation (the system prompt stays)",
    "/system TEXT": "set the system prompt; without TEXT show it",
    "/regen": "answer the last question again",
    "/stats": "model, context used, speed of the last answer",
    "/exit": "leave (so does Ctrl-D)",
}
KEYS = "Ctrl-C stops an answer. Alt-Enter begins a new line. The arrow keys bring back earlier questions."


def chat(
    model: options.Model,
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
    think: options.Think = None,
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
    """Talk with MODEL. /help lists what can be typed; Ctrl-C stops an answer, Ctrl-D leaves."""
    penalties = (repetition_penalty, presence_penalty, frequency_penalty)
    flags = options.SamplingFlags(temp, top_p, top_k, min_p, *penalties).given()
    bias = options.parse_bias(logit_bias)
    machine = options.machine(device, kernels, threads, vram, ram, ctx, cache_dtype)
    machine = replace(machine, mtp=options.parse_mtp(mtp))
    options.check_stop(stop)
    if not (streams.is_terminal(sys.stdin) and streams.is_terminal(sys.stdout)):
        raise UsageError("chat needs a terminal; in a pipe or a script use localmoe run")

    from localmoe.cli.line_editor import LineEditor
    from localmoe.cli.opening import label, open_engine

    resolved, engine = open_engine(model, machine)
    with engine:
        request = Request(
            sampling=settings.sampling(flags, resolved.name, engine.generation_defaults),
            max_tokens=max_tokens,
            seed=seed,
            stop=stop or (),
            thinking=think,
            logit_bias=bias,
        )
        conversation = Conversation(system)
        splitter(engine, conversation.asking("?"), think)  # a model that cannot chat says so before the first question
        Chat(engine, label(resolved), request, conversation).talk(LineEditor().read)


class Chat:
    """The loop: read a line, obey it or answer it."""

    def __init__(self, engine: Engine, name: str, request: Request, conversation: Conversation) -> None:
        self._engine = engine
        self._name = name
        self._request = request
        self._conversation = conversation
        self._last: Answer | None = None
        self._unanswered: str | None = None  # stopped before its first word; /regen asks it again
        self._printer = _Printer()

    def talk(self, read: Callable[[], str | None]) -> None:
        """Until `read` gives None (Ctrl-D, Ctrl-C twice) or the user types /exit."""
        _say(f"{self._name} · context {self._engine.max_context} tokens · /help lists the commands")
        while (line := read()) is not None:
            text = line.strip()
            if text == "/exit":
                return
            try:
                if text.startswith("/"):
                    self._obey(text)
                elif text:
                    self._answer(line)
            except KeyboardInterrupt:  # between two pieces of work; the conversation is whole
                _say("\nstopped")
            except LocalMoeError as error:
                _say(f"{error}")

    def _obey(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command == "/help":
            width = max(map(len, COMMANDS))
            _say("\n".join([*(f"{name:<{width}}  {what}" for name, what in COMMANDS.items()), KEYS]))
        elif command == "/reset":
            self._conversation.reset()
            self._last = self._unanswered = None
            _say("forgotten")
        elif command == "/system":
            self._set_system(argument.strip())
        elif command == "/regen":
            self._regenerate()
        elif command == "/stats":
            _say(self._statistics())
        else:
            known = [name.split()[0] for name in COMMANDS]
            near = difflib.get_close_matches(command, known, 1)
            _say(f"no such command: {command}; " + (f"did you mean {near[0]}?" if near else "/help lists them"))

    def _set_system(self, text: str) -> None:
        if text:
            self._conversation.system = text
            _say("set; it counts from the next answer on")
        else:
            _say(self._conversation.system or "no system prompt; /system TEXT sets one")

    def _regenerate(self) -> None:
        if self._unanswered is not None:
            self._answer(self._unanswered)
            return
        turn = self._conversation.take_back()
        if turn is None:
            _say("nothing to answer again yet")
            return
        if self._request.sampling["temperature"] == 0:
            _say("without a temperature the answer comes out the same; start chat with --temp 0.7 for others")
        if not self._answer(turn.question):
            self._conversation.add(turn.question, turn.answer)

    def _answer(self, question: str) -> bool:
        """Answer `question` and remember the turn; whether there was an answer to remember."""
        self._unanswered = question
        messages = self._conversation.asking(question)
        try:
            answer = collect(self._engine, messages, self._numbered(), self._printer.show, reuse_prefix=True)
        except ContextOverflowError:
            self._unanswered = None
            _say(
                f"the conversation no longer fits the context of {self._engine.max_context} tokens; the last message "
                "was not added. /reset begins a new one, a shorter message may still fit"
            )
            return False
        finally:
            self._printer.finish()
        self._last = answer
        _say(self._afterword(answer) + "\n")
        if not answer.text:
            return False
        self._unanswered = None
        self._conversation.add(question, answer.text)
        return True

    def _numbered(self) -> Request:
        """The request with a seed of its own, so that with --seed the chat repeats but /regen does not."""
        request, seed = self._request, self._request.seed
        if seed is not None:
            self._request = replace(request, seed=(seed + 1) % (1 << 63))
        return request

    def _afterword(self, answer: Answer) -> str:
        words = [f"{answer.completion_tokens} tokens"]
        if answer.decode_tokens_per_second:
            words.append(f"{answer.decode_tokens_per_second:.1f} tokens/s")
        used = answer.prompt_tokens + answer.completion_tokens
        words.append(f"context {used}/{self._engine.max_context}")
        if answer.finish_reason == "interrupted":
            words.append("stopped" if answer.text else "stopped before the first word; /regen asks again")
        elif answer.finish_reason == "length":
            full = used >= self._engine.max_context
            words.append("the context is full; /reset begins a new conversation" if full else "cut off by -n")
        return " · ".join(words)

    def _statistics(self) -> str:
        engine = self._engine
        lines = [
            f"model     {self._name} ({engine.path})",
            f"kernels   {engine.kernels.tier}",
            f"sampling  {settings.as_text(self._request.sampling)}",
            f"turns     {len(self._conversation.turns)}",
        ]
        last = self._last
        if last is None:
            return "\n".join([*lines, f"context   0 of {engine.max_context} tokens"])
        used = last.prompt_tokens + last.completion_tokens
        lines.append(f"context   {used} of {engine.max_context} tokens ({used / engine.max_context:.0%})")
        prefill = f"prompt {last.prompt_tokens} tokens"
        if last.prefill_seconds is not None:
            prefill += f" in {last.prefill_seconds:.2f} s"
        speed = f" at {last.decode_tokens_per_second:.1f} tokens/s" if last.decode_tokens_per_second else ""
        return "\n".join([*lines, f"last      {prefill}, answer {last.completion_tokens} tokens{speed}"])


class _Printer:
    """Writes an answer to the terminal, its thinking dimmed."""

    def __init__(self) -> None:
        self._kind: str | None = None
        self._column_zero = True

    def show(self, segment: Segment) -> None:
        text = segment.text
        if segment.kind != self._kind:
            text = text.lstrip("\n") if self._kind is None else text
            if self._kind is not None:
                streams.write("\n" if self._column_zero else "\n\n")
            if not text:
                return
            self._kind = segment.kind
        streams.write(text, faint=segment.kind == "thinking")
        self._column_zero = text.endswith("\n")

    def finish(self) -> None:
        if not self._column_zero:
            streams.write("\n")
        self._kind, self._column_zero = None, True


def _say(text: str) -> None:
    streams.write(text, faint=True)
    streams.write("\n")
