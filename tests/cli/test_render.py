"""The progress bar on terminals of every width."""

from __future__ import annotations

import io
import re
import sys
from types import SimpleNamespace

import pytest
from rich.cells import cell_len

from localmoe.cli.render import _RateColumn, progress_bar

GIB = 1 << 30


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """Every state of the line that was drawn, without colours."""
        return [line for line in re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())) if line]


@pytest.mark.parametrize("columns", [40, 59, 60, 64, 80, 200])
def test_the_bar_fits_its_line_with_whole_words(monkeypatch, columns):
    """Four columns are left for the terminal's ^C: a line that wraps is never taken away again."""
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    with progress_bar("pull") as advance:
        advance(GIB // 2, 642 * GIB, "model-00001-of-00163.safetensors")
        advance(int(123.4 * GIB), int(642.1 * GIB), "model-00002-of-00163.safetensors")
        advance(int(623.4 * GIB), int(642.1 * GIB), "model.layers.3.mlp.experts.17.down_proj.weight", "quantize")
    assert max(map(cell_len, screen.lines())) <= columns - 4
    last = screen.lines()[-1]
    assert last.startswith("quantize ")
    assert "623.4/642.1 GiB" in last
    assert re.search(r" (\d+:\d\d:\d\d|-:--:--)", last)
    cut = [word for word in last.split() if "…" in word]
    assert all(word.startswith("…") and "down_proj.weight".endswith(word[-6:]) for word in cut)
    assert bool(cut) == (64 <= columns < 100)


@pytest.mark.parametrize(
    ("elapsed", "speed", "shown"), [(0.1, 5e9, ""), (2.0, None, ""), (2.0, 3.5 * 2**20, "3.5 MiB/s")]
)
def test_the_rate_is_in_the_units_of_the_amounts_and_waits_a_second(elapsed, speed, shown):
    task = SimpleNamespace(elapsed=elapsed, speed=speed, finished_speed=None)
    assert _RateColumn().render(task).plain == shown


def test_nothing_is_drawn_into_a_pipe(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar("pull") as advance:
        advance(1, 2, "a", "quantize")
    assert sys.stderr.getvalue() == ""
