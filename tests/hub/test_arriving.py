"""Quantizing while the shards arrive from the fake hub: what is done when, and the same bytes as after a pull."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest

from localmoe import store
from localmoe.errors import CheckpointError, HubError, StorageError, VerificationError
from localmoe.formats.journal import JOURNAL_NAME
from localmoe.hub import ModelRef, cache, download, pull
from localmoe.hub.download import pull_without_weights
from quantize import arriving
from quantize.arriving import Progress, comes_in_parts, quantize_arriving
from quantize.pipeline import quantize

REPO = "maker/Tiny-MoE"
SHARDS = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]


@pytest.fixture
def hub(hub, sharded_demo):
    hub.files = dict(sharded_demo)
    return hub


def arrive(output: Path, **options):
    found = pull_without_weights(ModelRef(REPO, None, None))
    assert comes_in_parts(found)
    return quantize_arriving(found, output, "balanced", **options)


def finish(source: Path, output: Path):
    return quantize(source, output, "balanced", gate=None)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def snapshot(hub) -> Path:
    return cache.repo_directory(REPO) / "snapshots" / hub.commit


def bodies(hub) -> list[str]:
    """The shards that were asked for whole, in that order."""
    names = {f"/cdn/{sha256(hub.files[name])}": name for name in SHARDS}
    return [names[request.path] for request in hub.requests if request.path in names and request.range is None]


def units(output: Path) -> list[str]:
    lines = (output / JOURNAL_NAME).read_text(encoding="utf-8").splitlines()
    return [entry["unit"] for entry in map(json.loads, lines) if "unit" in entry]


def test_a_shard_is_quantized_while_others_come_and_the_result_is_the_same_to_the_bit(hub, tmp_path):
    """The third shard comes only once something was quantized."""
    output = tmp_path / "output"
    hub.stall = {SHARDS[2]: 1_100_000}
    at_release: list[Progress] = []

    def watch(step: Progress) -> None:
        if step.quantized_bytes > 3_000_000 and not hub.release.is_set():
            at_release.append(step)
            hub.release.set()

    report = arrive(output, progress=watch)
    assert at_release, "nothing was quantized before the last shard had come"
    assert at_release[0].pulled_bytes < at_release[0].pull_bytes - 1_000_000
    assert report.path == snapshot(hub)
    assert {file.state for file in report.files} <= {"downloaded", "present"}
    assert not (output / "localmoe.json").exists()

    hub.forget_requests()
    done = finish(report.path, output)
    assert done.resumed_bytes == done.source_bytes
    assert not hub.requests
    finish(report.path, tmp_path / "afterwards")
    assert contents(output) == contents(tmp_path / "afterwards")
    assert cache.find_snapshot(REPO, "main") == report.path


def test_what_a_plan_compares_comes_first(hub, tmp_path, monkeypatch):
    """The MTP layer's copies of embedding and head lie in the last shard, as V3's do."""
    monkeypatch.setattr(download, "WORKERS", 1)
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path / "home"))
    output = store.artifact_dir(REPO, "balanced")
    assert store.unfinished_bytes(output) == 0
    arrive(output)
    assert bodies(hub) == [SHARDS[0], SHARDS[3], SHARDS[1], SHARDS[2]]
    assert store.unfinished_bytes(output) >= (output / "model.safetensors.partial").stat().st_size > 5_000_000


@pytest.mark.parametrize("moment", [0.3, 0.8])
def test_interrupted_both_go_on(hub, tmp_path, ordinary, moment):
    output = tmp_path / "output"
    hub.stall = {SHARDS[2]: 2_000_000}

    def interrupt(step: Progress) -> None:
        if step.quantize_bytes and step.quantized_bytes > moment * step.quantize_bytes:
            hub.release.set()
            raise KeyboardInterrupt
        if step.quantize_bytes and moment > 0.5:
            hub.release.set()

    with pytest.raises(KeyboardInterrupt):
        arrive(output, progress=interrupt)
    assert not (output / "localmoe.json").exists()
    before = units(output)
    assert before
    hub.forget_requests()
    hub.sent.clear()
    arrive(output)
    assert SHARDS[0] not in bodies(hub)
    assert units(output)[: len(before)] == before
    assert len(units(output)) == len(set(units(output)))
    assert finish(snapshot(hub), output).resumed_bytes > 0
    for name in ("model.safetensors", "config.json", "model.safetensors.index.json"):
        assert (output / name).read_bytes() == (ordinary / name).read_bytes()


def test_all_pulled_and_quantized_in_part_the_ordinary_run_goes_on(hub, tmp_path, ordinary):
    output = tmp_path / "output"

    def interrupt(step: Progress) -> None:
        if step.pulled_bytes == step.pull_bytes and step.quantized_bytes > 0.2 * max(step.quantize_bytes, 1):
            raise KeyboardInterrupt

    found = pull(ModelRef(REPO, None, None))
    with pytest.raises(KeyboardInterrupt):
        arrive(output, progress=interrupt)
    done = finish(found.path, output)
    assert 0 < done.resumed_bytes < done.source_bytes
    assert (output / "model.safetensors").read_bytes() == (ordinary / "model.safetensors").read_bytes()


def test_a_shard_with_wrong_bytes_ends_it_and_what_is_right_stays(hub, tmp_path, ordinary):
    output = tmp_path / "output"
    data = bytearray(hub.files[SHARDS[2]])
    data[-1] ^= 1
    hub.other_bytes = {SHARDS[2]: bytes(data)}
    with pytest.raises(VerificationError, match=SHARDS[2]):
        arrive(output)
    assert not (output / "localmoe.json").exists()
    kept = units(output) if (output / JOURNAL_NAME).exists() else []
    hub.other_bytes = {}
    arrive(output)
    assert units(output)[: len(kept)] == kept
    finish(snapshot(hub), output)
    assert (output / "model.safetensors").read_bytes() == (ordinary / "model.safetensors").read_bytes()


def test_a_damaged_shard_that_lies_here_is_repaired_first(hub, tmp_path, ordinary):
    """Its header too: what it said is not believed."""
    path = pull(ModelRef(REPO, None, None)).path
    blob = (path / SHARDS[1]).resolve()
    blob.write_bytes(b"\xff" * 64 + blob.read_bytes()[64:])
    report = arrive(tmp_path / "output")
    assert report.repaired == (SHARDS[1],)
    finish(path, tmp_path / "output")
    assert (tmp_path / "output/model.safetensors").read_bytes() == (ordinary / "model.safetensors").read_bytes()


def test_a_quantization_that_fails_stops_the_pull(hub, tmp_path, monkeypatch):
    hub.stall = {SHARDS[2]: 1_100_000}

    def fail(*_) -> None:
        threading.Timer(0.5, hub.release.set).start()
        raise StorageError("the disk is full")

    monkeypatch.setattr(arriving, "_stream", fail)
    with pytest.raises(StorageError, match="the disk is full"):
        arrive(tmp_path / "output")
    assert cache.find_snapshot(REPO) is None


def test_a_hub_that_goes_away_ends_it(hub, tmp_path):
    found = pull_without_weights(ModelRef(REPO, None, None))
    hub.down = True
    with pytest.raises(HubError):
        quantize_arriving(found, tmp_path / "output", "balanced")


def test_what_does_not_come_in_parts(hub):
    ref = ModelRef(REPO, None, None)
    assert comes_in_parts(pull_without_weights(ref))
    config = json.loads(hub.files["config.json"])
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    hub.files["config.json"] = json.dumps(config).encode()
    assert not comes_in_parts(pull_without_weights(ref))


def test_quantize_finds_a_source_that_is_not_what_was_pulled(hub, tmp_path):
    """A bit of a weight has changed on the disk: quantizing reads every byte, so it notices."""
    path = pull(ModelRef(REPO, None, None)).path
    blob = (path / SHARDS[3]).resolve()
    right = blob.read_bytes()
    blob.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{SHARDS[3]}: its bytes are not those that were pulled"):
        finish(path, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_what_was_made_of_a_damaged_source_is_made_again(hub, tmp_path, ordinary, monkeypatch):
    """Interrupted before the damage is noticed, then repaired: nothing of the first run counts."""
    path = pull(ModelRef(REPO, None, None)).path
    blob = (path / SHARDS[0]).resolve()
    right = blob.read_bytes()
    blob.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))

    def interrupt(step) -> None:
        if step.done_bytes > 0.4 * step.total_bytes:
            raise KeyboardInterrupt

    from quantize import hashing

    with monkeypatch.context() as patched:
        patched.setattr(hashing.SourceHasher, "_hash", lambda self, path: self._stopped.wait())  # too slow to notice
        with pytest.raises(KeyboardInterrupt):
            quantize(path, tmp_path / "output", "balanced", gate=None, progress=interrupt)
    assert units(tmp_path / "output")
    assert pull(ModelRef(REPO, None, None)).repaired == (SHARDS[0],)
    assert finish(path, tmp_path / "output").resumed_bytes == 0
    assert (tmp_path / "output/model.safetensors").read_bytes() == (ordinary / "model.safetensors").read_bytes()
