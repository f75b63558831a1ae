"""Names, claims and what a session's header says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from localmoe import sessions
from localmoe.errors import SessionError, UsageError
from localmoe.sessions import Claim, Facts

FACTS = Facts(
    messages=[{"role": "user", "content": "Hi \U0001f600\u0000"}, {"role": "assistant", "content": "龍"}],
    sampling={"temperature": 0.7, "top_k": 4},
    seed=5,
    logit_bias={7: -math.inf, 3: 1.5},
    model="demo:compact",
    model_hash="ab" * 32,
    cache_dtype="int8",
    tokens=12,
    draft_tokens=11,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path))
    return tmp_path


def put(name: str, metadata: object) -> Path:
    path = sessions.path_of(name)
    path.parent.mkdir(exist_ok=True)
    header = json.dumps({"__metadata__": metadata}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "/etc/passwd", ".hidden", "-x", "a..b", "a b", "a\n", "x" * 65, "é"]
)
def test_a_name_is_never_a_path(name: str) -> None:
    with pytest.raises(UsageError, match="is not a name"):
        sessions.path_of(name)


def test_names_lie_in_one_directory(home: Path) -> None:
    for name in ("a", "Work-2", "v1.0_x", "x" * 64):
        path = sessions.path_of(name)
        assert path.parent == home / "sessions"
        assert sessions.name_of(path) == name


def test_facts_come_back() -> None:
    assert sessions.read_facts(put("x", FACTS.to_metadata())) == FACTS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"localmoe_session": "2"}, r"a newer localmoe: update localmoe \(format '2'; this one reads 1\)"),
        ({"localmoe_session": "x\x1b"}, "another version"),
        ({"localmoe_session": None}, "another version"),
        ({"tokens": "-1"}, "damaged"),
        ({"tokens": "many"}, "damaged"),
        ({"cache_dtype": "fp8"}, "damaged"),
        ({"model_sha256": "0" * 63}, "damaged"),
        ({"model": 5}, "damaged"),
        ({"conversation": "{"}, "damaged"),
        ({"conversation": "[" * 100_000}, "damaged"),
        ({"conversation": '{"messages": [{"role": "root", "content": "x"}]}'}, "damaged"),
        ({"conversation": '{"messages": [], "sampling": {"top_k": true}, "seed": 1, "logit_bias": {}}'}, "damaged"),
        ({"conversation": '{"messages": [], "sampling": {}, "seed": -1, "logit_bias": {}}'}, "damaged"),
        ({"conversation": '{"messages": [], "sampling": {}, "seed": 1, "logit_bias": {"x": "1"}}'}, "damaged"),
        ({"conversation": '{"messages": [], "sampling": [], "seed": 1, "logit_bias": {}}'}, "damaged"),
        ({"conversation": '{"messages": [], "sampling": {}, "seed": 1, "logit_bias": []}'}, "damaged"),
        (
            {"conversation": '{"messages": [], "sampling": {}, "seed": 1, "logit_bias": {"1": 1' + "0" * 400 + "}}"},
            "damaged",
        ),
        ({"tokens": float("inf")}, "damaged"),
    ],
)
def test_facts_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(SessionError, match=message) as caught:
        sessions.read_facts(put("x", FACTS.to_metadata() | changes))
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{", b"\x02\0\0\0\0\0\0\0{]", b"\x02\0\0\0\0\0\0\0[]"]
)
def test_files_that_are_none(content: bytes) -> None:
    path = put("x", {})
    path.write_bytes(content)
    with pytest.raises(SessionError, match="session x: its file is"):
        sessions.read_facts(path)


def test_the_list_has_the_damaged_ones_too(home: Path) -> None:
    assert sessions.list_sessions() == []
    put("b", FACTS.to_metadata())
    put("a", {})
    listed = {"messages": [], "sampling": [], "seed": None, "logit_bias": {}}
    put("c", FACTS.to_metadata() | {"conversation": json.dumps(listed)})
    (home / "sessions" / ".b-temporary").write_bytes(b"")
    (home / "sessions" / "no session.safetensors").write_bytes(b"")
    (home / "sessions" / "dir.safetensors").mkdir()
    first, second, third = sessions.list_sessions()
    assert (first.name, first.facts, first.problem) == ("a", None, "session a: its file is not a session of localmoe's")
    assert (second.name, second.facts, second.problem) == ("b", FACTS, None)
    assert third.facts is None
    assert third.problem is not None
    assert "damaged" in third.problem


def test_what_a_killed_program_left_is_swept_away(home: Path) -> None:
    directory = home / "sessions"
    directory.mkdir()
    for name in (".x-abc_1234", ".x-y-abc_1234", ".xy-abc_1234", "x.safetensors", ".x-abcdefgh.lock"):
        (directory / name).touch()
    with Claim.take("x"):
        assert not (directory / ".x-abc_1234").exists()
    assert len(list(directory.iterdir())) == 4


def test_a_session_is_one_programs_at_a_time(home: Path) -> None:
    put("x", FACTS.to_metadata())
    with Claim.take("x"):
        with pytest.raises(SessionError, match="session x is open in another localmoe"):
            Claim.take("x")
        with pytest.raises(SessionError, match="open in another"):
            sessions.remove("x")
        with Claim.take("y"):
            pass
    with Claim.take("x"):
        pass
    assert sessions.remove("x") == home / "sessions" / "x.safetensors"
    assert list((home / "sessions").iterdir()) == []
    with pytest.raises(SessionError, match="there is no session x"):
        sessions.remove("x")
