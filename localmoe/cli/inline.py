"""Markdown within a line: code, emphasis, links. Pure, and made for text that is still growing.

What comes out for the beginning of a line never changes when more text arrives: a mark whose partner may still come is
held back with all that follows it, and one without a partner in the next 200 characters is plain text for good.
"""

from __future__ import annotations

import re

from localmoe.cli.styled import Span

HOLD = 200
"""How many characters after an opening mark its partner is looked for."""

_MARK = re.compile(r"[\\`*_~\[!]")
_ESCAPED = frozenset("*_`#~|>-+.!")  # not brackets: \( and \[ begin formulas
_LINK = re.compile(r"!?\[([^\[\]]*)\]\(([^()\s]*)\)")
_LINK_BEGUN = re.compile(r"!?(\[([^\[\]]*(\](\([^()\s]*)?)?)?)?")
_STYLES = {1: "3", 2: "1", 3: "1;3"}
CODE, LINK, ADDRESS, STRUCK = "36", "4", "2", "9"


def inline(text: str, *, final: bool, style: str = "") -> tuple[list[Span], str]:
    """The spans of `text` that are certain, and the rest that waits for more; no rest when the line is `final`."""
    spans: list[Span] = []
    at = 0
    while (mark := _MARK.search(text, at)) is not None:
        _add(spans, style, text[at : mark.start()])
        at = mark.start()
        taken = _take(text, at, final, style)
        if taken is None:
            return spans, text[at:]
        found, at = taken
        for span_style, span_text in found:
            _add(spans, span_style, span_text)
    _add(spans, style, text[at:])
    return spans, ""


def _take(text: str, at: int, final: bool, style: str) -> tuple[list[Span], int] | None:
    """The construct at `at` and where it ends, or None when more text is needed to tell."""
    character = text[at]
    if character == "\\":
        return _escape(text, at, final, style)
    if character in "[!":
        return _link(text, at, final, style)
    return _enclosed(text, at, final, style)


def _escape(text: str, at: int, final: bool, style: str) -> tuple[list[Span], int] | None:
    if at + 1 == len(text):
        return ([(style, "\\")], at + 1) if final else None
    if text[at + 1] in _ESCAPED:
        return [(style, text[at + 1])], at + 2
    return [(style, text[at : at + 2])], at + 2


def _link(text: str, at: int, final: bool, style: str) -> tuple[list[Span], int] | None:
    window = text[at : at + HOLD]
    found = _LINK.match(window)
    if found is None:
        begun = _LINK_BEGUN.fullmatch(window)
        if begun is not None and not final and len(window) < HOLD:
            return None
        return [(style, text[at])], at + 1
    label, address = found[1], found[2]
    spans, _ = inline(label, final=True, style=_both(style, LINK))
    if address and address != label:
        spans.append((_both(style, ADDRESS), f" ({address})" if label else address))
    return spans, at + found.end()


def _enclosed(text: str, at: int, final: bool, style: str) -> tuple[list[Span], int] | None:
    """Code between backticks, or text between runs of *, _ or ~."""
    character = text[at]
    run = len(text) - at - len(text[at:].lstrip(character))
    if at + run == len(text) and not final:
        return None
    literal = [(style, text[at : at + run])], at + run
    if character != "`" and not _can_open(text, at, run):
        return literal
    close = _closing(text, at, run)
    if close is None:
        waits = not final and len(text) - at <= run + HOLD
        return None if waits else literal
    end = close + run
    if end >= len(text) and not final:
        return None  # the closing run may still grow
    inside = text[at + run : close]
    if character == "`":
        return [(_both(style, CODE), _unpadded(inside))], end
    inner = STRUCK if character == "~" else _STYLES[run]
    return inline(inside, final=True, style=_both(style, inner))[0], end


def _can_open(text: str, at: int, run: int) -> bool:
    if run != 2 if text[at] == "~" else run > 3:
        return False
    after = text[at + run : at + run + 1]
    inside_a_word = text[at] == "_" and text[max(at - 1, 0) : at].isalnum()
    return bool(after) and not after.isspace() and not inside_a_word


def _closing(text: str, at: int, run: int) -> int | None:
    """Where the closing run of `run` marks begins."""
    character = text[at]
    for found in re.finditer(re.escape(character) + "+", text[at + run : at + run + HOLD]):
        start, length = at + run + found.start(), len(found[0])
        if length != run and not (character in "*_" and length == 3 and run < 3):
            continue
        if character == "`":
            return start
        end = start + length
        closes_a_word = character != "_" or not text[end : end + 1].isalnum()
        if not text[start - 1].isspace() and closes_a_word:
            return end - run  # of three marks the last ones are the outer ones
    return None


def _unpadded(code: str) -> str:
    padded = len(code) > 2 and code[0] == code[-1] == " " and code.strip()
    return code[1:-1] if padded else code


def _both(outer: str, inner: str) -> str:
    return f"{outer};{inner}" if outer and inner else outer or inner


def _add(spans: list[Span], style: str, text: str) -> None:
    if not text:
        return
    if spans and spans[-1][0] == style:
        spans[-1] = (style, spans[-1][1] + text)
    else:
        spans.append((style, text))
