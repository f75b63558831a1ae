import contextlib
import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from localmoe.errors import CheckpointError, StorageError, UsageError
from localmoe.formats import journal, writer
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.journal import Journal
from localmoe.formats.manifest import FileRecord, Manifest, Settings, Source, Totals
from localmoe.formats.shards import Unit, plan_shards
from localmoe.formats.writer import CheckpointWriter

SETTINGS = Settings("balanced", 32, "mse")


def units(count: int = 6) -> list[Unit]:
    """Modules of three tensors: 512 and 128 bytes, and one of 16 that would break the alignment."""
    return [
        Unit(
            f"m.{index}",
            {
                f"m.{index}.weight_packed": (torch.int32, (8, 16)),
                f"m.{index}.weight_scale": (torch.bfloat16, (8, 8)),
                f"m.{index}.weight_shape": (torch.int64, (2,)),
            },
        )
        for index in range(count)
    ]


def values(unit: Unit) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(int(unit.name.split(".")[1]))
    return {
        name: torch.randint(0, 100, shape, generator=generator).to(dtype)
        for name, (dtype, shape) in unit.tensors.items()
    }


def fill(target: CheckpointWriter, wanted: list[Unit]) -> None:
    for unit in wanted:
        if unit.name not in target.records:
            for name, tensor in values(unit).items():
                target.write(name, tensor)
            target.finish(unit.name, {"n": 1.5})


def interrupt(directory: Path, fingerprint: str, wanted: list[Unit], done: list[Unit]) -> None:
    """What Ctrl-C leaves after the units `done`."""
    with (
        contextlib.suppress(KeyboardInterrupt),
        CheckpointWriter.open(directory, SETTINGS, fingerprint, wanted) as target,
    ):
        fill(target, done)
        target.remember("model.safetensors", {"sha256": "x"})
        raise KeyboardInterrupt


def manifest_of(files: Mapping[str, FileRecord]) -> Manifest:
    return Manifest("0", SETTINGS, Source(None, None, {}), files, {}, Totals(1, 1, 1.0, 0.0), ())


def written(directory: Path, wanted: list[Unit]) -> dict[str, bytes]:
    with CheckpointWriter.open(directory, SETTINGS, "f", wanted) as target:
        fill(target, wanted)
        target.commit({"config.json": b"{}"}, manifest_of)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "plan_shards", lambda wanted: plan_shards(wanted, 1500))


@pytest.mark.usefixtures("small_shards")
def test_shards_are_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    files = written(tmp_path / "out", units())
    assert sorted(files) == [
        "config.json",
        "localmoe.json",
        *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    index = json.loads(files["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == 6 * (512 + 128 + 16)
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        for unit in units():
            for name, expected in values(unit).items():
                assert torch.equal(checkpoint.read(name), expected)
                with safe_open(tmp_path / "out" / index["weight_map"][name], "pt") as library:  # type: ignore[no-untyped-call]
                    assert torch.equal(library.get_tensor(name), expected)


@pytest.mark.usefixtures("small_shards")
def test_modules_stay_whole_and_large_tensors_aligned(tmp_path: Path) -> None:
    written(tmp_path / "out", units())
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        for unit in units():
            infos = [checkpoint.info(name) for name in unit.tensors]
            assert len({info.file for info in infos}) == 1
            packed, scale, _ = infos
            assert packed.offset % 64 == scale.offset % 64 == 0
            assert scale.offset == packed.offset + packed.nbytes


def test_one_shard_is_named_as_such(tmp_path: Path) -> None:
    files = written(tmp_path / "out", units(2))
    assert set(json.loads(files["model.safetensors.index.json"])["weight_map"].values()) == {"model.safetensors"}


def test_a_module_larger_than_a_shard_has_its_own() -> None:
    shards = plan_shards(units(3), 100)
    assert [len(shard.places) for shard in shards] == [3, 3, 3]


@pytest.mark.usefixtures("small_shards")
def test_resumed_bytes_equal_uninterrupted_ones(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", units())
    for stop in range(7):
        directory = tmp_path / f"stopped-{stop}"
        interrupt(directory, "f", units(), units()[:stop])
        assert not (directory / "localmoe.json").exists()
        with CheckpointWriter.open(directory, SETTINGS, "f", units()) as target:
            assert target.records == {f"m.{index}": {"n": 1.5} for index in range(stop)}
            fill(target, units())
            target.commit({"config.json": b"{}"}, manifest_of)
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == whole


@pytest.mark.usefixtures("small_shards")
def test_the_disk_is_waited_for_beside_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = written(tmp_path / "whole", units())
    monkeypatch.setattr(writer, "_SYNC_BYTES", 1000)  # of 656 a unit
    assert written(tmp_path / "often", units()) == whole
    seen = []
    with CheckpointWriter.open(tmp_path / "half", SETTINGS, "f", units()) as target:
        fill(target, units()[:4])
        target.sync()
        fill(target, units())
        target.commit({"config.json": b"{}"}, manifest_of, lambda count, file: seen.append(count))
    assert {path.name: path.read_bytes() for path in (tmp_path / "half").iterdir()} == whole
    assert sum(seen) == sum(len(data) for name, data in whole.items() if name.endswith(".safetensors"))


def test_a_disk_that_fails_beside_the_work_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "_SYNC_BYTES", 1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", full_disk)
        with pytest.raises(StorageError, match="No space left"):
            written(tmp_path / "o", units())
    with CheckpointWriter.open(tmp_path / "o", SETTINGS, "f", units()) as target:
        assert target.records == {}  # the journal promises nothing that the disk did not take


def test_facts_survive(tmp_path: Path) -> None:
    interrupt(tmp_path / "o", "f", units(), [])
    with CheckpointWriter.open(tmp_path / "o", SETTINGS, "f", units()) as target:
        assert target.facts == {"model.safetensors": {"sha256": "x"}}


@pytest.mark.parametrize("damage", [b'{"unit": "m.1", "rec', b"\xff\xfe", b'["no object"]\n'])
def test_a_torn_last_line_is_dropped(tmp_path: Path, damage: bytes) -> None:
    directory = tmp_path / "o"
    interrupt(directory, "f", units(), units()[:1])
    with (directory / "localmoe.journal").open("ab") as file:
        file.write(damage)
    with CheckpointWriter.open(directory, SETTINGS, "f", units()) as target:
        assert list(target.records) == ["m.0"]
        fill(target, units())
        target.sync()
        lines = (directory / "localmoe.journal").read_bytes().splitlines()
    assert len(lines) == 1 + 1 + 6  # head, fact, units
    assert all(isinstance(json.loads(line), dict) for line in lines)


@pytest.mark.parametrize("change", ["fingerprint", "missing", "short"])
def test_another_plan_or_missing_data_starts_over(tmp_path: Path, change: str) -> None:
    directory = tmp_path / "o"
    interrupt(directory, "f", units(), units()[:3])
    partial = directory / "model.safetensors.partial"
    if change == "missing":
        partial.unlink()
    elif change == "short":
        os.truncate(partial, 100)
    with CheckpointWriter.open(directory, SETTINGS, "g" if change == "fingerprint" else "f", units()) as target:
        assert target.records == {}


def test_other_settings_are_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    other = Settings("compact", 32, "mse")
    unfinished, finished = tmp_path / "unfinished", tmp_path / "finished"
    interrupt(unfinished, "f", units(), units()[:3])
    written(finished, units())
    for directory in (unfinished, finished):
        before = {path.name: path.read_bytes() for path in directory.iterdir()}
        with pytest.raises(UsageError, match="balanced, groups of 32, mse grid"):
            CheckpointWriter.open(directory, other, "f", units())
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_a_directory_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="localmoe did not write it"):
        CheckpointWriter.open(tmp_path, SETTINGS, "f", units())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="is a file"):
        CheckpointWriter.open(tmp_path / "thesis.tex", SETTINGS, "f", units())
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "localmoe.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"localmoe\.json"):
        CheckpointWriter.open(tmp_path / "damaged", SETTINGS, "f", units())


def test_a_changed_source_replaces_the_output_only_at_the_end(tmp_path: Path) -> None:
    directory = tmp_path / "o"
    before = written(directory, units())
    interrupt(directory, "g", units(3), units(3))
    assert {name: (directory / name).read_bytes() for name in before} == before
    with CheckpointWriter.open(directory, SETTINGS, "g", units(3)) as target:
        target.commit({"config.json": b"{}"}, manifest_of)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == written(tmp_path / "p", units(3))


@pytest.mark.usefixtures("small_shards")
def test_shards_of_an_older_layout_are_removed(tmp_path: Path) -> None:
    written(tmp_path / "o", units())
    assert len(list((tmp_path / "o").glob("*.safetensors"))) == 3
    with CheckpointWriter.open(tmp_path / "o", SETTINGS, "g", units(1)) as target:
        fill(target, units(1))
        target.commit({}, manifest_of)
    assert [path.name for path in (tmp_path / "o").glob("*.safetensors")] == ["model.safetensors"]


def test_two_writers_do_not_share_a_directory(tmp_path: Path) -> None:
    with CheckpointWriter.open(tmp_path / "o", SETTINGS, "f", units()) as target:
        with pytest.raises(StorageError, match="another localmoe is writing"):
            CheckpointWriter.open(tmp_path / "o", SETTINGS, "f", units())
        fill(target, units())


@pytest.mark.parametrize("existed", [True, False])
def test_a_full_disk_is_found_first_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    directory = tmp_path / "o"
    if existed:
        directory.mkdir()
    monkeypatch.setattr(os, "posix_fallocate", full)
    needed = sum(shard.size for shard in plan_shards(units()))
    with pytest.raises(StorageError, match=f"No space left on device; {needed:,} bytes are needed"):
        CheckpointWriter.open(directory, SETTINGS, "f", units())
    assert directory.exists() == existed
    assert not existed or not any(directory.iterdir())


def test_too_little_space_is_seen_before_anything_is_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr(
        writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5000, "total": usage.f_blocks})
    )
    with pytest.raises(StorageError, match="bytes are needed"):
        CheckpointWriter.open(tmp_path / "o", SETTINGS, "f", units(8))
    assert not (tmp_path / "o").exists()


def test_a_disk_that_fills_up_under_way_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = written(tmp_path / "whole", units())
    real: Callable[..., int] = os.pwrite
    calls = 0

    def filling(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", filling)
    with (
        pytest.raises(StorageError, match="goes on where it was"),
        CheckpointWriter.open(tmp_path / "o", SETTINGS, "f", units()) as target,
    ):
        fill(target, units())
    monkeypatch.setattr(os, "pwrite", real)
    with CheckpointWriter.open(tmp_path / "o", SETTINGS, "f", units()) as target:
        assert 0 < len(target.records) < 6
        fill(target, units())
        target.commit({"config.json": b"{}"}, manifest_of)
    assert {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()} == whole


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = written(tmp_path / "whole", units())
    real: Callable[..., int] = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:7], offset))
    assert written(tmp_path / "o", units()) == whole


def test_a_bad_source_leaves_nothing(tmp_path: Path) -> None:
    with (
        contextlib.suppress(CheckpointError),
        CheckpointWriter.open(tmp_path / "o", SETTINGS, "f", units()) as target,
    ):
        fill(target, units()[:3])
        raise CheckpointError("NaN")
    assert not (tmp_path / "o").exists()


def test_writing_past_a_tensor_is_a_bug_that_shows(tmp_path: Path) -> None:
    with (
        CheckpointWriter.open(tmp_path / "o", SETTINGS, "f", units()) as target,
        pytest.raises(ValueError, match="fit"),
    ):
        target.write("m.0.weight_packed", torch.zeros(128, dtype=torch.int32), 4)


def test_files_are_readable_by_others_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        written(tmp_path / "o", units())
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "o").iterdir()} == {0o644}


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/below"):
        CheckpointWriter.open(tmp_path / "file" / "below", SETTINGS, "f", units())


def test_the_journal_does_not_follow_links(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("years of work")
    (tmp_path / journal.JOURNAL_NAME).symlink_to(target)
    with pytest.raises(StorageError):
        Journal.open(tmp_path / journal.JOURNAL_NAME)
    assert target.read_text() == "years of work"
