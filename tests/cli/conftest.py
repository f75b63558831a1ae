"""A model directory that holds only what finding it needs, the fake engine, and three ways to call the program."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from localmoe import store
from localmoe.cli import opening
from localmoe.cli.app import main

PROGRAM = Path(__file__).with_name("fake_localmoe.py")


def _load_fake() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake_localmoe", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_localmoe"] = module
    spec.loader.exec_module(module)
    return module


fake_localmoe = _load_fake()


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


class Stream(io.TextIOWrapper):
    """A standard stream in memory that may claim a person is at the other end."""

    def __init__(self, content: bytes = b"", *, terminal: bool) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8", write_through=True)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def text(self) -> str:
        return self.buffer.getvalue().decode()  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own with the artifact demo:balanced, and no user config."""
    home = tmp_path / "home"
    artifact = home / "models" / "demo" / "balanced"
    artifact.mkdir(parents=True)
    (artifact / "config.json").write_text("{}")
    (artifact / "localmoe.json").write_text(json.dumps({"format": 1, "recipe": "balanced", "files": {}}))
    monkeypatch.setenv("LOCALMOE_HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert store.home() == home
    return home


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The fake engine that the command under test will be given; `engine.machine` is what was asked for."""
    fake = fake_localmoe.FakeEngine()

    def load_engine(path: Path, machine: object) -> object:
        fake.path, fake.machine = path, machine
        return fake

    monkeypatch.setattr(opening, "load_engine", load_engine)
    return fake


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Call main() in this process. `terminals` says which of stdin, stdout, stderr a person is at."""

    def call(*arguments: str, stdin: bytes = b"", terminals: tuple[str, ...] = ()) -> Outcome:
        streams = {
            name: Stream(stdin if name == "stdin" else b"", terminal=name in terminals)
            for name in ("stdin", "stdout", "stderr")
        }
        with monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            status = main(list(arguments))
        return Outcome(status, streams["stdout"].text(), streams["stderr"].text())

    return call


@dataclass
class Program:
    """The program with the fake engine, as a process of its own."""

    environment: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = (sys.executable, str(PROGRAM))

    def start(self, *arguments: str, environment: Mapping[str, str] | None = None, **kwargs: Any) -> subprocess.Popen:
        merged = self.environment | dict(environment or {})
        return subprocess.Popen([*self.command, *arguments], env=merged, **kwargs)

    def run(self, *arguments: str, environment: Mapping[str, str] | None = None, **kwargs: Any) -> Any:
        merged = self.environment | dict(environment or {})
        kwargs = {"capture_output": True, "timeout": 30} | kwargs
        return subprocess.run([*self.command, *arguments], env=merged, **kwargs)


@pytest.fixture
def program(home: Path) -> Program:
    return Program(dict(os.environ))
