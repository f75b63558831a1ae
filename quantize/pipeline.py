"""`localmoe quantize`: one streaming pass from a source checkpoint to an artifact, which a kill does not lose.

source shards -> plan -> stream -> measure -> shards, then config, tokenizer, card, index, and the manifest last
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from localmoe.errors import CheckpointError, UsageError
from localmoe.formats.checkpoint import INDEX_NAME, Checkpoint, ReadingCheckpoint
from localmoe.formats.journal import JOURNAL_NAME
from localmoe.formats.manifest import (
    CONVERTED,
    FORMAT,
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    Measured,
    Settings,
    Source,
    TensorRecord,
    Totals,
)
from localmoe.formats.scheme import GROUP_SIZES, Scheme
from localmoe.formats.writer import CheckpointWriter, claim
from quantize.calibrated import CalibratedRun, calibrate, calibrated_units
from quantize.calibration import DEFAULT_TEXT
from quantize.card import CARD_NAME, card
from quantize.foreign import ForeignCheckpoint, common_scheme
from quantize.gate import Gate, measure
from quantize.hashing import SourceHasher, look_at, sha256_of, stamp, unchanged
from quantize.methods import METHODS, Method
from quantize.plan import Plan, plan, plan_conversion
from quantize.progress import Meter, OnProgress
from quantize.quantizers import GRIDS, Grid, ordered_sum, relative_error
from quantize.recipes import recipe_named
from quantize.sources import SourceReader, open_source
from quantize.stream import Conversion, stream

MEASURE = Gate()

CARRIED_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "tiktoken.model", "generation_config.json", "chat_template.jinja",
    "chat_template.json", "LICENSE", "LICENSE.txt", "LICENSE-MODEL", "LICENSE-CODE", "NOTICE",
)  # fmt: skip
"""Small files that come along unchanged, by name: nothing that could be code."""

_LARGEST_CARRIED = 128 * 2**20


@dataclass(frozen=True)
class Report:
    """What a call of `quantize` did. `already_there`: nothing; `resumed_bytes`: read by an earlier, interrupted run."""

    output: Path
    manifest: Manifest
    already_there: bool
    source_bytes: int
    resumed_bytes: int


def quantize(
    source: Path,
    output: Path,
    recipe: str,
    *,
    group_size: int = 32,
    grid: Grid = "mse",
    method: Method = "rtn",
    calibration_text: str | None = None,
    gate: Gate | None = MEASURE,
    round_scales: bool = False,
    progress: OnProgress | None = None,
) -> Report:
    """Quantize the checkpoint in `source` into the directory `output`.

    `gptq` and `auto` run the model on `calibration_text` (None: the one that comes with localmoe) and round the
    layers' int4 matrices by what their inputs were; so does `rtn` with a text, through the scales alone. For a recipe
    without int4 they are all the same as `rtn` without one.
    A checkpoint that others packed (GPTQ, AWQ, compressed-tensors with zero points) is converted to our layout, with
    recipe `converted` and nothing quantized again; `round_scales` allows its scales to be rounded to bf16.
    At the end the output is measured against the source on a held-out text, unless `gate` is None; what fails the
    gate's limit keeps its quantized weights under their temporary names, and no index and manifest.
    Interrupted, it goes on where it was when called again with the same arguments; the output's bytes depend
    on the source and the arguments only. An output that is complete already is left as it is.

    Raises GateError, UsageError (unknown recipe, a group size or grid that does not exist, a source that is quantized,
    an `output` that holds something else), CheckpointError and UnsupportedModelError for the source,
    StorageError for the disk.
    """
    with open_source(source) as checkpoint, SourceReader(checkpoint) as reader:
        if isinstance(checkpoint, ForeignCheckpoint):
            settings, run = _conversion_settings(checkpoint, recipe, grid, method, calibration_text, round_scales), None
        else:
            settings, run = checked_settings(recipe, group_size, grid, method, calibration_text)
        carried = carried_files(source)
        shards = sorted({info.file for info in checkpoint.tensors.values()})
        inputs = [*shards, *(source / name for name in carried)]
        seen = look_at(inputs)
        meter = Meter(progress)
        if output.exists():
            claim(output, settings)
            finished = _finished(output, settings, inputs, meter)
            if finished is not None:
                return report_of_finished(output, finished, sum(path.stat().st_size for path in shards), gate)
        if isinstance(checkpoint, ForeignCheckpoint):
            decided = plan_conversion(checkpoint)
        else:
            decided = plan(reader, recipe_named(recipe), group_size)
        fingerprint = fingerprint_of(settings, decided, stamp(inputs))
        same = partial(unchanged, paths=inputs)
        with (
            CheckpointWriter.open(output, settings, fingerprint, decided.units, same) as writer,
            SourceHasher(writer.facts, seen) as hasher,
        ):
            conversion = Conversion(reader, writer, grid, meter, round_scales)
            later = calibrated_units(decided) if run is not None else frozenset()
            resumed = stream(decided, conversion, hasher, later)
            if run is not None:
                calibrate(decided, conversion, hasher, source, run)
                stream(decided, conversion, hasher)  # what no layer runs, such as a second MTP layer
            for path in inputs:
                hasher.start(path)
            measured, why_not = None, "--no-gate was given"
            if gate is not None:
                measured, why_not = _measure(checkpoint, decided, writer, meter)
                gate.check(measured, output)
            facts = manifest_of(settings, decided, source_of(source, hasher.results()), writer)
            manifest = finish(writer, decided, with_loss(facts, measured, why_not), carried, meter)
    return Report(output, manifest, False, sum(job.source.nbytes for job in decided.jobs), resumed)


def report_of_finished(output: Path, manifest: Manifest, source_bytes: int, gate: Gate | None) -> Report:
    """Of an output that was complete already. Raises GateError where it fails the gate."""
    if gate is not None:
        gate.check(manifest.measured, output)
    return Report(output, manifest, True, source_bytes, 0)


def with_loss(facts: Manifest, measured: Measured | None, why_not: str) -> Manifest:
    """The manifest with the loss in it, or a note that says why there is none."""
    if measured is None:
        return replace(facts, notes=(*facts.notes, f"what it lost was not measured: {why_not}"))
    if measured.kld_mean is None:
        note = f"only the perplexity was measured, not the divergence from the source: {why_not}"
        return replace(facts, measured=measured, notes=(*facts.notes, note))
    return replace(facts, measured=measured)


def finish(
    writer: CheckpointWriter, decided: Plan, facts: Manifest, carried: Mapping[str, bytes], meter: Meter
) -> Manifest:
    """Give the output's files their names: shards, small files, card, index, and the manifest last."""
    small = {name: data for name, data in carried.items() if name in CARRIED_FILES}
    small["config.json"] = _json(decided.config)
    small[CARD_NAME] = card(facts, decided.config)
    meter.restart("hash", sum(unit.nbytes for unit in decided.units))
    return writer.commit(small, lambda files: replace(facts, files=files), lambda count, file: meter.add(count, file))


def _measure(source: Checkpoint, decided: Plan, writer: CheckpointWriter, meter: Meter) -> tuple[Measured | None, str]:
    """The output's loss, from the files as they are before they get their names."""
    output = ReadingCheckpoint(writer.directory, decided.config, writer.tensors())
    foreign = isinstance(source, ForeignCheckpoint)
    reading = source if foreign else ReadingCheckpoint(source.directory, source.config, source.tensors)
    return measure(reading, output, source.directory, meter)


def checked_settings(
    recipe: str, group_size: int, grid: str, method: str, text: str | None
) -> tuple[Settings, CalibratedRun | None]:
    calibrates = recipe_named(recipe).calibrates
    if group_size not in GROUP_SIZES:
        raise UsageError(f"group size {group_size}: it must be one of {', '.join(map(str, GROUP_SIZES))}")
    if grid not in GRIDS:
        raise UsageError(f"unknown grid {grid[:40]!r}: the grids are {', '.join(GRIDS)}")
    if method not in METHODS:
        raise UsageError(f"unknown method {method[:40]!r}: the methods are {', '.join(METHODS)}")
    if not calibrates or (method == "rtn" and text is None):
        return Settings(recipe, group_size, grid), None
    if grid != "mse":
        raise UsageError(f"grid {grid}: calibration searches its scales; leave out one of the two")
    used = DEFAULT_TEXT.read_text(encoding="utf-8") if text is None else text
    digest = hashlib.sha256(used.encode()).hexdigest()
    chosen: Method = method
    return Settings(recipe, group_size, grid, method, digest), CalibratedRun(used, chosen)


def _conversion_settings(
    checkpoint: ForeignCheckpoint, recipe: str, grid: str, method: str, text: str | None, round_scales: bool
) -> Settings:
    if recipe != CONVERTED:
        raise UsageError(
            f"{checkpoint.directory}: is quantized already ({checkpoint.form}) and can only be converted; leave "
            f"out the recipe {recipe[:40]!r}, or quantize the checkpoint that it was made from"
        )
    if method != "rtn" or text is not None or grid != "mse":
        raise UsageError(f"{checkpoint.directory}: is quantized already: a conversion takes no method, text or grid")
    grid_name = "source's rounded" if round_scales else "source's"
    return Settings(CONVERTED, common_scheme(checkpoint).group_size, grid_name)


def carried_files(source: Path) -> dict[str, bytes]:
    """Contents of config.json, the index and the small files that come along, by name."""
    contents = {}
    for name in ("config.json", INDEX_NAME, *CARRIED_FILES):
        path = source / name
        if not path.is_file():
            continue
        try:
            if path.stat().st_size > _LARGEST_CARRIED:
                raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes are too many for this file")
            contents[name] = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return contents


def fingerprint_of(settings: Settings, decided: Plan, inputs: Sequence[object]) -> str:
    """Changes when anything changes that the output's bytes depend on. `inputs` stand for the source's files."""
    value = {
        "format": FORMAT,
        "localmoe": version("localmoe"),
        "settings": str(settings),
        "inputs": inputs,
        "config": decided.config,
        "tensors": [
            (name, str(dtype), shape) for unit in decided.units for name, (dtype, shape) in unit.tensors.items()
        ],
    }
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def finished_output(output: Path, settings: Settings) -> Manifest | None:
    """The manifest of an output that is complete, whatever it was made from."""
    if not (output / MANIFEST_NAME).is_file() or (output / JOURNAL_NAME).exists():
        return None
    manifest = Manifest.read(output)
    whole = all(
        (output / name).is_file() and (output / name).stat().st_size == record.bytes
        for name, record in manifest.files.items()
    )
    return manifest if whole and manifest.settings == settings and manifest.localmoe == version("localmoe") else None


def _finished(output: Path, settings: Settings, inputs: list[Path], meter: Meter) -> Manifest | None:
    """The manifest of an output that is complete and was made from these very inputs."""
    manifest = finished_output(output, settings)
    if manifest is None:
        return None
    sizes = {path.name: path.stat().st_size for path in inputs}
    if {name: record.bytes for name, record in manifest.source.files.items()} != sizes:
        return None
    meter.restart("hash", sum(sizes.values()))
    for path in inputs:
        name = path.name
        if sha256_of(path, lambda count, name=name: meter.add(count, name)) != manifest.source.files[name]:  # type: ignore[misc]
            return None
    return manifest


def source_of(directory: Path, hashes: Mapping[str, FileRecord]) -> Source:
    """Hub name and revision come from the hub cache's own layout, models--ORG--NAME/snapshots/REVISION."""
    parts = directory.absolute().parts[-3:]
    name = revision = None
    if len(parts) == 3 and parts[1] == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", parts[2]):
        match = re.fullmatch(r"models--([A-Za-z0-9._-]+?)--([A-Za-z0-9._-]+)", parts[0])
        name, revision = (f"{match[1]}/{match[2]}", parts[2]) if match else (None, None)
    return Source(name, revision, hashes)


def manifest_of(
    settings: Settings,
    decided: Plan,
    source: Source,
    writer: CheckpointWriter,
) -> Manifest:
    """All but the files' hashes and the loss."""
    tensors, errors, norms = {}, [], []
    zeros = {}  # groups of zeros by module
    for job in decided.jobs:
        if job.scheme is None:
            continue
        record = writer.records[job.unit.name]
        error, norm = float(record["squared_error"]), float(record["squared_norm"])
        if record.get("zero_groups"):
            zeros[job.unit.name] = int(record["zero_groups"])
        errors.append(error)
        norms.append(norm)
        tensors[job.unit.name] = TensorRecord(
            _scheme_name(job.scheme),
            relative_error(error, norm),
            record.get("method"),
            record.get("tokens"),
            record.get("output_error"),
        )
    parameters = sum(job.parameters for job in decided.jobs)
    size = sum(unit.nbytes for unit in decided.units)
    totals = Totals(
        parameters=parameters,
        bytes=size,
        bits_per_weight=round(8 * size / parameters, 4),
        relative_error=relative_error(ordered_sum(torch.tensor(errors)), ordered_sum(torch.tensor(norms))),
    )
    return Manifest(version("localmoe"), settings, source, {}, tensors, totals, (*decided.notes, *_zero_notes(zeros)))


def _zero_notes(zeros: Mapping[str, int]) -> list[str]:
    """A matrix may have groups of zeros, which cost nothing; many of them are worth a look at the source."""
    if not zeros:
        return []
    most = max(sorted(zeros), key=zeros.__getitem__)
    return [
        f"{len(zeros)} matrices have groups of nothing but zeros, which are stored exactly: {most} has {zeros[most]:,}"
    ]


def _scheme_name(scheme: Scheme) -> str:
    return f"{scheme.kind}-g{scheme.group_size}"


def _json(config: Mapping[str, object]) -> bytes:
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
