"""Measurements small enough for a test: what they leave behind, what they refuse; never how fast."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from localmoe.errors import StorageError
from localmoe.offload import measure as module
from localmoe.offload.machine import FIGURE_UNITS, FORMS, Figure
from localmoe.offload.measure import disk, measure
from localmoe.offload.measure_card import card_probes
from localmoe.offload.probe import look

MOUNTS = "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n22 21 0:5 / {} rw shared:2 - {} none rw\n"


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    return tmp_path / "mountinfo"


def test_the_disk_is_measured_and_nothing_stays(tmp_path: Path, mounts: Path) -> None:
    home = tmp_path / "new" / "home"
    mounts.write_text(MOUNTS.format(tmp_path, "btrfs"))
    figure = disk(home, 64 << 20, mounts)
    assert figure.origin == "measured"
    assert figure.value > 0
    assert figure.note.startswith("btrfs, ")
    assert list(home.iterdir()) == []


def test_a_place_in_memory_is_no_disk(tmp_path: Path, mounts: Path) -> None:
    mounts.write_text(MOUNTS.format(tmp_path, "tmpfs"))
    with pytest.raises(StorageError, match="is in memory"):
        disk(tmp_path / "home", 64 << 20, mounts)


def test_every_form_is_measured_and_failures_are_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("_MEMORY_BYTES", 1 << 20), ("_MANY_BYTES", 1 << 18), ("_MOST_BYTES", 1 << 20)):
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(module, "_MANY_TOKENS", 16)
    monkeypatch.setattr(module, "_EXPERT_ROWS", 64)
    monkeypatch.setattr(module, "_EXPERT_COLUMNS", 128)
    monkeypatch.setattr("localmoe.kernels.cpu._BANDWIDTH_BYTES", 1 << 20)
    blocked = tmp_path / "file"
    blocked.write_text("")
    facts = replace(look(ask_cards=False), cache_bytes=1 << 20, available_bytes=8 << 30)
    figures, failed = measure(facts, blocked, threads=1, seconds=60)
    expected = {"read", "experts", "cached", "attention"} | {
        f"{kind}.{form}" for kind in ("weights", "many") for form in FORMS
    }
    assert set(figures) == expected
    assert set(figures) < set(FIGURE_UNITS)
    assert all(figure.value > 0 and figure.origin == "measured" for figure in figures.values())
    assert failed == ("disk read bandwidth: File exists",)


def test_what_there_is_no_time_or_memory_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = look(ask_cards=False)
    monkeypatch.setattr(module, "disk", lambda home: Figure(2e9, "measured"))
    figures, failed = measure(facts, tmp_path, seconds=-1)
    assert figures == {}
    assert failed[0].startswith("no time left")
    assert "memory read bandwidth" in failed[0]
    figures, failed = measure(replace(facts, available_bytes=100 << 20), tmp_path)
    assert figures == {"disk": Figure(2e9, "measured")}
    assert failed == ("memory bandwidth: only 100 MiB are available",)


@pytest.mark.parametrize("form", FORMS)
def test_a_matrix_is_as_large_as_asked_for(form: str) -> None:
    assert module._in_about(form, 8 << 20).nbytes == pytest.approx(8 << 20, rel=0.01)


def test_a_card_is_measured_by_its_memory_link_and_products() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    probes = list(card_probes(device, copy=1 << 20, link=1 << 20, shape=(16, 64, 64)))
    assert [name for name, _, _ in probes] == ["gpu.read", "gpu.pcie", "gpu.macs"]
    for _, _, probe in probes:
        figure = probe()
        assert figure.origin == "measured"
        assert figure.value > 0
