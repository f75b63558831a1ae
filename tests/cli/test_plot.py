"""`bench --plot`: the picture, its numbers, and refusals before anything is measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from localmoe.cli.plot import Charts, draw
from localmoe.errors import StorageError
from localmoe.hub.verify import demo_directory

LONGEST = json.loads((demo_directory() / "config.json").read_text())["max_position_embeddings"]
CHARTS = Charts([(0, 12.5), (256, 11.0), (512, 9.0)], {1: [4, 0, 2, 2], 2: [2, 2, 2, 2]}, 4, True)


def test_bench_draws_and_says_the_numbers(invoke, tmp_path: Path) -> None:
    path = tmp_path / "speed.png"
    asked = ("bench", "demo:source", "-p", "8", "-n", "2", "--repeats", "1", "--plot", str(path))
    outcome = invoke(*asked, "--json")
    assert outcome.status == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["plot"] == str(path)
    contexts = [point["context"] for point in found["decode_by_context"]]
    assert contexts == sorted({0, *((LONGEST - 17) >> n for n in range(6))})
    assert all(point["tokens_per_second"] > 0 for point in found["decode_by_context"])
    uses = found["expert_uses"]
    assert uses["text"]
    assert {sum(layer) for layer in uses["layers"].values()} == {uses["tokens"] * 4}  # of 16 experts each token uses 4
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    assert width > height > 300
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("speed.gif", 2, "does not end in .png, .svg, .pdf"),
        ("nowhere/speed.png", 1, "is not a directory that can be written"),
    ],
)
def test_refusals_come_before_the_work(invoke, engine, tmp_path, name, status, message) -> None:
    outcome = invoke("bench", "demo", "--plot", str(tmp_path / name))
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (status, "", 1)
    assert message in outcome.err
    assert not engine.calls


def test_without_matplotlib_it_is_one_line(invoke, engine, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else find(name, *more)
    )
    outcome = invoke("bench", "demo", "--plot", "speed.png")
    assert outcome.status == 2
    assert outcome.err == (
        "localmoe: --plot draws with matplotlib, which is not installed: pip install 'localmoe[plot]'\n"
    )


def test_what_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "speed.svg"
    draw(CHARTS, "a $dir^{ of its own, avx2 kernels", path)
    text = path.read_text()
    assert text.rstrip().endswith("</svg>")
    path.unlink()
    (tmp_path / "speed.svg").mkdir()
    with pytest.raises(StorageError, match=r"speed\.svg cannot be written"):
        draw(CHARTS, "demo", path)
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == []
