"""The streaming pass: source matrices in, stored tensors out, a slab of rows at a time.

    SourceReader -> slab of rows -> quantize_slab -> CheckpointWriter

Each core takes a matrix of its own: a barrier would wait for whatever else the machine is doing. Memory holds a slab a
core, whatever the size of the matrix, the shard or the model.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from localmoe.errors import CheckpointError
from localmoe.formats import grouped, nf4
from localmoe.formats.scheme import NF4_BLOCK
from localmoe.formats.writer import CheckpointWriter
from quantize.foreign import ForeignCheckpoint, stored
from quantize.hashing import SourceHasher
from quantize.plan import Job, Plan
from quantize.progress import Meter
from quantize.quantizers import Grid, ordered_sum, pack_integers
from quantize.search import quantize_slab
from quantize.sources import SourceReader

_MOST_WORKERS = 16  # Python between the operations is what more would wait for

Record = dict[str, Any]


class _StoppedError(Exception):
    """Another job failed, or the user pressed Ctrl-C."""


class Feed(Protocol):
    """Brings the files of jobs, and is told when they are done with."""

    def is_new(self, job: Job) -> bool:
        """Whether `job` is the first to read one of its files."""
        ...

    def need(self, job: Job) -> None:
        """Wait until what `job` reads is here."""
        ...

    def finished(self, job: Job) -> None:
        """`job` reads no more."""
        ...


@dataclass(frozen=True)
class Conversion:
    """What every job needs."""

    reader: SourceReader
    writer: CheckpointWriter
    grid: Grid
    meter: Meter
    round_scales: bool = False
    """Of converted matrices: whether scales that are no bf16 numbers may be rounded to one."""
    feed: Feed | None = None
    """None: all files are here."""
    stopped: threading.Event = field(default_factory=threading.Event)

    def run(self, job: Job) -> Record:
        """Do one job; returns its squared error and squared norm, or nothing where it is not quantized."""
        if job.action == "copy":
            for at, piece in self.reader.pieces(job.source.name):
                self._check_stop()
                self.writer.write(job.source.name, piece, at)
                self.meter.add(piece.nbytes, job.source.name)
            return {}
        if job.action == "convert":
            return self._convert(job)
        module = job.source.name.removesuffix(".weight")
        written: dict[str, int] = {}  # bytes so far, by output tensor
        error = norm = 0.0
        zeros = 0
        for slab in self.reader.matrix(job.source.name):
            self._check_stop()
            if job.scheme is None:
                parts = {"weight": slab.rows.to(torch.bfloat16)}
                if not parts["weight"].isfinite().all():
                    raise CheckpointError(f"{_where(job)} has values too large for bfloat16; pull the model again")
            else:
                quantized = quantize_slab(slab, job.scheme, self.grid)
                parts = quantized.parts
                zeros += quantized.zero_groups
                error += quantized.squared_error
                norm += quantized.squared_norm
            for suffix, data in parts.items():
                name = f"{module}.{suffix}"
                self.writer.write(name, data, written.get(name, 0))
                written[name] = written.get(name, 0) + data.nbytes
            self.meter.add(slab.source_bytes, job.source.name)
        self.write_shape(job)
        if not (math.isfinite(error) and math.isfinite(norm)):
            raise CheckpointError(f"{_where(job)} has values too large for weights; pull the model again")
        return {"squared_error": error, "squared_norm": norm, "zero_groups": zeros} if job.scheme else {}

    def write_shape(self, job: Job) -> None:
        """`weight_shape`, where the job's form has one."""
        name = f"{job.unit.name}.weight_shape"
        if name in job.unit.tensors:
            self.writer.write(name, torch.tensor(job.shape or job.source.shape, dtype=torch.int64))

    def _convert(self, job: Job) -> Record:
        """A matrix that others packed, with the same numbers; the error is that of rounded scales."""
        checkpoint, module = self.reader.checkpoint, job.unit.name
        assert isinstance(checkpoint, ForeignCheckpoint)
        assert job.scheme is not None
        self._check_stop()
        packed = checkpoint.packed(module)
        q, scale = stored(packed, job.scheme, _where(job), round_scales=self.round_scales)
        for suffix, data in pack_integers(q, scale, job.scheme).items():
            self.writer.write(f"{module}.{suffix}", data)
        self.write_shape(job)
        weight = packed.dequantize()
        difference = grouped.scaled(q, scale, job.scheme.group_size) - weight
        self.meter.add(job.source.nbytes, job.source.name)
        return {
            "squared_error": ordered_sum(difference.square()),
            "squared_norm": ordered_sum(weight.square()),
            "zero_groups": int((scale == 0).sum()),
        }

    def _check_stop(self) -> None:
        if self.stopped.is_set():
            raise _StoppedError


def _where(job: Job) -> str:
    return f"{job.source.file.name}: {job.source.name}"


def stream(decided: Plan, conversion: Conversion, hasher: SourceHasher, later: frozenset[str] = frozenset()) -> int:
    """Do every job that is not done yet, but for those whose units are in `later`.

    Returns the source bytes of those that an earlier run did.

    Raises what a job raises, of the first that failed in reading order.
    """
    writer, meter = conversion.writer, conversion.meter
    meter.restart("quantize", sum(job.source.nbytes for job in decided.jobs))
    resumed = 0
    count = workers()
    waiting: deque[tuple[Job, Future[Record]]] = deque()
    if any(job.scheme is not None and job.scheme.kind == "nf4" for job in decided.jobs):
        # bitsandbytes registers its operators while it is imported: not in two threads at once.
        nf4.quantize(torch.zeros(1, NF4_BLOCK))

    def finish_oldest() -> None:
        job, future = waiting.popleft()
        record = future.result()
        remember_sources(writer, hasher)
        writer.finish(job.unit.name, record)
        if conversion.feed is not None:
            conversion.feed.finished(job)

    with one_thread_each(), ThreadPoolExecutor(count) as pool:
        try:
            for job in decided.reading_order:
                if job.unit.name in later and job.unit.name not in writer.records:
                    continue
                if job.unit.name in writer.records:
                    resumed += job.source.nbytes
                    meter.add(job.source.nbytes, job.source.name)
                    continue
                if conversion.feed is not None:
                    while waiting and conversion.feed.is_new(job):  # what they read is dropped before more comes
                        finish_oldest()
                    conversion.feed.need(job)
                else:
                    hasher.start(job.source.file)
                waiting.append((job, pool.submit(conversion.run, job)))
                if len(waiting) > 2 * count:
                    finish_oldest()
            while waiting:
                finish_oldest()
        except BaseException:
            conversion.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    return resumed


def remember_sources(writer: CheckpointWriter, hasher: SourceHasher) -> None:
    """Which files the units that are recorded next were read from, for a run that goes on after a kill."""
    for name, fact in hasher.facts().items():
        if writer.facts.get(name) != fact:
            writer.remember(name, fact)


def workers() -> int:
    """How many matrices are in work at a time: one a core."""
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0)))


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Threads that start inside run torch's operations by themselves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
