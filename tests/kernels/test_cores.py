"""Which processors the team runs on, from made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from localmoe.kernels.cores import physical_cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight processors: 0-3 two hyper-threaded cores, 4-7 efficiency cores."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    for cpu, siblings in enumerate(["0-1", "0-1", "2-3", "2-3", "4", "5", "6", "7"]):
        directory = tmp_path / f"system/cpu/cpu{cpu}/topology"
        directory.mkdir(parents=True)
        (directory / "thread_siblings_list").write_text(siblings + "\n")
    return tmp_path


def test_one_thread_a_core(machine: Path) -> None:
    assert physical_cores(machine, machine / "none") == [0, 2, 4, 5, 6, 7]


def test_efficiency_cores_are_left_out(machine: Path) -> None:
    (machine / "cpu_atom").mkdir()
    (machine / "cpu_atom/cpus").write_text("4-7\n")
    assert physical_cores(machine, machine / "none") == [0, 2]


def test_a_quota_bounds_them(machine: Path) -> None:
    quota = machine / "cpu.max"
    quota.write_text("350000 100000\n")
    assert physical_cores(machine, quota) == [0, 2, 4]
    quota.write_text("50000 100000\n")
    assert physical_cores(machine, quota) == [0]
    quota.write_text("max 100000\n")
    assert len(physical_cores(machine, quota)) == 6


def test_a_hidden_topology_counts_every_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5})
    assert physical_cores(tmp_path, tmp_path / "none") == [3, 5]
