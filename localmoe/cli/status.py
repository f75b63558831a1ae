"""The line under a chat's prompt: model, context used, speed, and what the card does where there is one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from localmoe.cli import streams, units
from localmoe.cli.sanitize import printable_line
from localmoe.cli.styled import width

if TYPE_CHECKING:
    from localmoe.cli.answer import Answer
    from localmoe.engine import Engine

_BETWEEN = " · "
_SECOND_COLUMN = re.compile(r"\S+( \S+)*  +(?=\S)")


def status(engine: Engine, name: str, last: Answer | None, used: int) -> str:
    """What fits the terminal's width: what matters least goes first. `used` tokens of the context are in use; of the
    `last` answer it says the speed."""
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
    """Lines of facts with dots between them, broken at a dot where they are wider than `columns`, else between words.
    What follows on a line of a list stands under its second column. A word that is too long stays whole, to be copied.
    """
    rows = []
    for line in text.split("\n"):
        row, *rest = line.split(_BETWEEN)
        for fact in rest:
            if width(row + _BETWEEN + fact) > columns:
                rows += _between_words(row, columns)
                row = fact
            else:
                row += _BETWEEN + fact
        rows += _between_words(row, columns)
    return "\n".join(rows)


def _between_words(line: str, columns: int) -> list[str]:
    if width(line) <= columns:
        return [line]
    second = _SECOND_COLUMN.match(line)
    hang = second.end() if second is not None and second.end() <= columns // 2 else 0
    rows = [line[:hang]]
    for word in re.findall(r"\s*\S+", line[hang:]):
        if rows[-1].strip() and width(rows[-1] + word) > columns:
            rows.append(" " * hang + word.lstrip())
        else:
            rows[-1] += word
    return rows


def _card(engine: Engine) -> list[str]:
    """The share of the experts' uses that the card has served so far, and its memory in use."""
    placement = engine.placement
    if placement is None:
        return []
    hits = engine.hit_rates()
    vram = f"VRAM {units.size(placement.vram)}"
    return [f"{sum(hits) / len(hits):.0%} of expert uses on the card", vram] if hits else [vram]
