"""`localmoe quantize`: a source checkpoint to 4 bits."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from localmoe import store
from localmoe.cli import options, prompt, streams, units
from localmoe.cli.opening import nothing_collected, packed_by_others
from localmoe.cli.option_groups import grouped
from localmoe.cli.sanitize import printable_line
from localmoe.cli.values import check_choice
from localmoe.errors import UsageError

if TYPE_CHECKING:
    from localmoe.cli.render import Advance
    from localmoe.formats.manifest import Manifest, Measured
    from localmoe.store import ModelRef
    from quantize.pipeline import Report
    from quantize.progress import OnProgress, Progress

_KEYS = (
    "model, path, recipe, group_size, grid, already_there, resumed_bytes, parameters, bits_per_weight, source_bytes, "
    "size_bytes, relative_error, worst [{tensor, scheme, relative_error}], measured {text_sha256, tokens, perplexity, "
    "reference_perplexity, kld_mean, kld_error, kld_median, kld_p90, kld_p99, kld_max, same_top1, and more} or null, "
    "notes"
)
_WORST = 3


@dataclass(frozen=True)
class Rounding:
    """How weights become 4 bits."""

    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="R", help=f"{', '.join(store.RECIPES)}.  [default: balanced]"),
    ] = None
    group_size: Annotated[
        int, typer.Option("--group-size", metavar="32|64|128", help="Weights that share one scale.")
    ] = 32
    grid: Annotated[
        str,
        typer.Option(
            "--grid", metavar="mse|absmax", help="Search the scales for the least error, or take the largest weight's."
        ),
    ] = "mse"
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="rtn|gptq|auto",
            help="Round to the nearest, compensate errors (GPTQ), or choose by measured error.  "
            "[default: rtn; with --calibrate auto]",
        ),
    ] = None
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate", metavar="FILE", help="Run the model on this text first.  [gptq and auto: a text of ours]"
        ),
    ] = None


@dataclass(frozen=True)
class Checks:
    """What is measured and allowed, and where the source stays."""

    gate: Annotated[
        float | None,
        typer.Option(
            "--gate", metavar="KLD", min=0, help="Fail if the mean KLD to the source is above this (0.05, say)."
        ),
    ] = None
    round_scales: Annotated[
        bool,
        typer.Option(
            "--round-scales", help="Of a GPTQ or AWQ checkpoint: round scales that bf16 does not hold exactly."
        ),
    ] = False
    discard_source: Annotated[
        bool,
        typer.Option(
            "--discard-source",
            help="Pull a shard, quantize it, drop it: for a disk that does not hold the source. Takes no calibration.",
        ),
    ] = False
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision", metavar="R", help="With --discard-source: a branch, tag or commit.  [default: main]"
        ),
    ] = None
    no_gate: Annotated[bool, typer.Option("--no-gate", help="Do not measure what was lost.")] = False


@grouped
def quantize(
    model: options.NamedModel,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Where to put it.  [default: localmoe's own store]"),
    ] = None,
    *,
    how: Rounding,
    checks: Checks,
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help(_KEYS))] = False,
    debug: options.Debug = False,
) -> None:
    """Make a 4-bit model of MODEL's source: a name that was pulled, or a directory.

    One pass, a few megabytes at a time; then both models are run, layer by layer, on a held-out text, and what was
    lost is written into localmoe.json and README.md. Interrupted, the same command goes on where it stopped.
    MODEL may end in :RECIPE instead of --recipe. A GPTQ or AWQ checkpoint is converted, with the same numbers.
    """
    ref = store.parse_ref(model)
    grid = _grid(how.grid)
    if how.group_size not in (32, 64, 128):
        raise UsageError(f"--group-size: {how.group_size} is not one of 32, 64, 128")
    if checks.no_gate and checks.gate is not None:
        raise UsageError("--no-gate measures nothing, so --gate has nothing to compare: give one of them")
    rounding = _method(how.method, how.calibrate is not None)
    text = prompt.read_file(how.calibrate) if how.calibrate is not None else None
    if checks.discard_source:
        if rounding != "rtn" or text is not None or checks.round_scales:
            raise UsageError(
                "--discard-source never has the whole source: leave out --method, --calibrate, --round-scales"
            )
        remote = _Remote(ref, _recipe(ref, how.recipe, None), checks.revision)
        measure = not checks.no_gate
        _discarding(remote, output, how.group_size, grid, measure=measure, limit=checks.gate, as_json=as_json)
        return
    if checks.revision is not None:
        raise UsageError("--revision goes with --discard-source; `localmoe pull --revision` chooses it before")
    source = _source(ref)
    chosen = _recipe(ref, how.recipe, source)
    target = output if output is not None else store.artifact_dir(ref.name, chosen)
    if (rounding != "rtn" or text is not None) and chosen in store.RECIPES:
        _tell_if_nothing_is_calibrated(chosen)
    report = make_artifact(
        source,
        target,
        chosen,
        group_size=how.group_size,
        grid=grid,
        method=rounding,
        text=text,
        measure=not checks.no_gate,
        limit=checks.gate,
        round_scales=checks.round_scales,
    )
    name = str(target) if output is not None else f"{ref.name}:{chosen}"
    if as_json:
        streams.write_json(_record(name, report))
    else:
        streams.write(_summary(name, source, report))


def make_artifact(
    source: Path,
    output: Path,
    recipe: str,
    *,
    group_size: int = 32,
    grid: Literal["mse", "absmax"] = "mse",
    method: Literal["rtn", "gptq", "auto"] = "rtn",
    text: str | None = None,
    measure: bool = True,
    limit: float | None = None,
    round_scales: bool = False,
) -> Report:
    """Quantize with a progress bar. Ctrl-C loses nothing."""
    from localmoe.cli.render import progress_bar

    try:
        with progress_bar("quantize") as advance:
            with nothing_collected():
                from quantize.gate import Gate
                from quantize.pipeline import quantize as run_pipeline

            return run_pipeline(
                source,
                output,
                recipe,
                group_size=group_size,
                grid=grid,
                method=method,
                calibration_text=text,
                gate=Gate(limit) if measure else None,
                round_scales=round_scales,
                progress=_told(advance),
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on where it stopped") from None


@dataclass(frozen=True)
class _Remote:
    """What is to be quantized from the hub, into what."""

    ref: ModelRef
    recipe: str
    revision: str | None


def _discarding(
    wanted: _Remote,
    output: Path | None,
    group_size: int,
    grid: Literal["mse", "absmax"],
    *,
    measure: bool,
    limit: float | None,
    as_json: bool,
) -> None:
    """Quantize shard by shard from the hub, with a progress bar. Ctrl-C loses nothing but a shard's rest."""
    from localmoe.cli.render import progress_bar
    from localmoe.hub.download import pull_without_weights

    ref, recipe = wanted.ref, wanted.recipe
    target = output if output is not None else store.artifact_dir(ref.name, recipe)
    found = pull_without_weights(ref, revision=wanted.revision)
    try:
        with progress_bar("quantize") as advance:
            with nothing_collected():
                from quantize.discard import quantize_from_hub
                from quantize.gate import Gate

            report = quantize_from_hub(
                found,
                target,
                recipe,
                group_size=group_size,
                grid=grid,
                gate=Gate(limit) if measure else None,
                progress=_told(advance),
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on where it stopped") from None
    name = str(target) if output is not None else f"{ref.name}:{recipe}"
    if as_json:
        streams.write_json(_record(name, report))
    else:
        streams.write(_summary(name, f"{found.listing.repo} on the hub", report))


def _told(advance: Advance) -> OnProgress:
    def report(progress: Progress) -> None:
        title = "check" if progress.stage == "hash" else progress.stage
        advance(progress.done_bytes, progress.total_bytes, progress.item, title)

    return report


def _recipe(ref: ModelRef, flag: str | None, source: Path | None) -> str:
    ending = None if ref.ending == "source" else ref.ending
    if flag is not None:
        check_choice(flag, store.RECIPES, "--recipe")
    if flag is not None and ending is not None and flag != ending:
        raise UsageError(f"--recipe {flag} contradicts the ending of {ref.name}:{ending}; give one of them")
    return flag or ending or (store.CONVERTED if source is not None and packed_by_others(source) else "balanced")


def _tell_if_nothing_is_calibrated(recipe: str) -> None:
    from quantize.recipes import recipe_named

    if not recipe_named(recipe).calibrates:
        streams.tell(f"{recipe} has no int4 matrices, and others are not calibrated: all are rounded to the nearest")


def _grid(text: str) -> Literal["mse", "absmax"]:
    check_choice(text, ("mse", "absmax"), "--grid")
    return "mse" if text == "mse" else "absmax"


def _method(text: str | None, calibrated: bool) -> Literal["rtn", "gptq", "auto"]:
    if text is None:
        return "auto" if calibrated else "rtn"
    check_choice(text, ("rtn", "gptq", "auto"), "--method")
    return "rtn" if text == "rtn" else "gptq" if text == "gptq" else "auto"


def _source(ref: ModelRef) -> Path:
    if ref.directory is not None:
        return store.resolve(str(ref.directory)).path
    return store.resolve(f"{ref.name}:source").path


def _record(name: str, report: Report) -> dict[str, Any]:
    manifest = report.manifest
    return {
        "model": name,
        "path": str(report.output),
        "recipe": manifest.settings.recipe,
        "group_size": manifest.settings.group_size,
        "grid": manifest.settings.grid,
        "already_there": report.already_there,
        "resumed_bytes": report.resumed_bytes,
        "parameters": manifest.totals.parameters,
        "bits_per_weight": manifest.totals.bits_per_weight,
        "source_bytes": _source_bytes(manifest),
        "size_bytes": manifest.totals.bytes,
        "relative_error": manifest.totals.relative_error,
        "worst": [
            {"tensor": tensor, "scheme": scheme, "relative_error": error} for tensor, scheme, error in _worst(manifest)
        ],
        "measured": asdict(manifest.measured) if manifest.measured is not None else None,
        "notes": list(manifest.notes),
    }


def _source_bytes(manifest: Manifest) -> int:
    """The source's shards; `report.source_bytes` counts only what this run read."""
    return sum(record.bytes for name, record in manifest.source.files.items() if name.endswith(".safetensors"))


def _worst(manifest: Manifest) -> list[tuple[str, str, float]]:
    ranked = sorted(manifest.tensors.items(), key=lambda item: (-item[1].relative_error, item[0]))
    return [(name, record.scheme, record.relative_error) for name, record in ranked[:_WORST]]


def _calibrated(manifest: Manifest) -> str:
    """How many matrices got which rounding, and how few tokens the rarest of them saw; empty without calibration."""
    records = [record for record in manifest.tensors.values() if record.method is not None]
    if not records:
        return ""
    counts = Counter(record.method for record in records)
    methods = ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=str))
    fewest = min(record.tokens or 0 for record in records)
    return f"{methods} of {len(records)} calibrated matrices; the rarest saw {fewest:,} tokens"


def loss(measured: Measured) -> str:
    """What an artifact lost, in a line."""
    perplexity = f"perplexity {measured.perplexity:.3f}"
    if measured.kld_mean is None:
        return f"{perplexity} on {measured.tokens:,} held-out tokens; not compared with the source"
    error = f" +- {measured.kld_error:.5f}" if measured.kld_error is not None else ""
    return (
        f"mean KLD {measured.kld_mean:.5f}{error}, p99 {measured.kld_p99:.4f}, same top-1 {measured.same_top1:.1%}, "
        f"{perplexity} (source {measured.reference_perplexity:.3f}), on {measured.tokens:,} held-out tokens"
    )


def _summary(name: str, source: object, report: Report) -> str:
    manifest, totals = report.manifest, report.manifest.totals
    state = ": was here already" if report.already_there else ""
    if report.resumed_bytes:
        state = f": went on after {units.size(report.resumed_bytes)} done earlier"
    facts = [
        ("recipe", str(manifest.settings)),
        ("weights", f"{units.quantity(totals.parameters)}, {totals.bits_per_weight:.2f} bits each"),
        ("size", f"{units.size(totals.bytes)}, from {units.size(_source_bytes(manifest))} in {source}"),
        ("error", f"{totals.relative_error:.4f} of the weights' norm"),
    ]
    facts += [("worst", f"{error:.4f} {tensor} ({scheme})") for tensor, scheme, error in _worst(manifest)]
    calibrated = _calibrated(manifest)
    if calibrated:
        facts.append(("rounded", calibrated))
    if manifest.measured is not None:
        facts.append(("lost", loss(manifest.measured)))
    facts += [("note", note) for note in manifest.notes]
    facts.append(("in", str(report.output)))
    lines = [f"{name}{state}", *(f"  {label:<7}  {value}" for label, value in facts)]
    command = f"localmoe run {shlex.quote(name)} 'Tell me a story about a dragon'"
    return "".join(f"{printable_line(line)}\n" for line in [*lines, f"next: {command}"])
