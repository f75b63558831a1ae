"""`quantize --discard-source`: a checkpoint of the hub, shard by shard, for a disk that does not hold the source.

    headers (HTTP ranges) -> plan -> [pull a shard -> quantize what is in it -> drop it] ... -> shards, card, manifest

The output's shards are those of an ordinary run, byte for byte. To know what was lost, the source is run on the
held-out text as its shards go by (following.py), for which the shards of one layer and those of the head are held.
Calibration, which runs a layer more than once, cannot be had. One shard is pulled while the one before is quantized.
Killed, the next run pulls no shard again whose matrices are all done and whose layers were run.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from localmoe.errors import StorageError, UsageError
from localmoe.formats.checkpoint import Checkpoint, ReadingCheckpoint, read_json
from localmoe.formats.journal import JOURNAL_NAME
from localmoe.formats.manifest import FileRecord, Manifest
from localmoe.formats.writer import CheckpointWriter, claim
from localmoe.hub.download import WithoutWeights
from localmoe.hub.shards import RemoteShards
from quantize.background import Background
from quantize.following import STATES_NAME, Following, follow
from quantize.foreign import form_of
from quantize.gate import GATE_TEXT, Gate, measure
from quantize.hashing import SourceHasher, sha256_of
from quantize.pipeline import (
    MEASURE,
    Report,
    carried_files,
    checked_settings,
    fingerprint_of,
    finish,
    finished_output,
    manifest_of,
    report_of_finished,
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


@dataclass(frozen=True)
class Use:
    """Something that reads shards: a job, or a step of the source's own run (None: its last, after everything)."""

    files: tuple[str, ...]
    job: str | None = None
    step: int | None = None


def uses_of(jobs: Iterable[Job], checkpoint: Checkpoint, following: Following | None) -> list[Use]:
    """All that reads shards, in order: a step comes as soon as the jobs have brought its shards, those that come before
    theirs included."""
    steps: deque[tuple[int, tuple[str, ...]]] = deque()
    if following is not None:
        steps.extend((step, following.files(step)) for step in following.steps)
    uses: list[Use] = []
    here: set[str] = set()
    for job in jobs:
        files = files_of(job, checkpoint)
        here.update(files)
        while steps and all(name in here or name <= job.source.file.name for name in steps[0][1]):
            step, names = steps.popleft()
            uses.append(Use(names, step=step))
        uses.append(Use(files, job.unit.name))
    uses += [Use(names, step=step) for step, names in steps]
    if following is not None:
        uses.append(Use(following.last_files()))
    return uses


class ShardFeed(Background):
    """Pulls shards in the order of their use, one ahead, and drops each after its last use."""

    def __init__(
        self,
        shards: RemoteShards,
        reader: SourceReader,
        writer: CheckpointWriter,
        uses: Sequence[Use],
        following: Following | None = None,
    ) -> None:
        super().__init__()
        self._shards, self._reader, self._writer, self._following = shards, reader, writer, following
        self._files = {use.job: use.files for use in uses if use.job is not None}
        self._left = Counter(name for use in uses for name in use.files)
        self._order = list(self._left)
        self._steps: dict[str, list[Use]] = {}  # by the job that they come before
        self._last_steps: list[Use] = []
        for use in uses:
            if use.job is None:
                self._last_steps.append(use)
            elif self._last_steps:
                self._steps[use.job], self._last_steps = self._last_steps, []
        self._used: set[str] = set()
        self._coming: dict[str, Future[Path]] = {}

    def is_new(self, job: Job) -> bool:
        """Whether `job` is the first to read one of its shards."""
        return not self._used.issuperset(self._files[job.unit.name])

    def need(self, job: Job) -> None:
        """Wait for the shards of `job`; raises what pulling them raises. Does the steps whose turn it is."""
        self._bring(self._files[job.unit.name])
        self._run(self._steps.pop(job.unit.name, []))

    def end(self) -> None:
        """After all jobs: the steps that are left. The shards of the last stay here."""
        self._run(self._last_steps)
        for name in self._left:
            if self._left[name]:
                self._remember(name)
        self._writer.sync()

    def finished(self, job: Job) -> None:
        """Drop the shards that `job` was the last to read, once what was made of them is on the disk."""
        self._release(self._files[job.unit.name])

    def _run(self, steps: Iterable[Use]) -> None:
        for use in steps:
            self._bring(use.files)
            if use.step is not None:
                assert self._following is not None  # its steps these are
                self._following.run(use.step)
                self._release(use.files)

    def _bring(self, names: Sequence[str]) -> None:
        self._used.update(names)
        for name in names:
            self._pull(name)
        for name in names:
            self._coming[name].result()
        after = max(self._order.index(name) for name in names) + 1
        if after < len(self._order):
            self._pull(self._order[after])

    def _release(self, names: Sequence[str]) -> None:
        for name in names:
            self._left[name] -= 1
            if not self._left[name]:
                self._remember(name)
                self._writer.sync()
                self._reader.forget(self._shards.path(name))
                self._shards.drop(name)

    def _remember(self, name: str) -> None:
        """Our SHA-256 of a shard of which the repository lists none, before it is gone."""
        if self._shards.sha256(name) is None:
            record = sha256_of(self._shards.path(name))
            self._writer.remember(name, {"sha256": record.sha256, "bytes": record.bytes})

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
    gate: Gate | None = MEASURE,
    progress: OnProgress | None = None,
) -> Report:
    """Quantize a repository of the hub into `output`, holding a few shards of it at a time; see `pipeline.quantize`.

    Raises as that does, and HubError. Disk space is checked before the start; where it holds no layer of the source
    beside the output, only the output's perplexity is measured, unless `gate` has a limit.
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
            report = report_of_finished(output, manifest, sum(file.size for file in found.weights), gate)
            _clean(shards)
            return report
    checkpoint = check_source(Checkpoint(found.snapshot, config, shards.tensors()))
    with RemoteReader(checkpoint, shards) as reader, contextlib.ExitStack() as opened:
        decided = plan(reader, recipe_named(recipe), group_size)
        listed = [(file.name, file.size, file.digest) for file in found.weights]
        inputs = [*listed, *sorted((name, record.sha256) for name, record in hashes.items())]
        fingerprint = fingerprint_of(settings, decided, inputs)
        following, why_not = None, "--no-gate was given"
        if gate is not None:
            states = shards.scratch / STATES_NAME
            text = GATE_TEXT.read_text(encoding="utf-8")
            following, why_not = follow(checkpoint, found.snapshot, text, states, fingerprint), ""
        if not _has_space(output, decided, shards, checkpoint, following, optional=gate is None or gate.limit is None):
            following, why_not = None, "the disk does not hold a layer of the source beside the output"
        if following is not None:
            opened.enter_context(following)
        writer = opened.enter_context(CheckpointWriter.open(output, settings, fingerprint, decided.units))
        shards.scratch.mkdir(exist_ok=True)
        left = [job for job in decided.reading_order if job.unit.name not in writer.records]
        uses = uses_of(left, checkpoint, following)
        with ShardFeed(shards, reader, writer, uses, following) as feed, SourceHasher({}, {}) as hasher:
            resumed = stream(decided, Conversion(reader, writer, grid, meter, feed=feed), hasher)
            feed.end()
        measured = None
        if gate is not None:
            written = ReadingCheckpoint(writer.directory, decided.config, writer.tensors())
            measured, reason = measure(following, written, found.snapshot, meter)
            why_not = reason or why_not
            gate.check(measured, output)
        source = source_of(found.snapshot, hashes | _shard_hashes(shards, writer))
        facts = with_loss(manifest_of(settings, decided, source, writer), measured, why_not)
        manifest = finish(writer, decided, facts, carried, meter)
        _clean(shards)  # not before: a kill would cost the source's whole run
    return Report(output, manifest, False, sum(job.source.nbytes for job in decided.jobs), resumed)


def _clean(shards: RemoteShards) -> None:
    """Delete what is left of the source, and its directory."""
    (shards.scratch / STATES_NAME).unlink(missing_ok=True)
    shards.clean()


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


def _has_space(
    output: Path,
    decided: Plan,
    shards: RemoteShards,
    checkpoint: Checkpoint,
    following: Following | None,
    *,
    optional: bool,
) -> bool:
    """Whether the disk can take the output and the shards under way, those that `following` holds included.

    Raises StorageError where it cannot take them without those either, or they are not `optional`.
    """
    sizes = {file.name: shards.size(file.name) for file in shards.found.weights}
    begun = (output / JOURNAL_NAME).exists()  # then the output has its room already
    made = 0 if begun else sum(unit.nbytes for unit in decided.units)
    here = sum(path.stat().st_size for path in shards.scratch.iterdir()) if shards.scratch.is_dir() else 0
    place = output
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free

    def under_way(followed: Following | None) -> int:
        uses = uses_of(decided.reading_order, checkpoint, followed)
        states = 2 * followed.states_bytes if followed is not None else 0  # the new ones are written beside the old
        return peak_bytes([use.files for use in uses], sizes) + states

    needed = made + under_way(following)
    if free + here >= needed:
        return True
    if optional and following is not None:
        needed = made + under_way(None)
        if free + here >= needed:
            return False
    raise StorageError(
        f"{output}: {needed:,} bytes are needed there ({made:,} for the output, {needed - made:,} for the "
        f"shards under way) and {free:,} are free: free some, or use -o"
    )
