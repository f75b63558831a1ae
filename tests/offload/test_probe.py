"""The probes, on a system of our own making and with cards that are not there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from localmoe.offload import probe
from localmoe.offload.probe import Card, Places, cards, last_level_cache, look, usable_memory

SMI = "NVIDIA GeForce RTX 4060, 8188, 7012, 565.57.01, 8.9, 4, 8\nOdd, Inc. card, [N/A], [N/A], 1, 12.1, [N/A], [N/A]\n"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    files = {
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: A CPU @ 3 GHz\nflags\t\t: fpu avx2 fma avx_vnni\n",
        "proc/meminfo": "MemTotal:       32000000 kB\nMemAvailable:   20000000 kB\n",
        "proc/self/cgroup": "0::/user/box\n",
        "sys/fs/cgroup/user/box/memory.max": "max\n",
        "sys/fs/cgroup/user/memory.max": "8589934592\n",
        "sys/fs/cgroup/user/box/cpu.max": "150000 100000\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    }
    for cpu, l3 in ((0, "0-1"), (1, "0-1"), (2, "2")):
        cache = f"sys/devices/system/cpu/cpu{cpu}/cache"
        files |= {f"{cache}/index3/{name}": text for name, text in
                  (("level", "3"), ("type", "Unified"), ("size", "32768K"), ("shared_cpu_list", l3))}  # fmt: skip
        files |= {f"{cache}/index0/{name}": text for name, text in
                  (("level", "1"), ("type", "Data"), ("size", "32K"), ("shared_cpu_list", str(cpu)))}  # fmt: skip
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(probe.os, "sched_getaffinity", lambda _: {0, 1, 2})
    return Places(tmp_path / "proc", tmp_path / "sys")


def test_what_the_system_tells(places: Places) -> None:
    facts = look(places, lambda _: SMI)
    assert facts.cpu == "A CPU @ 3 GHz"
    assert facts.processors == 3
    assert facts.features == ("avx2", "fma", "avx_vnni")
    assert facts.tiers[0] == "portable"
    assert facts.cache_bytes == 2 * 32 << 20  # two caches of level 3, one of them shared
    assert (facts.memory_bytes, facts.available_bytes) == (32_000_000 * 1024, 20_000_000 * 1024)
    assert facts.memory_limit == 8 << 30  # the parent's, since the group itself has none
    assert facts.cpu_limit == 1.5
    assert facts.huge_pages == "madvise"
    assert [card.name for card in facts.cards] == ["NVIDIA GeForce RTX 4060", "Odd, Inc. card"]
    assert facts.failed == ()


def test_what_may_be_used_is_the_less_of_what_is_available_and_the_limit(places: Places, tmp_path: Path) -> None:
    assert usable_memory(places) == 8 << 30
    (places.proc / "meminfo").write_text("MemTotal: 32000000 kB\nMemAvailable: 2000 kB\n")
    assert usable_memory(places) == 2000 * 1024
    assert usable_memory(Places(tmp_path / "none", tmp_path / "none")) is None


def test_cards() -> None:
    first, second = cards(lambda _: SMI)
    assert first == Card("NVIDIA GeForce RTX 4060", 8188 << 20, 7012 << 20, "565.57.01", "8.9", (4, 8))
    assert first.link_bytes_per_second == pytest.approx(15.76e9, rel=1e-3)
    assert second == Card("Odd, Inc. card", None, None, "1", "12.1", None)
    assert second.link_bytes_per_second is None


def test_no_nvidia_smi_is_no_card_and_no_failure(places: Places) -> None:
    def missing(command: object) -> str:
        raise FileNotFoundError(2, "No such file or directory", "nvidia-smi")

    facts = look(places, missing)
    assert facts.cards == ()
    assert facts.failed == ()


def test_a_probe_that_fails_leaves_one_line_and_the_others_go_on(places: Places) -> None:
    def broken(command: object) -> str:
        raise RuntimeError("nvidia-smi failed: Driver/library version mismatch\nmore")

    (places.proc / "meminfo").unlink()
    facts = look(places, broken)
    assert facts.failed == (
        "memory: No such file or directory",
        "GPU: nvidia-smi failed: Driver/library version mismatch",
    )
    assert facts.memory_bytes is None
    assert facts.cpu == "A CPU @ 3 GHz"


def test_nvidia_smi_that_hangs_or_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(RuntimeError, match="nvidia-smi failed: NVIDIA-SMI has failed"):
        cards()

    def hang(*args: object, **kwargs: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 3)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(RuntimeError, match="did not answer in 3 s"):
        cards()


def test_a_system_without_caches_or_limits(tmp_path: Path) -> None:
    assert last_level_cache(tmp_path) == 0
    facts = look(Places(tmp_path, tmp_path), lambda _: "", ask_cards=False)
    assert facts.cpu == "unknown"
    assert facts.memory_limit is None
    assert facts.cpu_limit is None
    assert [line.split(":")[0] for line in facts.failed] == ["CPU", "memory"]
