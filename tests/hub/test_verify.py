"""`verify`: a manifest, a cache and the demo, each with every kind of damage."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from localmoe.errors import CheckpointError, ModelNotFoundError, VerificationError
from localmoe.hub import Progress, verify_artifact, verify_source
from localmoe.hub.cache import missing_files
from localmoe.hub.verify import demo_directory

FILES = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"first shard" * 1000,
    "model-00002-of-00002.safetensors": b"second shard" * 1000,
}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    entries = {}
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
        entries[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (tmp_path / "localmoe.json").write_text(json.dumps({"format": 1, "files": entries}))
    return tmp_path


def problems(report) -> dict[str, str]:
    return {problem.file: problem.reason for problem in report.problems}


def test_an_artifact_as_it_was_written(artifact):
    seen: list[Progress] = []
    report = verify_artifact(artifact, progress=seen.append)
    total = sum(map(len, FILES.values()))
    assert (report.ok, report.checked, report.checked_bytes) == (True, 3, total)
    assert (seen[-1].done_bytes, seen[-1].total_bytes) == (total, total)
    report.raise_if_bad()


def test_every_kind_of_damage_is_named(artifact):
    first, second = sorted(FILES)[1:]
    data = bytearray(FILES[first])
    data[5000] ^= 1
    (artifact / first).write_bytes(data)
    (artifact / second).write_bytes(FILES[second][:-1])
    (artifact / "config.json").unlink()
    (artifact / "model-00003-of-00002.safetensors").write_bytes(b"whose?")
    report = verify_artifact(artifact)
    assert problems(report) == {
        first: "its SHA-256 differs",
        second: f"{len(FILES[second]) - 1} bytes, not {len(FILES[second])}",
        "config.json": "missing",
        "model-00003-of-00002.safetensors": "not in the manifest",
    }
    with pytest.raises(VerificationError) as caught:
        report.raise_if_bad()
    assert "\n" not in str(caught.value)
    for name in problems(report):
        assert name in str(caught.value)


def test_not_an_artifact(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no localmoe\.json"):
        verify_artifact(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        verify_source(tmp_path)


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        '{"files": 3}',
        '{"files": {"config.json": "x"}}',
        "[" * 100_000,
        json.dumps({"files": {"../../etc/passwd": {"sha256": "0" * 64, "bytes": 1}}}),
        json.dumps({"files": {"config.json": {"sha256": "0" * 63, "bytes": 1}}}),
        json.dumps({"files": {"config.json": {"sha256": 3, "bytes": 1}}}),
        json.dumps({"files": {"config.json": {"sha256": "0" * 64, "bytes": "1"}}}),
    ],
)
def test_a_malformed_manifest_is_one_line(artifact, manifest):
    (artifact / "localmoe.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"localmoe\.json") as caught:
        verify_artifact(artifact)
    assert "\n" not in str(caught.value)


def test_the_demo_source_is_checked_against_models_toml(monkeypatch, tmp_path):
    assert verify_source(demo_directory()).ok
    copy = tmp_path / "demo"
    shutil.copytree(demo_directory(), copy)
    monkeypatch.setattr("localmoe.hub.verify.demo_directory", lambda: copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    (copy / "tokenizer_config.json").unlink()
    assert problems(verify_source(copy)) == {
        "model.safetensors": "its SHA-256 differs",
        "tokenizer_config.json": "missing",
    }


def test_a_directory_of_the_users_own_has_no_hashes(tmp_path):
    copy = tmp_path / "mine"
    shutil.copytree(demo_directory(), copy)
    report = verify_source(copy)
    assert (report.ok, report.checked) == (True, 0)
    assert "model.safetensors" in report.unrecorded
    (copy / "model.safetensors").unlink()
    assert problems(verify_source(copy)) == {"model.safetensors": "missing"}


def test_what_a_checkpoint_lacks(tmp_path):
    assert missing_files(tmp_path) == ["config.json", "model.safetensors"]
    (tmp_path / "config.json").write_text("{}")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "../x"}}))
    (tmp_path / "one.safetensors").touch()
    assert missing_files(tmp_path) == ["../x (not a file name)", "two.safetensors"]
    maps = ("3", "{}", "[]", '{"a": 3}', '{"a": []}')
    for damaged in ("", "[]", "{}", *(f'{{"weight_map": {weight_map}}}' for weight_map in maps)):
        index.write_text(damaged)
        assert missing_files(tmp_path), damaged
