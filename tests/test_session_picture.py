"""The recorded session in the README: well formed, and made of commands that the program has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from localmoe.cli.app import COMMANDS

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "session.svg"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("record_session")


def test_the_picture_is_of_this_session(script: ModuleType) -> None:
    assert PICTURE.stat().st_size < 512 * 1024
    root = ElementTree.parse(PICTURE).getroot()
    described = root.findtext(f"{SVG}desc") or ""
    typed = [text for text, _ in script.SESSION if "localmoe" in text]
    assert described == "; ".join(typed)
    rows = ["".join(text.text or "" for text in group.iter(f"{SVG}text")) for group in root.iter(f"{SVG}g")]
    for line in typed:
        assert line.partition("localmoe ")[2].split()[0] in COMMANDS
        assert f"$ {line}" in rows
    assert "docs/session.svg" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_row_is_seen_while_it_is_on_the_screen(script: ModuleType) -> None:
    def frame(start: float, *lines: str) -> object:
        return script.Frame(start, tuple(script.spans(script.Text.from_ansi(line)) for line in lines))

    frames = script.paced(
        [frame(5, "$ "), frame(5.5, "$ <ls>"), frame(65.5, "\x1b[31mred\x1b[0m & 龍"), frame(66, "$ ")]
    )
    assert [each.start for each in frames] == [0, 0.5, 1.5, 2]  # the minute is cut to a second
    root = ElementTree.fromstring(script.as_svg(frames))
    groups = {"".join(text.text for text in group.iter(f"{SVG}text")): group for group in root.iter(f"{SVG}g")}
    assert set(groups) == {"$", "$ <ls>", "red & 龍"}
    times = {
        row: [(each.get("to"), each.get("begin"), each.get("dur")) for each in group.iter(f"{SVG}set")]
        for row, group in groups.items()
    }
    assert times["$ <ls>"] == [("visible", "loop.begin+0.5s", "1.00s")]
    assert times["$"] == [("hidden", "loop.begin+0.5s", "1.50s")]  # what is seen last is seen without animation
    assert groups["$ <ls>"].get("visibility") == "hidden"
    assert groups["$"].get("visibility") is None
    wide = list(groups["red & 龍"].iter(f"{SVG}text"))
    assert len({text.get("fill") for text in wide}) == 2
    assert sum(float(text.get("textLength", "0")) for text in wide) == pytest.approx(8 * script.CELL)
