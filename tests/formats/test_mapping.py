"""Mapped files: brought into memory, and who is told what of them is there."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import localmoe
from localmoe.errors import CheckpointError
from localmoe.formats.checkpoint import Checkpoint, _joined
from localmoe.formats.mapping import bring, lock, map_file, tells_what_is_in_memory
from localmoe.formats.safetensors import TensorInfo

DEMO = Path(localmoe.__file__).parent / "data" / "demo"


@pytest.mark.parametrize("huge_pages", [True, False])
def test_a_mapped_file_is_its_bytes(tmp_path: Path, huge_pages: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 40)
    memory = map_file(path, huge_pages=huge_pages)
    assert memory.tolist() == list(range(256)) * 40
    with pytest.raises(CheckpointError, match="cannot be mapped"):
        map_file(tmp_path / "missing", huge_pages=huge_pages)


@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize(("start", "size"), [(0, 300_000), (5000, 1), (4096, 4096), (299_999, 1)])
def test_bytes_are_brought_until_it_is_stopped(tmp_path: Path, exactly: bool, start: int, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(300_000))
    memory = map_file(path, huge_pages=False)
    assert bring(memory, start, size, exactly=exactly, stopped=lambda: False)
    assert not bring(memory, start, size, exactly=exactly, stopped=lambda: True)
    assert not bring(memory, 1 << 40, size, exactly=exactly, stopped=lambda: False)  # nothing is mapped there


def test_a_lock_that_is_refused_is_no_failure(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(300_000))
    memory = map_file(path, huge_pages=False)
    assert not lock(memory, 1 << 40, 4096)  # nothing is mapped there
    lock(memory, 5000, 1)  # as the user's limit has it
    assert memory.numpy().tobytes() == path.read_bytes()


def test_linux_tells_owners_and_those_who_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    assert tells_what_is_in_memory(path)
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert not tells_what_is_in_memory(path)
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    assert tells_what_is_in_memory(path)
    assert not tells_what_is_in_memory(tmp_path / "missing")


def test_tensors_that_touch_are_brought_together() -> None:
    def info(file: str, offset: int, nbytes: int) -> TensorInfo:
        return TensorInfo(f"{file}{offset}", torch.uint8, (nbytes,), Path(file), offset, nbytes)

    infos = [info("b", 8, 4), info("a", 30, 10), info("a", 10, 20), info("a", 50, 5), info("b", 12, 1)]
    assert _joined(infos) == [(Path("a"), 10, 30), (Path("a"), 50, 5), (Path("b"), 8, 5)]
    assert _joined([]) == []


def test_nothing_is_warmed_after_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread would hold the files, and let them go as Python ends."""
    begun = threading.Event()

    def bring(*_: object, stopped: Callable[[], bool], **__: object) -> bool:
        begun.set()
        while not stopped():
            time.sleep(0.001)
        return False

    monkeypatch.setattr("localmoe.formats.checkpoint.bring", bring)
    with Checkpoint.open(DEMO) as checkpoint:
        thread = checkpoint.warm()
        assert begun.wait(60)
    assert not thread.is_alive()


def test_some_tensors_of_a_checkpoint_are_warmed() -> None:
    with Checkpoint.open(DEMO) as checkpoint:
        names = [name for name in checkpoint.tensors if ".self_attn." in name]
        checkpoint.warm(names, keep=True).join(timeout=60)
        assert torch.equal(checkpoint.tensor(names[0]), checkpoint.read(names[0]))
        checkpoint.warm([]).join(timeout=60)
