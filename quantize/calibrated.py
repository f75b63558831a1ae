"""The calibrated part of a quantization: 4-bit matrices of the layers, each as soon as the calibration reaches it."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from localmoe.errors import CheckpointError
from localmoe.formats.checkpoint import ReadingCheckpoint
from localmoe.formats.weights import dequantize
from quantize.calibration import Statistics, calibrate_layers, windows_of
from quantize.hashing import SourceHasher
from quantize.layerwise import LayerByLayer
from quantize.methods import Method, choose
from quantize.plan import Job, Plan
from quantize.stream import Conversion, one_thread_each, remember_sources, workers


@dataclass(frozen=True)
class CalibratedRun:
    """How to calibrate: the text, and which rounding to take."""

    text: str
    method: Method


def calibrated_units(decided: Plan) -> frozenset[str]:
    """The modules that calibration can reach: int4 matrices of the layers."""
    return frozenset(
        job.unit.name
        for job in decided.jobs
        if job.scheme is not None and job.scheme.kind == "int4" and job.unit.name.startswith("model.layers.")
    )


def calibrate(decided: Plan, conversion: Conversion, hasher: SourceHasher, directory: Path, run: CalibratedRun) -> None:
    """Quantize what `calibrated_units` names and is not done yet; what no layer runs is left to `stream`.

    Raises CheckpointError for NaN, infinity and a source without a tokenizer, InputError for too short a text.
    """
    writer, meter = conversion.writer, conversion.meter
    jobs = {job.unit.name: job for job in decided.jobs}
    wanted = {name for name in calibrated_units(decided) if name not in writer.records}
    if not wanted:
        return
    windows = windows_of(directory, run.text)
    for name in sorted(wanted):
        hasher.start(jobs[name].source.file)

    checkpoint = conversion.reader.checkpoint
    source = ReadingCheckpoint(checkpoint.directory, checkpoint.config, checkpoint.tensors)
    written = ReadingCheckpoint(writer.directory, decided.config, writer.tensors())
    done = {name for name, job in jobs.items() if job.scheme is not None and name in writer.records}

    def consume(module: str, statistics: Statistics) -> dict[str, Any]:
        record = _quantize(jobs[module], statistics, conversion, run.method)
        done.add(module)  # from here on the model runs with what is stored
        return record

    def replaced(module: str) -> Tensor | None:
        return dequantize(written.weight(module)) if module in done else None

    with one_thread_each(), ThreadPoolExecutor(workers()) as pool:
        model = LayerByLayer(source, windows, pool, wanted, replaced, embedding=written)
        try:
            for module, record in calibrate_layers(model, consume):
                assert isinstance(record, dict)
                remember_sources(writer, hasher)
                writer.finish(module, record)
                meter.add(jobs[module].source.nbytes, module)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _quantize(job: Job, statistics: Statistics, conversion: Conversion, method: Method) -> dict[str, Any]:
    assert job.scheme is not None  # `calibrated_units` names no other
    module = job.unit.name
    weight = dequantize(conversion.reader.checkpoint.weight(module))
    where = f"{job.source.file.name}: {job.source.name}"
    if not weight.isfinite().all():
        raise CheckpointError(f"{where} has NaN or infinite values; pull the model again")
    if not statistics.hessian.isfinite().all():
        raise CheckpointError(f"{where} gets inputs that are NaN or infinite; pull the model again")
    chosen = choose(weight, job.scheme, statistics, method)
    if not (math.isfinite(chosen.squared_error) and math.isfinite(chosen.squared_norm)):
        raise CheckpointError(f"{where} has values too large for weights; pull the model again")
    for suffix, data in chosen.parts.items():
        conversion.writer.write(f"{module}.{suffix}", data)
    conversion.write_shape(job)
    return {
        "squared_error": chosen.squared_error,
        "squared_norm": chosen.squared_norm,
        "zero_groups": chosen.zero_groups,
        "method": chosen.method,
        "tokens": chosen.tokens,
        "output_error": chosen.output_error,
    }
