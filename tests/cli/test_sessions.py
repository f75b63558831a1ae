"""`--session` and `sessions`, with the fake engine: what goes on from where, and what is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localmoe import sessions
from localmoe.sessions import Claim, Facts


def kept(name: str) -> Facts:
    return sessions.read_facts(sessions.path_of(name))


def test_runs_of_one_session_are_one_conversation(invoke, engine, home: Path):
    first = invoke("run", "demo", "one", "--session", "s", "--system", "Be brief", "--temp", "0.5", "--seed", "7")
    assert (first.status, first.out) == (0, "Once upon a time.\n")
    assert engine.opened is None
    invoke("run", "demo", "two", "--session", "s", "--logit-bias", "5=-inf")
    assert engine.opened == (home / "sessions" / "s.safetensors", "demo:balanced")
    invoke("run", "demo", "three", "--session", "s", "--top-k", "3", "--json")
    contents = [message["content"] for message in engine.calls[2]["prompt"]]
    assert contents == ["Be brief", "one", "Once upon a time.", "two", "Once upon a time.", "three"]
    assert [call["temperature"] for call in engine.calls] == [0.5] * 3
    assert [call["top_k"] for call in engine.calls] == [0, 0, 3]
    assert [call["seed"] for call in engine.calls] == [7, 8, 9]
    assert [call["logit_bias"] for call in engine.calls] == [{}, {5: float("-inf")}, {5: float("-inf")}]
    assert all(call["reuse_prefix"] for call in engine.calls)
    assert kept("s").seed == 10
    assert len(kept("s").messages) == 7
    assert not list(home.glob("sessions/.*"))  # no lock is left


def test_other_options_of_a_session(invoke, engine):
    assert invoke("run", "demo", "one", "--session", "s", "--cache-dtype", "bf16").status == 0
    assert engine.machine.cache_dtype == "bf16"
    assert invoke("run", "demo", "two", "--session", "s").status == 0
    assert engine.machine.cache_dtype == "bf16"
    outcome = invoke("run", "demo", "two", "--session", "s", "--cache-dtype", "int8")
    assert outcome.status == 2
    assert "session s holds its latents in bf16; leave the option out" in outcome.err
    with Claim.take("s"):
        outcome = invoke("run", "demo", "two", "--session", "s")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == "localmoe: session s is open in another localmoe; leave it there first\n"
    assert len(engine.calls) == 2


@pytest.mark.parametrize("name", ["../s", "a/b", ".s", ""])
def test_a_session_is_no_path(invoke, engine, name):
    for arguments in (("run", "demo", "x", "--session", name), ("sessions", "show", name), ("sessions", "rm", name)):
        outcome = invoke(*arguments)
        assert outcome.status == 2
        assert "is not a name" in outcome.err
    assert not engine.calls


def test_a_full_disk_costs_the_session_and_not_the_answer(invoke, engine, home: Path):
    (home / "sessions").mkdir()
    (home / "sessions" / "full").touch()
    outcome = invoke("run", "demo", "one", "--session", "s")
    assert (outcome.status, outcome.out) == (1, "Once upon a time.\n")
    assert outcome.err.endswith("No space left on device\n")
    assert outcome.err.count("\n") == 1
    outcome = invoke("run", "demo", "one", "--session", "s", "--json")
    assert outcome.status == 1
    assert outcome.json["text"] == "Once upon a time."
    assert outcome.json["error"]["kind"] == "storage"


def test_a_damaged_session_is_refused_before_the_model_is_loaded(invoke, engine):
    invoke("run", "demo", "one", "--session", "s")
    path = sessions.path_of("s")
    path.write_bytes(path.read_bytes()[:-9])
    outcome = invoke("run", "demo", "two", "--session", "s", "--json")
    assert outcome.status == 1
    assert outcome.json["error"]["kind"] == "session"
    assert "cut short or damaged" in outcome.err
    assert len(engine.calls) == 1


def test_a_full_context_is_refused_or_makes_room(invoke, engine):
    engine.max_context = 20
    for _ in range(3):  # each turn has 1 + 4 words
        assert invoke("run", "demo", "one", "--session", "s").status == 0
    long = "1 2 3 4 5"
    outcome = invoke("run", "demo", long, "--session", "s")
    assert outcome.status == 1
    assert (
        "session s and the prompt have 20 tokens and the context holds 20; --when-full drop lets go of the oldest 2 "
        in outcome.err
    )
    assert invoke("run", "demo", long, "--session", "s", "--when-full", "drop").status == 0
    assert [message["content"] for message in engine.calls[-1]["prompt"]] == ["one", "Once upon a time.", long]
    outcome = invoke("run", "demo", "x " * 30, "--session", "s", "--when-full", "drop")
    assert outcome.status == 1
    assert "even alone the prompt is too long" in outcome.err
    assert invoke("run", "demo", "x", "--session", "s", "--when-full", "ask").status == 2
    assert len(kept("s").messages) == 4


def test_the_list_and_what_it_shows(invoke, engine, home: Path):
    assert "no sessions" in invoke("sessions").out
    invoke("run", "demo", "What is \x1b[31mred?", "--session", "s", "--seed", "1")
    sessions.path_of("broken").write_bytes(b"\0")
    listed = invoke("sessions", "list", terminals=("stdout",)).out
    assert "s        demo:balanced" in listed
    assert "cannot be used: show says why" in listed
    record = invoke("sessions", "list", "--json").json["sessions"]
    assert [entry["name"] for entry in record] == ["broken", "s"]
    assert record[1] | {"modified": 0} == {
        "name": "s",
        "path": str(home / "sessions" / "s.safetensors"),
        "size_bytes": sessions.path_of("s").stat().st_size,
        "modified": 0,
        "model": "demo:balanced",
        "tokens": 7,
        "turns": 1,
        "cache_dtype": "bf16",
        "problem": None,
    }
    shown = invoke("sessions", "show", "s", terminals=("stdout",)).out
    assert "[user]\nWhat is [31mred?\n" in shown
    assert "[assistant]\nOnce upon a time.\n" in shown
    assert invoke("sessions", "show", "s", "--json").json["seed"] == 2
    assert "cut short or damaged" in invoke("sessions", "show", "broken").err
    for action in ("show", "rm"):
        outcome = invoke("sessions", action, "brokn")
        assert outcome.status == 1
        assert "there is no session brokn; did you mean broken?" in outcome.err
    assert "`localmoe sessions list` shows them" in invoke("sessions", "show", "wholly-other").err
    assert json.loads(invoke("sessions", "rm", "broken", "--json").out)["removed"] == [str(sessions.path_of("broken"))]
    assert invoke("sessions", "rm", "s").status == 0
    assert invoke("sessions", "rm", "s").status == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("shwo",), "'shwo' is not one of"), (("show",), "name the session"), (("list", "x"), "takes no name")],
)
def test_wrong_usage(invoke, arguments, message):
    outcome = invoke("sessions", *arguments)
    assert outcome.status == 2
    assert message in outcome.err
