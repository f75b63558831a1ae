"""The line under a chat's prompt: model, context used, speed, and what the card does where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localmoe.cli import streams, units
from localmoe.cli.sanitize import printable_line
from localmoe.cli.styled import width

if TYPE_CHECKING:
    from localmoe.cli.answer import Answer
    from localmoe.engine import Engine

_BETWEEN = " · "


def status(engine: Engine, name: str, last: Answer | None, held: int = 0) -> str:
    """What fits the terminal's width: what matters least goes first. `held` tokens are there before the `last` answer,
    where a session goes on."""
    used = held if last is None else last.prompt_tokens + last.completion_tokens
    parts = [printable_line(name), f"{used:,} of {engine.max_context:,} tokens"]
    if last is not None and last.decode_tokens_per_second:
        parts.append(f"{last.decode_tokens_per_second:.1f} tokens/s")
    parts += _card(engine)
    return fitting(parts, streams.columns() - 1)


def fitting(parts: list[str], columns: int) -> str:
    """As many of the parts, from the first on, as `columns` cells hold; nothing where the first is too wide."""
    line = ""
    for part in parts:
        longer = line + _BETWEEN + part if line else part
        if width(longer) > columns:
            break
        line = longer
    return line


def folded(text: str, columns: int) -> str:
    """Lines broken where they are wider than `columns`: facts with dots between them at a dot, all else at spaces."""
    rows = []
    for line in text.split("\n"):
        row, *rest = line.split(_BETWEEN)
        for fact in rest:
            if width(row + _BETWEEN + fact) > columns:
                rows.append(row)
                row = fact
            else:
                row += _BETWEEN + fact
        rows.append(row)
    return "\n".join(short for row in rows for short in _broken(row, columns))


def _broken(row: str, columns: int) -> list[str]:
    """At the last space that fits; a word longer than a row is the terminal's to break. What stands in columns keeps
    them in its first row."""
    rows = []
    while width(row) > columns:
        cut = max((at for at, char in enumerate(row) if char == " " and width(row[:at]) <= columns), default=-1)
        if cut < 0 or not row[:cut].strip():
            break
        rows.append(row[:cut].rstrip())
        row = row[cut:].lstrip()
    return [*rows, row]


def _card(engine: Engine) -> list[str]:
    """The share of the experts' uses that the card has served so far, and its memory in use."""
    placement = engine.placement
    if placement is None:
        return []
    hits = engine.hit_rates()
    vram = f"VRAM {units.size(placement.nbytes('gpu'))}"
    return [f"{sum(hits) / len(hits):.0%} of expert uses on the card", vram] if hits else [vram]
