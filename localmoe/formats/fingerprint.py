"""A hash that stands for a model's weights: what was computed with them is worth nothing to others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from localmoe.errors import CheckpointError
from localmoe.formats.manifest import MANIFEST_NAME, Manifest
from localmoe.formats.safetensors import TensorInfo

_SAMPLES, _SAMPLE_BYTES = 64, 4096
_TEXTS = ("config.json", "tokenizer.json", "tokenizer_config.json")
_RANKS = "tiktoken.model"


def fingerprint(directory: Path, tensors: Iterable[TensorInfo]) -> str:
    """SHA-256 in hex. Of an artifact: its manifest's hashes of every file. Of a source, which has no manifest:
    config and tokenizer, the name, type and place of every tensor, and 64 pieces of 4 KiB, evenly spread, of each
    shard; a fine-tune of the same shape changes all of those, and hashing 600 GB would take minutes.

    Raises CheckpointError for a damaged manifest or a file that cannot be read.
    """
    if (directory / MANIFEST_NAME).is_file():
        files = Manifest.read(directory).files
        known = {name: record.sha256 for name, record in files.items()}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    listed = list(tensors)
    total = hashlib.sha256()
    try:
        for name in _TEXTS:
            path = directory / name
            total.update(hashlib.sha256(path.read_bytes() if path.is_file() else b"").digest())
        if (directory / _RANKS).is_file():  # only then, so that what was kept with other models stays theirs
            total.update(hashlib.sha256((directory / _RANKS).read_bytes()).digest())
        for info in sorted(listed, key=lambda info: info.name):
            total.update(f"{info.name}\0{info.dtype}\0{info.shape}\0{info.file.name}\0{info.offset}\n".encode())
        for path in sorted({info.file for info in listed}):
            _sample(path, total)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return total.hexdigest()


def _sample(path: Path, total: hashlib._Hash) -> None:
    with path.open("rb", buffering=0) as file:
        size = file.seek(0, 2)
        total.update(size.to_bytes(8, "little"))
        last = max(size - _SAMPLE_BYTES, 0)
        for place in sorted({last * piece // (_SAMPLES - 1) for piece in range(_SAMPLES)}):
            file.seek(place)
            total.update(file.read(_SAMPLE_BYTES))
