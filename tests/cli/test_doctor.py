"""`localmoe doctor` with probes that answer at once, and once for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from localmoe.cli.doctor import what_would_help
from localmoe.offload.machine import FIGURE_UNITS, Figure
from localmoe.offload.probe import Card, Facts
from localmoe.offload.record import NAME, read

GIB = 1 << 30
FACTS = Facts(
    cpu="A CPU", processors=8, cores=4, features=("avx2", "fma"), tiers=("portable", "avx2"), cache_bytes=32 << 20,
    memory_bytes=64 * GIB, available_bytes=48 * GIB, huge_pages="madvise", memory_limit=None, cpu_limit=None, load=0.1,
    cards=(), failed=(),
)  # fmt: skip
FIGURES = {
    "read": Figure(60e9, "measured"),
    "weights.int4": Figure(55e9, "measured"),
    "experts": Figure(44e9, "measured"),
    "many.int4": Figure(4e11, "measured"),
    "disk": Figure(3e9, "measured", "ext4, 256 MiB in pieces"),
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What the probes will find."""
    found = {"facts": FACTS, "figures": FIGURES, "failed": ()}
    monkeypatch.setattr("localmoe.offload.probe.look", lambda: found["facts"])
    monkeypatch.setattr(
        "localmoe.offload.measure.measure", lambda facts, home, threads, tell: (found["figures"], found["failed"])
    )
    return found


def changed(**changes: object) -> Facts:
    return Facts(**{**FACTS.__dict__, **changes})


def test_it_says_what_it_found_and_keeps_it(invoke, machine: dict, home: Path) -> None:
    result = invoke("doctor")
    assert (result.status, result.err) == (0, "")
    for line in (
        "CPU           A CPU, 4 threads on 8 processors",
        "kernels       avx2, of portable, avx2",
        "memory        64 GiB, 48 GiB available",
        "limits        none by the control group",
        "GPU           no NVIDIA card found",
        "memory reads  60 GB/s",
        "disk reads    3 GB/s (ext4, 256 MiB in pieces)",
        "one token     int4 55 GB/s",
        "experts       44 GB/s (int4, a token's in a layer)",
        "many tokens   int4 400 G multiply-adds/s",
        f"kept for `localmoe plan` in {home / NAME}",
    ):
        assert line in result.out.splitlines()
    assert "faster:" not in result.out
    record, _ = read(home)
    assert record is not None
    assert (record.cpu, record.threads, record.tier) == ("A CPU", 4, "avx2")
    assert record.figures["read"] == Figure(60e9, "cached")


def test_json(invoke, machine: dict, home: Path) -> None:
    card = Card("RTX \x1b[31m4060", 8 * GIB, 7 * GIB, "565", "8.9", (4, 8))
    machine["facts"] = changed(cards=(card,))
    record = invoke("doctor", "--json", "--threads", "2").json
    assert (record["tier"], record["threads"], record["cores"]) == ("avx2", 2, 4)
    assert record["figures"]["disk"] == {
        "value": 3e9, "origin": "measured", "note": "ext4, 256 MiB in pieces", "unit": "bytes/s"
    }  # fmt: skip
    assert record["cards"][0]["link"] == [4, 8]
    assert record["saved"] == str(home / NAME)
    assert any("--threads 2 leaves 2 of 4 cores idle" in line for line in record["advice"])
    assert "\x1b" not in invoke("doctor").out


def test_what_failed_is_a_line_and_not_the_end(invoke, machine: dict, home: Path) -> None:
    machine["facts"] = changed(failed=("GPU: nvidia-smi did not answer in 3 s",))
    machine["figures"], machine["failed"] = {}, ("disk read bandwidth: No space left on device",)
    result = invoke("doctor")
    assert result.status == 0
    assert "failed: GPU: nvidia-smi did not answer in 3 s\nfailed: disk read bandwidth: No space left" in result.out
    assert not (home / NAME).exists()
    machine["figures"] = FIGURES
    (home / NAME).mkdir()
    result = invoke("doctor", "--json")
    assert result.status == 0
    assert result.json["saved"] is None
    assert "cannot write" in result.json["failed"][-1]


@pytest.mark.parametrize(
    ("changes", "figures", "said"),
    [
        ({"tiers": ("portable",)}, {}, "pass the CPU through"),
        ({}, {"read": Figure(17e9, "measured")}, "memory reads 17 GB/s"),
        ({"cpu_limit": 1.5}, {}, "may use 1.5 of 8 processors"),
        ({"memory_limit": 16 * GIB}, {}, "may use 16 GiB of 64 GiB"),
        ({}, {"disk": Figure(0.4e9, "measured")}, "the disk reads 0.4 GB/s"),
        ({"huge_pages": "never"}, {}, "transparent huge pages are off"),
        ({"load": 7.0}, {}, "a load of 7.0"),
        ({"cards": (Card("A", None, None, "1", "8.9", None),)}, {}, "says what the card adds"),
    ],
)
def test_advice(changes: dict, figures: dict, said: str) -> None:
    (line,) = what_would_help(changed(**changes), FIGURES | figures, 4)
    assert said in line


def test_a_good_machine_needs_no_advice() -> None:
    assert what_would_help(FACTS, FIGURES, 4) == []


def test_for_real_and_plan_goes_by_it(home: Path, tmp_path: Path) -> None:
    """The whole program, measuring; only that it answers within its means, not how fast the machine is."""

    def localmoe(*arguments: str) -> dict:
        command = [sys.executable, "-m", "localmoe", *arguments, "--json"]
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    doctor = localmoe("doctor")
    assert doctor["tier"] in doctor["tiers"]
    assert "read" in doctor["figures"] or doctor["failed"]
    assert set(doctor["figures"]) < set(FIGURE_UNITS)
    assert [path.name for path in home.iterdir() if path.name != "models"] == [NAME]
    plan = localmoe("plan", "demo:compact")
    for name, figure in doctor["figures"].items():
        assert plan["figures"][name]["value"] == pytest.approx(figure["value"])
        assert plan["figures"][name]["origin"] == "cached"
