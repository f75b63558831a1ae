"""What is said when a model is opened that memory does not hold."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import localmoe
from localmoe import store
from localmoe.cli import opening, options, streams
from localmoe.errors import UsageError

DEMO = Path(localmoe.__file__).parent / "data" / "demo"


def said(monkeypatch: pytest.MonkeyPatch, ram: str | None, *, reads_the_disk: bool = True) -> list[str]:
    lines: list[str] = []
    engine = SimpleNamespace(reads_the_disk=reads_the_disk)
    monkeypatch.setattr(streams, "remark", lines.append)
    monkeypatch.setattr(opening, "load_engine", lambda path, machine: engine)
    machine = options.machine("cpu", "auto", 2, None, ram, 128, "auto")
    assert opening.open_found(store.resolve(str(DEMO)), machine) is engine
    return lines


def test_a_model_larger_than_memory_says_what_to_expect(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo_budget: str
) -> None:
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path))
    (line,) = said(monkeypatch, demo_budget)
    assert line.startswith(f"{DEMO} is larger than the memory it may use: ")
    assert "experts wait on the disk; about " in line
    assert line.endswith(" tokens/s, if that reads 2 GB/s (assumed; localmoe doctor measures it)")


def test_nothing_is_said_of_what_fits(monkeypatch: pytest.MonkeyPatch, demo_budget: str) -> None:
    assert said(monkeypatch, "8GiB") == []
    assert said(monkeypatch, demo_budget, reads_the_disk=False) == []


def test_a_speed_that_cannot_be_reckoned_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise UsageError("no")

    monkeypatch.setattr("localmoe.cli.plan.forecast", fail)
    assert said(monkeypatch, "8GiB") == []


@pytest.fixture
def demo_budget() -> str:
    """--ram that holds what every token of the demo reads and about half of its experts."""
    from localmoe.formats.checkpoint import Checkpoint
    from localmoe.memory import USABLE, MemoryNeeds
    from localmoe.model.config import ModelConfig

    with Checkpoint.open(DEMO) as checkpoint:
        config = ModelConfig.from_dict(checkpoint.config)
        needs = MemoryNeeds.of(config, checkpoint.tensors.values(), 2 * config.latent_width)
    return f"{int((needs.always + needs.experts // 2 + 128 * needs.cache_per_token) / USABLE) // 1024}KiB"
