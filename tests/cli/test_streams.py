from __future__ import annotations

import sys

import pytest

from localmoe.cli import streams

LINE = "localmoe: maker/Tiny is not here: type `localmoe pull maker/Tiny` and then `localmoe quantize maker/Tiny`"


@pytest.mark.parametrize(
    ("columns", "indent", "wanted"),
    [
        (len(LINE), 4, LINE),
        (
            60,
            4,
            "localmoe: maker/Tiny is not here: type\n    `localmoe pull maker/Tiny` and then\n"
            "    `localmoe quantize maker/Tiny`",
        ),
        (
            20,
            0,
            "localmoe: maker/Tiny\nis not here: type\n`localmoe pull maker/Tiny`\nand then\n"
            "`localmoe quantize maker/Tiny`",
        ),
    ],
)
def test_a_terminal_breaks_lines_between_words_and_in_no_command(
    columns: int, indent: int, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "columns", lambda stream: columns)
    monkeypatch.setattr(streams, "is_terminal", lambda stream: stream is sys.stderr)
    assert streams.in_words(LINE, indent=indent) == wanted


def test_a_pipe_gets_one_line() -> None:
    assert streams.in_words(LINE * 9) == LINE * 9
