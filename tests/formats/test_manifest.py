import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from localmoe.errors import CheckpointError
from localmoe.formats.manifest import FileRecord, Manifest, Settings, Source, TensorRecord, Totals

DIGEST = "0123456789abcdef" * 4

MANIFEST = Manifest(
    localmoe="0.1.0",
    settings=Settings("balanced", 32, "mse"),
    source=Source("org/name", "a" * 40, {"model.safetensors": FileRecord(DIGEST, 12)}),
    files={"config.json": FileRecord(DIGEST, 7), "model.safetensors": FileRecord(DIGEST, 0)},
    tensors={"lm_head": TensorRecord("int8-g32", 0.00512345)},
    totals=Totals(parameters=100, bytes=60, bits_per_weight=4.8, relative_error=0.08),
    notes=("lm_head stays",),
)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "localmoe.json").write_bytes(MANIFEST.to_bytes())
    assert Manifest.read(tmp_path) == MANIFEST


def test_bytes_are_canonical_and_flat() -> None:
    value = json.loads(MANIFEST.to_bytes())
    assert MANIFEST.to_bytes() == json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"
    assert (value["format"], value["recipe"], value["group_size"], value["grid"]) == (1, "balanced", 32, "mse")
    assert value["files"]["config.json"] == {"sha256": DIGEST, "bytes": 7}


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    value = json.loads(MANIFEST.to_bytes())
    change(value)
    return json.dumps(value)


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "the manifest is missing or malformed"),
        (edited(lambda value: value.update(format=2)), "format '2' is not 1"),
        (edited(lambda value: value.pop("recipe")), "recipe is missing"),
        (edited(lambda value: value.update(recipe="a\nb")), "recipe is"),
        (edited(lambda value: value.update(group_size=True)), "group_size"),
        (edited(lambda value: value.update(group_size=-1)), "group_size"),
        (edited(lambda value: value.update(source=None)), "source is"),
        (edited(lambda value: value["files"].update({"../x": {"sha256": DIGEST, "bytes": 1}})), r"\.\./x"),
        (edited(lambda value: value["files"].update({".x": {"sha256": DIGEST, "bytes": 1}})), r"files\.'\.x'"),
        (edited(lambda value: value["files"]["config.json"].update(sha256="XY")), "config.json"),
        (edited(lambda value: value["files"]["config.json"].update(bytes="7")), "config.json.bytes"),
        (edited(lambda value: value["tensors"]["lm_head"].update(relative_error="x")), "relative_error"),
        (edited(lambda value: value["tensors"]["lm_head"].update(relative_error=float("nan"))), "relative_error"),
        (edited(lambda value: value["totals"].pop("bits_per_weight")), "bits_per_weight"),
        (edited(lambda value: value.update(notes="x")), "notes"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: str, field: str) -> None:
    (tmp_path / "localmoe.json").write_text(content)
    with pytest.raises(CheckpointError, match=field) as caught:
        Manifest.read(tmp_path)
    assert "localmoe.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        Manifest.read(tmp_path)


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, localmoe.formats.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
