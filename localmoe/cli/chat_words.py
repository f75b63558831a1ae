"""What a chat says beside its answers: what each took, what is used, what was said when a session goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localmoe.cli import settings, streams, units
from localmoe.cli.answer import guesses
from localmoe.cli.sanitize import printable_line

if TYPE_CHECKING:
    from localmoe.cli.answer import Answer, Request
    from localmoe.cli.conversation import Conversation
    from localmoe.cli.kept import Kept
    from localmoe.engine import Engine

_RECALLED = 2  # turns shown when a session goes on
_NEARLY = 0.9  # of the context


def afterword(answer: Answer, max_context: int) -> str:
    """The line under an answer."""
    words = [f"{answer.completion_tokens} tokens"]
    if answer.decode_tokens_per_second:
        words.append(f"{answer.decode_tokens_per_second:.1f} tokens/s")
    used = answer.prompt_tokens + answer.completion_tokens
    words.append(f"context {used}/{max_context}")
    if answer.finish_reason == "interrupted":
        words.append("stopped" if answer.text else "stopped before the first word; /regen asks again")
    elif answer.finish_reason == "length":
        full = used >= max_context
        words.append("the context is full; /reset begins a new conversation" if full else "cut off by -n")
    elif used >= _NEARLY * max_context:
        words.append("nearly full")
    return " · ".join(words)


def statistics(
    engine: Engine, name: str, request: Request, conversation: Conversation, last: Answer | None, kept: Kept
) -> str:
    """What /stats shows."""
    lines = [
        f"model     {name} ({engine.path})",
        f"kernels   {engine.kernels.tier}",
        f"sampling  {settings.as_text(request.sampling, request.seed)}",
        f"turns     {len(conversation.turns)}",
    ]
    if kept.name is not None:
        lines.append(f"session   {kept.name}")
    used = conversation.used or 0
    share = f" ({used / engine.max_context:.0%})" if used else ""
    lines.append(f"context   {used} of {engine.max_context} tokens{share}")
    if engine.cache_bytes:
        lines.append(f"cache     {units.size(engine.cache_bytes)} in {engine.cache_dtype}")
    if last is None:
        return "\n".join(lines)
    prefill = f"prompt {last.prompt_tokens} tokens"
    if last.reused_tokens:
        prefill += f", {last.reused_tokens} of them known,"
    if last.prefill_seconds is not None:
        prefill += f" in {last.prefill_seconds:.2f} s"
    speed = f" at {last.decode_tokens_per_second:.1f} tokens/s" if last.decode_tokens_per_second else ""
    lines.append(f"last      {prefill}, answer {last.completion_tokens} tokens{speed}")
    if last.speculation is not None:
        lines.append(f"guesses   {guesses(last.speculation)}")
    return "\n".join(lines)


def recap(kept: Kept, conversation: Conversation) -> str:
    """What was said last in a session that goes on, a line for each question and answer."""
    if kept.is_new:
        return f"session {kept.name} begins; it is kept until `localmoe sessions rm {kept.name}`"
    turns = conversation.turns
    lines = [f"session {kept.name} goes on: {units.counted(len(turns), 'turn')}, {kept.tokens} tokens"]
    if len(turns) > _RECALLED:
        lines.append("  ...")
    width = max(streams.columns() - 6, 20)
    for turn in turns[-_RECALLED:]:
        lines.append(f"  > {_cut(turn.question, width)}")
        lines.append(f"    {_cut(turn.answer, width)}")
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    line = " ".join(printable_line(text[: 4 * width]).split())
    return line if len(line) <= width and len(text) <= 4 * width else line[: width - 4] + " ..."
