"""The heat file: kept, faded, and never in the way."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from localmoe.formats.manifest import Manifest, Settings, Source, TensorRecord, Totals
from localmoe.offload.heat import Heat, heat_file, known_heat

CONFIG: Any = SimpleNamespace(
    num_hidden_layers=3, n_routed_experts=4, num_experts_per_tok=2, moe_layers=(False, True, True)
)


def counts(*rows: list[int]) -> torch.Tensor:
    return torch.tensor([[0, 0, 0, 0], *rows])


def test_written_read_and_added_to(tmp_path: Path) -> None:
    path = tmp_path / "heat" / "a.json"
    assert Heat.read(path, CONFIG).shares(CONFIG) is None
    Heat.none(CONFIG).plus(counts([3, 1, 0, 0], [0, 0, 2, 2])).write(path)
    Heat.read(path, CONFIG).plus(counts([1, 0, 0, 3], [0, 0, 2, 2])).write(path)
    again = Heat.read(path, CONFIG)
    assert again.counts.tolist() == counts([4, 1, 0, 3], [0, 0, 4, 4]).tolist()
    shares = again.shares(CONFIG)
    assert shares is not None
    assert shares[0] == []
    assert shares[1] == pytest.approx([2 * 5 / 12, 2 * 2 / 12, 2 * 1 / 12, 2 * 4 / 12])
    assert path.stat().st_mode & 0o777 == 0o644


def test_what_was_long_ago_fades() -> None:
    old = Heat(counts([4_000_000, 0, 0, 0], [1, 1, 1, 1]).double())
    new = old.plus(counts([0, 100_000, 0, 0], [0, 0, 0, 0]))
    assert new.counts[1].tolist() == pytest.approx([200_000, 100_000, 0, 0])


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"version": 1}',
        "{" * 100_000,
        '{"version": 2, "counts": COUNTS}',
        '{"version": 1, "counts": [[1]]}',
        '{"version": 1, "counts": [["a"]]}',
        '{"version": 1, "counts": [[0,0,0,0],[0,0,0,-1],[0,0,0,0]]}',
        '{"version": 1, "counts": [[0,0,0,0],[0,NaN,0,0],[0,0,0,0]]}',
    ],
)
def test_a_damaged_file_is_no_heat(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content.replace("COUNTS", json.dumps(counts([1, 1, 1, 1], [1, 1, 1, 1]).tolist())))
    assert Heat.read(path, CONFIG).tokens == 0


def test_a_model_is_known_by_its_files(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}" if name != "c" else "{ }")
    a, b, c = (heat_file(tmp_path, tmp_path / name) for name in ("a", "b", "c"))
    assert a == b != c
    assert a.parent == tmp_path / "heat"


def test_before_the_first_run_it_is_what_calibration_counted(tmp_path: Path) -> None:
    model, home = tmp_path / "model", tmp_path / "home"
    model.mkdir()
    assert known_heat(home, model, CONFIG).shares(CONFIG) is None
    records = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}": TensorRecord("int4-g32", 0.1, "gptq", tokens, 0.1)
        for layer, expert, tokens in ((1, 0, 30), (1, 3, 10), (2, 2, 40), (9, 0, 7), (1, 9, 7))
        for part in ("gate_proj", "up_proj")
    }
    records["model.layers.1.mlp.shared_experts.gate_proj"] = TensorRecord("int4-g32", 0.1, "gptq", 99, 0.1)
    records["model.layers.2.mlp.experts.1.gate_proj"] = TensorRecord("int4-g32", 0.1)  # not calibrated
    settings = Settings("balanced", 32, "mse", "gptq", "a" * 64)
    made = Manifest("0", settings, Source("demo", None, {}), {}, records, Totals(1, 1, 4.5, 0.1), ())
    (model / "localmoe.json").write_bytes(made.to_bytes())
    assert known_heat(home, model, CONFIG).counts.tolist() == counts([30, 0, 0, 10], [0, 0, 40, 0]).tolist()
    Heat.none(CONFIG).plus(counts([0, 1, 1, 0], [1, 1, 0, 0])).write(heat_file(home, model))
    assert known_heat(home, model, CONFIG).counts.tolist() == counts([0, 1, 1, 0], [1, 1, 0, 0]).tolist()
    heat_file(home, model).unlink()
    (model / "localmoe.json").write_text("{")
    assert known_heat(home, model, CONFIG).shares(CONFIG) is None
