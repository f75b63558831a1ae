"""Another model has another fingerprint, and the same one the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import localmoe
from localmoe.errors import CheckpointError
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.fingerprint import fingerprint

DEMO = Path(localmoe.__file__).parent / "data" / "demo"


def of(directory: Path) -> str:
    with Checkpoint.open(directory) as checkpoint:
        return fingerprint(directory, checkpoint.tensors.values())


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "elsewhere"))


def test_the_place_does_not_matter(copy: Path) -> None:
    assert of(copy) == of(DEMO)


def test_weights_config_and_tokenizer_do(copy: Path) -> None:
    shard = copy / "model.safetensors"
    whole = shard.read_bytes()
    changed = bytearray(whole)
    for place in range(len(changed) // 2, len(changed), 997):  # a fine-tune changes nearly everything
        changed[place] ^= 1
    shard.write_bytes(changed)
    assert of(copy) != of(DEMO)
    shard.write_bytes(whole)
    assert of(copy) == of(DEMO)
    for name in ("config.json", "tokenizer.json"):
        path = copy / name
        text = path.read_text(encoding="utf-8")
        path.write_text(text + " ", encoding="utf-8")
        assert of(copy) != of(DEMO)
        path.write_text(text, encoding="utf-8")


def test_an_artifacts_is_its_files_hashes(tmp_path: Path) -> None:
    from quantize.pipeline import quantize

    found = {}
    for name in ("a", "b"):
        quantize(DEMO, tmp_path / name, "compact", grid="absmax")
        found[name] = of(tmp_path / name)
    assert found["a"] == found["b"] != of(DEMO)
    manifest = tmp_path / "b" / "localmoe.json"
    value = json.loads(manifest.read_text())
    value["files"]["config.json"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(value))
    assert of(tmp_path / "b") != found["a"]
    manifest.write_text("{")
    with pytest.raises(CheckpointError, match=r"localmoe\.json"):
        of(tmp_path / "b")
