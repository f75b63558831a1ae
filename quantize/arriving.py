"""A checkpoint of the hub, quantized shard by shard while it is pulled: nobody waits for the last one to begin.

    small files, headers (HTTP ranges) -> plan -> [a shard is here and right -> quantize what is in it] ...

The shards stay in the hub's cache, as after any pull. What is made lies in the output under its temporary names, with
the fingerprint that `pipeline.quantize` takes of the same files: that finishes it, with nothing to quantize again, and
the result is the same to the bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from localmoe.errors import CheckpointError
from localmoe.formats.checkpoint import INDEX_NAME, Checkpoint, read_json
from localmoe.formats.manifest import Settings
from localmoe.formats.writer import CheckpointWriter
from localmoe.hub import cache
from localmoe.hub.download import WithoutWeights, pull_weights
from localmoe.hub.reports import PullReport
from localmoe.hub.shards import RemoteShards
from quantize.background import Background
from quantize.discard import files_of
from quantize.foreign import form_of
from quantize.hashing import SourceHasher, stamp, unchanged
from quantize.pipeline import carried_files, checked_settings, fingerprint_of
from quantize.plan import Job, Plan, plan, possible_copies
from quantize.progress import Meter
from quantize.progress import Progress as Quantized
from quantize.recipes import recipe_named
from quantize.sources import SourceReader, check_source
from quantize.stream import Conversion, stream


@dataclass(frozen=True)
class Progress:
    """Bytes pulled and bytes of the source quantized, of how many; `quantize_bytes` is 0 until that has begun."""

    pulled_bytes: int
    pull_bytes: int
    quantized_bytes: int
    quantize_bytes: int
    item: str


OnProgress = Callable[[Progress], None]


def comes_in_parts(found: WithoutWeights) -> bool:
    """Whether there is anything to quantize before all of `found` is here: more than one shard, none packed by others,
    in a cache that names files by their hash."""
    return (
        len(found.weights) > 1
        and all(len(file.digest) == 64 for file in found.weights)
        and (found.snapshot / "config.json").is_symlink()
        and form_of(read_json(found.snapshot / "config.json")) is None
    )


def quantize_arriving(
    found: WithoutWeights,
    output: Path,
    recipe: str,
    *,
    group_size: int = 32,
    progress: OnProgress = lambda progress: None,
) -> PullReport:
    """Pull `found`, which `comes_in_parts`, and quantize its matrices into `output` meanwhile; `pipeline.quantize` with
    the same arguments finishes it. Interrupted, both go on where they were.

    Raises as `hub.pull` and `pipeline.quantize` do.
    """
    settings, _ = checked_settings(recipe, group_size, "mse", "rtn", None)
    telling = _Telling(progress)
    with _Pulling(found, _wanted_first(found), telling) as pulling:
        try:
            reader = _ArrivingReader(_open(found), pulling)
            decided = plan(reader, recipe_named(recipe), group_size)
        except CheckpointError:
            # The headers are not checked yet: the pull may repair a damaged shard that lies here, and the run that
            # finishes tells what is wrong once all is here.
            return pulling.result()
        with reader:
            _stream(found, output, settings, decided, reader, pulling, Meter(telling.quantized))
        return pulling.result()


def _wanted_first(found: WithoutWeights) -> frozenset[str]:
    """The shards that a plan reads: those of an MTP layer's copies and of what they may be copies of."""
    index = found.snapshot / INDEX_NAME
    weight_map = read_json(index)["weight_map"] if index.is_file() else {}
    pairs = possible_copies(weight_map).items()
    return frozenset(str(weight_map[name]) for pair in pairs for name in pair)


def _open(found: WithoutWeights) -> Checkpoint:
    """The checkpoint, from its headers alone. Raises HubError, CheckpointError, UnsupportedModelError."""
    tensors = RemoteShards(found, found.snapshot).tensors()
    return check_source(Checkpoint(found.snapshot, read_json(found.snapshot / "config.json"), tensors))


def _stream(
    found: WithoutWeights,
    output: Path,
    settings: Settings,
    decided: Plan,
    reader: _ArrivingReader,
    pulling: _Pulling,
    meter: Meter,
) -> None:
    """Every matrix into `output`'s temporary files, each as its shards come."""
    shards = {info.file for info in reader.checkpoint.tensors.values()}
    inputs = [*shards, *(found.snapshot / name for name in carried_files(found.snapshot))]
    listed = {file.name: (file.size, file.digest) for file in found.weights}
    fingerprint = fingerprint_of(settings, decided, stamp(inputs, listed))
    same = partial(unchanged, paths=inputs)
    with CheckpointWriter.open(output, settings, fingerprint, decided.units, same) as writer:
        feed = _Feed(pulling, reader.checkpoint, writer)
        with SourceHasher({}, {}) as hasher:  # the pull has hashed them
            stream(decided, Conversion(reader, writer, "mse", meter, feed=feed), hasher)
        writer.sync()


class _Telling:
    """Joins the progress of two: the pull's threads and the quantization's."""

    def __init__(self, progress: OnProgress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._pull = cache.Progress(0, 0, "")
        self._quantized = Quantized("quantize", 0, 0, "")

    def pulled(self, step: cache.Progress) -> None:
        with self._lock:
            self._pull = step
            self._tell(step.item)

    def quantized(self, step: Quantized) -> None:
        with self._lock:
            self._quantized = step
            self._tell(step.item)

    def _tell(self, item: str) -> None:
        pull, made = self._pull, self._quantized
        self._progress(Progress(pull.done_bytes, pull.total_bytes, made.done_bytes, made.total_bytes, item))


class _StopPullError(Exception):
    """Nobody waits for the rest."""


class _Pulling(Background):
    """A pull in a thread of its own, and each of its shards to wait for. Leaving early stops it; what is here stays."""

    def __init__(self, found: WithoutWeights, first: frozenset[str], telling: _Telling) -> None:
        super().__init__()
        self._shards: dict[str, Future[None]] = {file.name: Future() for file in found.weights}
        self._telling = telling
        self._pull = self._pool.submit(pull_weights, found, first=first, progress=self._told, arrived=self._arrived)
        self._pull.add_done_callback(self._ended)

    def is_here(self, names: Iterable[str]) -> bool:
        return all(self._shards[name].done() for name in names)

    def wait(self, names: Iterable[str]) -> None:
        """Until these shards are here and right. Raises what ended the pull before."""
        for name in names:
            self._shards[name].result()

    def result(self) -> PullReport:
        """Wait for the whole pull. Raises what it raised."""
        return self._pull.result()

    def _told(self, step: cache.Progress) -> None:
        if self._stopped.is_set():
            raise _StopPullError
        self._telling.pulled(step)

    def _arrived(self, name: str) -> None:
        self._shards[name].set_result(None)

    def _ended(self, pull: Future[PullReport]) -> None:
        error = None if pull.cancelled() else pull.exception()
        for shard in self._shards.values():
            if not shard.done() and error is not None:
                shard.set_exception(error)


class _ArrivingReader(SourceReader):
    """Waits for what a plan compares; jobs have waited already, in `_Feed.need`."""

    def __init__(self, checkpoint: Checkpoint, pulling: _Pulling) -> None:
        super().__init__(checkpoint)
        self._pulling = pulling

    def equal(self, first: str, second: str) -> bool:
        self._pulling.wait(self.checkpoint.info(name).file.name for name in (first, second))
        return super().equal(first, second)


class _Feed:
    """Lets a job wait for its shards, and records that what was read of them was right."""

    def __init__(self, pulling: _Pulling, checkpoint: Checkpoint, writer: CheckpointWriter) -> None:
        self._pulling, self._checkpoint, self._writer = pulling, checkpoint, writer

    def is_new(self, job: Job) -> bool:
        """Whether its shards are still to come: then what is in work is recorded first."""
        return not self._pulling.is_here(files_of(job, self._checkpoint))

    def need(self, job: Job) -> None:
        names = files_of(job, self._checkpoint)
        self._pulling.wait(names)
        for name in names:
            fact = self._fact(self._checkpoint.directory / name)
            if self._writer.facts.get(name) != fact:
                self._writer.remember(name, fact)

    def finished(self, job: Job) -> None:
        """The shards stay."""

    def _fact(self, path: Path) -> dict[str, Any]:
        status = path.stat()
        return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": path.resolve().name}
