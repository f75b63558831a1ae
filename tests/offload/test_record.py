"""doctor.json: written whole, believed only where it fits this machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from localmoe.errors import StorageError
from localmoe.offload.machine import Figure
from localmoe.offload.probe import Card, Facts, look
from localmoe.offload.record import NAME, Record, machine_here, read, save

RECORD = Record(
    "A CPU", 4, "avx2", "2026-01-31", {"read": Figure(50e9, "measured"), "disk": Figure(3e9, "measured", "ext4")}
)

WITHOUT = {"format": 1, "cpu": "A", "threads": 1, "tier": "", "measured": ""}


@pytest.fixture
def facts() -> Facts:
    return replace(look(ask_cards=False), cpu="A CPU", tiers=("portable", "avx2"))


def test_what_is_saved_is_read_as_cached(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert save(home, RECORD) == home / NAME
    found, why = read(home)
    cached = {"read": Figure(50e9, "cached"), "disk": Figure(3e9, "cached", "ext4")}
    assert (found, why) == (replace(RECORD, figures=cached), "")
    assert [path.name for path in home.iterdir()] == [NAME]


def test_a_plan_uses_it_and_derives_the_rest(tmp_path: Path, facts: Facts) -> None:
    save(tmp_path, RECORD)
    machine = machine_here(facts, tmp_path, 4, with_card=False)
    assert machine.cpu.read == Figure(50e9, "cached")
    assert machine.disk == Figure(3e9, "cached", "ext4")
    assert machine.cpu.weights["int4"] == Figure(50e9 * 0.85, "assumed", "85% of plain reads")
    assert machine.gpu is None
    assert "measured by `localmoe doctor` on 2026-01-31" in machine.notes[0]


def test_a_cards_figures_are_those_of_that_card(tmp_path: Path, facts: Facts) -> None:
    figures = {"gpu.read": Figure(900e9, "measured"), "gpu.pcie": Figure(24e9, "measured", "from pinned memory")}
    figures["gpu.handoff"] = Figure(9e-6, "measured")
    save(tmp_path, replace(RECORD, figures=figures, card="RTX"))
    machine = machine_here(facts, tmp_path, 4, with_card=True, card="RTX")
    assert machine.gpu is not None
    assert machine.gpu.read == Figure(900e9, "cached")
    assert machine.gpu.pcie.value == 24e9
    assert machine.gpu.handoff == Figure(9e-6, "cached")
    assert machine.gpu.macs.origin == "assumed"
    other = machine_here(facts, tmp_path, 4, with_card=True, card="another")
    assert other.gpu is not None
    assert other.gpu.read.origin == "assumed"


@pytest.mark.parametrize(
    ("change", "threads"),
    [({"cpu": "another"}, 4), ({"tiers": ("portable",)}, 4), ({}, 3)],
    ids=["cpu", "tier", "threads"],
)
def test_another_machines_record_is_not_used(tmp_path: Path, facts: Facts, change: dict, threads: int) -> None:
    save(tmp_path, RECORD)
    machine = machine_here(replace(facts, **change), tmp_path, threads, with_card=False)
    assert {figure.origin for figure in machine.figures().values()} == {"assumed"}
    assert "another CPU, number of threads or kernel tier: `localmoe doctor` measures them" in machine.notes[0]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "nothing is measured yet"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 2}', "of another version"),
        (json.dumps(WITHOUT), "is damaged"),
        (json.dumps(WITHOUT | {"figures": {"read": 3}}), "is damaged"),
        (json.dumps(WITHOUT | {"figures": {"read": {"value": float("inf"), "note": ""}}}), "is damaged"),
        (json.dumps(WITHOUT | {"figures": {"read": {"value": 0, "note": ""}}}), "is damaged"),
        (json.dumps(WITHOUT | {"figures": {"read": {"value": True, "note": ""}}}), "is damaged"),
    ],
)
def test_what_is_no_record_is_said(tmp_path: Path, content: str | None, why: str) -> None:
    if content is not None:
        (tmp_path / NAME).write_text(content)
    found, said = read(tmp_path)
    assert found is None
    assert why in said


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*doctor\.json"):
        save(tmp_path / "file", RECORD)


def test_a_failed_save_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, RECORD)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("localmoe.formats.files.os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        save(tmp_path, replace(RECORD, threads=8))
    found, _ = read(tmp_path)
    assert found is not None
    assert found.threads == 4
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_the_card_here_lends_its_name_memory_and_link(tmp_path: Path, facts: Facts) -> None:
    card = Card("RTX 4060", 8 << 30, 7 << 30, "1", "8.9", (4, 8))
    gpu = machine_here(replace(facts, cards=(card,)), tmp_path, 4, with_card=True).gpu
    assert gpu is not None
    assert (gpu.name, gpu.memory, gpu.free) == ("RTX 4060", 8 << 30, 7 << 30)
    assert gpu.pcie.value == pytest.approx(0.8 * 15.76e9, rel=1e-3)
    assert gpu.pcie.note == "80% of PCIe 4 x8"
    absent = machine_here(facts, tmp_path, 4, with_card=True).gpu
    assert absent is not None
    assert absent.name == "a card that is not here"
