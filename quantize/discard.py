"""`quantize --discard-source`: a checkpoint of the hub, shard by shard, for a disk that does not hold the source.

    headers (HTTP ranges) -> plan -> [pull a shard -> quantize what is in it -> drop it] ... -> shards, card, manifest

The output's shards are those of an ordinary run, byte for byte. What needs the whole source at once cannot be had:
calibration, and the divergence from it; of the loss only the output's own perplexity is measured. One shard is pulled
while the one before is quantized. Killed, the next run pulls no shard again whose matrices are all done.
"""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from localmoe.errors import StorageError, UsageError
from localmoe.formats.checkpoint import Checkpoint, ReadingCheckpoint, read_json
from localmoe.formats.journal import JOURNAL_NAME
from localmoe.formats.manifest import FileRecord, Manifest
from localmoe.formats.writer import CheckpointWriter, claim
from localmoe.hub.download import WithoutWeights
from localmoe.hub.shards import RemoteShards
from quantize.foreign import form_of
from quantize.gate import measure
from quantize.hashing import SourceHasher, sha256_of
from quantize.pipeline import (
    Report,
    carried_files,
    checked_settings,
    fingerprint_of,
    finish,
    finished_output,
    manifest_of,
    source_of,
    with_loss,
)
from quantize.plan import Job, Plan, plan
from quantize.progress import Meter, OnProgress
from quantize.quantizers import Grid
from quantize.recipes import recipe_named
from quantize.sources import SCALE, SourceReader, check_source
from quantize.stream import Conversion, stream

SCRATCH_NAME = "localmoe.source"
"""Where the shards under way lie, in the output's directory."""

_COMPARED = 64 * 2**20  # bytes of two tensors that are read at a time to see whether they are equal


class RemoteReader(SourceReader):
    """Reads from shards that are here, and compares tensors of those that are not."""

    def __init__(self, checkpoint: Checkpoint, shards: RemoteShards) -> None:
        super().__init__(checkpoint)
        self._shards = shards

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors are the same to the bit; neither shard needs to be here."""
        one, other = self.checkpoint.info(first), self.checkpoint.info(second)
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return all(
            self._shards.read(one.file.name, one.offset + at, one.offset + stop)
            == self._shards.read(other.file.name, other.offset + at, other.offset + stop)
            for at in range(0, one.nbytes, _COMPARED)
            for stop in (min(one.nbytes, at + _COMPARED),)
        )


def files_of(job: Job, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the shards that a job reads: an FP8 matrix's scale may be in another."""
    scale = checkpoint.tensors.get(job.source.name + SCALE)
    names = (job.source.file.name, scale.file.name if scale is not None else job.source.file.name)
    return tuple(dict.fromkeys(names))


def peak_bytes(needs: Sequence[tuple[str, ...]], sizes: Mapping[str, int]) -> int:
    """The most bytes of shards that are on the disk at a time, `needs` being the shards of each job in order.

    A shard is pulled while the one before it in the order of first use is worked on, and dropped after its last job.
    """
    order = list(dict.fromkeys(name for names in needs for name in names))
    first = {name: next(at for at, names in enumerate(needs) if name in names) for name in order}
    last = {name: at for at, names in enumerate(needs) for name in names}
    begin = {name: first[order[max(0, place - 1)]] for place, name in enumerate(order)}
    return max((sum(sizes[n] for n in order if begin[n] <= at <= last[n]) for at in set(begin.values())), default=0)


class ShardFeed:
    """Pulls shards in the order of their use, one ahead, and drops each after its last job."""

    def __init__(
        self, shards: RemoteShards, reader: SourceReader, writer: CheckpointWriter, jobs: Iterable[Job]
    ) -> None:
        self._shards, self._reader, self._writer = shards, reader, writer
        self._files = {job.unit.name: files_of(job, reader.checkpoint) for job in jobs}
        self._left = Counter(name for names in self._files.values() for name in names)
        self._order = list(self._left)
        self._used: set[str] = set()
        self._coming: dict[str, Future[Path]] = {}
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def is_new(self, job: Job) -> bool:
        """Whether `job` is the first to read one of its shards."""
        return not self._used.issuperset(self._files[job.unit.name])

    def need(self, job: Job) -> None:
        """Wait for the shards of `job`; raises what pulling them raises."""
        names = self._files[job.unit.name]
        self._used.update(names)
        for name in names:
            self._pull(name)
        for name in names:
            self._coming[name].result()
        after = max(self._order.index(name) for name in names) + 1
        if after < len(self._order):
            self._pull(self._order[after])

    def finished(self, job: Job) -> None:
        """Drop the shards that `job` was the last to read, once what was made of them is on the disk."""
        for name in self._files[job.unit.name]:
            self._left[name] -= 1
            if not self._left[name]:
                path = self._shards.path(name)
                if self._shards.sha256(name) is None:  # the repository lists no SHA-256: ours, before it is gone
                    record = sha256_of(path)
                    self._writer.remember(name, {"sha256": record.sha256, "bytes": record.bytes})
                self._writer.sync()
                self._reader.forget(path)
                self._shards.drop(name)

    def _pull(self, name: str) -> None:
        if name not in self._coming:
            self._coming[name] = self._pool.submit(self._shards.fetch, name, self._stopped.is_set)


def quantize_from_hub(
    found: WithoutWeights,
    output: Path,
    recipe: str,
    *,
    group_size: int = 32,
    grid: Grid = "mse",
    gate: bool = True,
    progress: OnProgress | None = None,
) -> Report:
    """Quantize a repository of the hub into `output`, holding a few shards of it at a time; see `pipeline.quantize`.

    Raises as that does, and HubError. Disk space is checked before the start.
    """
    settings, _ = checked_settings(recipe, group_size, grid, "rtn", None)
    config = read_json(found.snapshot / "config.json")
    if form_of(config) is not None:
        raise UsageError(f"{found.name} is quantized already: pull it whole, and convert it without --discard-source")
    meter = Meter(progress)
    shards = RemoteShards(found, output / SCRATCH_NAME, lambda count, file: meter.add(0, f"pulling {file}"))
    carried = carried_files(found.snapshot)
    hashes = {name: sha256_of(found.snapshot / name) for name in carried}
    if output.exists():
        claim(output, settings)
        manifest = finished_output(output, settings)
        if manifest is not None and _same_source(manifest, hashes, shards):
            return Report(output, manifest, True, sum(file.size for file in found.weights), 0)
    checkpoint = check_source(Checkpoint(found.snapshot, config, shards.tensors()))
    with RemoteReader(checkpoint, shards) as reader:
        decided = plan(reader, recipe_named(recipe), group_size)
        _check_space(output, decided, shards, checkpoint)
        listed = [(file.name, file.size, file.digest) for file in found.weights]
        inputs = [*listed, *sorted((name, record.sha256) for name, record in hashes.items())]
        fingerprint = fingerprint_of(settings, decided, inputs)
        with CheckpointWriter.open(output, settings, fingerprint, decided.units) as writer:
            left = [job for job in decided.reading_order if job.unit.name not in writer.records]
            with (
                ShardFeed(shards, reader, writer, left) as feed,
                SourceHasher({}, {}) as hasher,
            ):
                resumed = stream(decided, Conversion(reader, writer, grid, meter, feed=feed), hasher)
            measured, why_not = None, "--no-gate was given"
            if gate:
                written = ReadingCheckpoint(writer.directory, decided.config, writer.tensors())
                measured, why_not = measure(None, written, found.snapshot, meter)
            source = source_of(found.snapshot, hashes | _shard_hashes(shards, writer))
            facts = with_loss(manifest_of(settings, decided, source, writer), measured, why_not)
            shards.clean()
            manifest = finish(writer, decided, facts, carried, meter)
    return Report(output, manifest, False, sum(job.source.nbytes for job in decided.jobs), resumed)


def _shard_hashes(shards: RemoteShards, writer: CheckpointWriter) -> dict[str, FileRecord]:
    records = {}
    for file in shards.found.weights:
        digest = shards.sha256(file.name) or writer.facts[file.name]["sha256"]
        records[file.name] = FileRecord(digest, file.size)
    return records


def _same_source(manifest: Manifest, hashes: Mapping[str, FileRecord], shards: RemoteShards) -> bool:
    wanted = {file.name: (file.size, shards.sha256(file.name)) for file in shards.found.weights}
    recorded = dict(manifest.source.files)
    small = {name: recorded.pop(name, None) for name in hashes}
    return small == dict(hashes) and all(
        name in recorded and recorded[name].bytes == size and digest in (None, recorded[name].sha256)
        for name, (size, digest) in wanted.items()
    )


def _check_space(output: Path, decided: Plan, shards: RemoteShards, checkpoint: Checkpoint) -> None:
    """Raises StorageError where the disk cannot take the output and the shards under way, before either is begun."""
    needs = [files_of(job, checkpoint) for job in decided.reading_order]
    sizes = {file.name: shards.size(file.name) for file in shards.found.weights}
    under_way = peak_bytes(needs, sizes)
    begun = (output / JOURNAL_NAME).exists()  # then the output has its room already
    made = 0 if begun else sum(unit.nbytes for unit in decided.units)
    here = sum(path.stat().st_size for path in shards.scratch.iterdir()) if shards.scratch.is_dir() else 0
    place = output
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free + here < made + under_way:
        raise StorageError(
            f"{output}: {made + under_way:,} bytes are needed there ({made:,} for the output, {under_way:,} for the "
            f"shards under way) and {free:,} are free: free some, or use -o"
        )
