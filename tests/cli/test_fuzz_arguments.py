"""Arguments at random: never a traceback, never an unforeseen failure, always one line and a status of the contract."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import typer

from localmoe.cli import app as program
from localmoe.cli import opening
from localmoe.cli import quantize as quantize_command
from localmoe.errors import DeviceError, HubError, StorageError
from localmoe.hub import download
from localmoe.offload import measure

VALUES = [
    "", "0", "-1", "1", "3", "1.5", "nan", "inf", "1e309", "9" * 40, "0x10", "12GiB", "1.5GB", "12", "0B", "auto",
    "cpu", "cuda", "int8", "balanced", "compact", "source", "demo", "demo:compact", "demo:source", "demo:fast",
    "deepseek-r1", "deepseek-r2", "kimi-k2-instruct", "maker/Tiny-MoE", "a/b/c", "..", "../..", "/", "~", "~nobody/x",
    "/nowhere/x", "/dev/null", "file.txt", "new.png", "5=1", "5=-inf", "fox=1", "-", "--", "---", "=", "%s%n", "{}",
    "[]", "*", "$(id)", "\x1b[31mred", "\x1b]52;c;QQ==\x07", "\x00", "\n", "a\nb", "\u202e", "\udcff", "龍",
    "👩\u200d👧", "x" * 5000, "rtn", "mse",
]  # fmt: skip
INPUTS = [b"", b"", b"text\n", b"a\0b", b"\xff\xfe", "龍".encode(), b"\n"]


@pytest.fixture
def stubs(monkeypatch, tmp_path) -> object:
    """Nothing is downloaded, made, measured or opened; `run` talks with the fake engine."""
    fake = sys.modules["fake_localmoe"]
    stub = type("Stub", (), {"command": ""})()

    def load_engine(path: Path, machine: object, *more: object) -> object:
        if stub.command != "run":
            raise DeviceError("no model is opened here")
        return fake.FakeEngine()

    def refuse(error: Exception):
        def raising(*_: object, **__: object) -> object:
            raise error

        return raising

    monkeypatch.setattr(opening, "load_engine", load_engine)
    monkeypatch.setattr(quantize_command, "make_artifact", refuse(StorageError("nothing is made here")))
    monkeypatch.setattr(download, "ask_hub", refuse(HubError("no network")))
    monkeypatch.setattr(measure, "measure", lambda *_: ({}, ()))
    monkeypatch.setattr("localmoe.offload.probe.cards", lambda run=None: ())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("one two\n")
    return stub


def options_of() -> dict[str, list[str]]:
    """Every command with its options, as the program has them."""
    group = typer.main.get_command(program.app)
    return {
        name: [option for parameter in group.get_command(None, name).params for option in parameter.opts]
        for name in program.COMMANDS
    }


def arguments(chosen: random.Random, known: dict[str, list[str]]) -> tuple[str, list[str]]:
    """(command, arguments): mostly real options, with values that fit or do not, in any order."""
    command = chosen.choice([*known, "run", "run", "plan", chosen.choice(VALUES)])
    words = [chosen.choice(["demo", "demo", chosen.choice(VALUES)])] if chosen.random() < 0.9 else []
    for _ in range(chosen.randrange(5)):
        options = [option for option in known.get(command, []) if option.startswith("-")]
        kind = chosen.random()
        if options and kind < 0.6:
            words.append(chosen.choice(options))
            if chosen.random() < 0.7:
                words.append(chosen.choice(VALUES))
        elif kind < 0.8:
            words.append(chosen.choice(VALUES))
        elif options:
            option = chosen.choice(options)
            words.append(chosen.choice([f"{option}={chosen.choice(VALUES)}", option[:-1], option.upper(), option * 2]))
    if chosen.random() < 0.3:
        words.append("--json")
    chosen.shuffle(words)
    return command, [command, *words] if chosen.random() < 0.97 else words


@pytest.mark.parametrize("seed", range(8))
def test_two_hundred_argument_lists(invoke, stubs, capfd, seed: int) -> None:
    known = options_of()
    assert set(known["run"]) >= {"--temp", "-n", "--json", "--yes"}
    chosen = random.Random(seed)
    for _ in range(25):
        stubs.command, given = arguments(chosen, known)
        outcome = invoke(*given, stdin=chosen.choice(INPUTS))
        case = f"seed {seed}: {given!r}\n{outcome}"
        assert outcome.status in (0, 1, 2), case
        assert "Traceback" not in outcome.out + outcome.err or "--debug" in given, case
        assert "not a failure we foresaw" not in outcome.err, case
        if outcome.status:
            assert outcome.err.strip(), case
            said = [line for line in outcome.err.splitlines() if line.startswith("localmoe: ")]
            if "--debug" not in given and given and given[0] in known:
                assert len(said) == 1, case
                assert outcome.err.splitlines()[-1] == said[0], case
            assert "\x1b" not in outcome.err, case
        if "--json" in given and "--" not in given and outcome.out and "--help" not in given and "-h" not in given:
            json.loads(outcome.out)
        captured = capfd.readouterr()
        assert (captured.out, captured.err) == ("", ""), case  # nobody writes past the streams
