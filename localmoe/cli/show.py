"""`localmoe show`: what a model is, how it was quantized, and what that cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmoe import store
from localmoe.cli import options, settings, streams, units
from localmoe.cli.sanitize import printable_line
from localmoe.text.files import read_json_object

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from localmoe.formats.manifest import Manifest, TensorRecord
    from localmoe.serving import EngineSupport
    from localmoe.store import Resolved

_KEYS = (
    "model, kind (artifact, source), path, recipe, group_size, grid, calibration {method, text_sha256, rounded {gptq, "
    "weighted, mse: matrices}, rarest_expert, rarest_expert_tokens} or null, source {name, revision}, parameters, "
    "bits_per_weight, size_bytes, relative_error, errors [{part, scheme, matrices, mean_relative_error, "
    "max_relative_error}], worst [{tensor, scheme, relative_error}], measured {text_sha256, tokens, perplexity, "
    "reference_perplexity, kld_mean, kld_error, kld_median, kld_p90, kld_p99, kld_max, same_top1, and more} or null, "
    "notes, sampling, config, "
    "files [{name, size_bytes}]; with --serving: model, path, engines [{engine, problems [{engine, rule, what, "
    "source}], tensor_parallel, tensor_parallel_whole_experts, expert_parallel: sizes, commands [[what for, [line]]]}]"
)
_WORST = 5
_PARTS = (  # the first that a module's name contains
    (".mlp.experts.", "routed experts"),
    (".mlp.shared_experts.", "shared experts"),
    (".mlp.", "dense MLP"),
    (".self_attn.", "attention"),
    ("lm_head", "head"),
    ("embed_tokens", "embedding"),
)


@dataclass(frozen=True)
class PartError:
    """What rounding cost the matrices of one part of the model, as ||w - w'|| / ||w||."""

    part: str
    scheme: str
    matrices: int
    mean_relative_error: float
    max_relative_error: float


@dataclass(frozen=True)
class WorstTensor:
    """One of the matrices that lost most."""

    tensor: str
    scheme: str
    relative_error: float


@dataclass(frozen=True)
class CalibrationFacts:
    """How the layers' int4 matrices were rounded by what the model saw in a text. `rounded` counts them by what was
    taken; `rarest_expert` is the routed expert that the fewest tokens reached, None where no expert was calibrated."""

    method: str
    text_sha256: str
    rounded: dict[str, int]
    rarest_expert: str | None
    rarest_expert_tokens: int | None


@dataclass(frozen=True)
class FileSize:
    """One file of the model's directory."""

    name: str
    size_bytes: int


@dataclass(frozen=True)
class Description:
    """Everything `show` shows; its fields are the keys of `--json`. None and empty: not known of a source."""

    model: str
    kind: str
    path: str
    parameters: int
    bits_per_weight: float
    size_bytes: int
    sampling: dict[str, float]
    config: dict[str, Any]
    files: list[FileSize]
    recipe: str | None = None
    group_size: int | None = None
    grid: str | None = None
    calibration: CalibrationFacts | None = None
    source: dict[str, str | None] | None = None
    relative_error: float | None = None
    errors: list[PartError] = field(default_factory=list)
    worst: list[WorstTensor] = field(default_factory=list)
    measured: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def show(
    model: options.Model,
    serving: Annotated[
        bool, typer.Option("--serving", help="The commands that serve it with vLLM and SGLang, and on how many GPUs.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help(_KEYS))] = False,
    debug: options.Debug = False,
) -> None:
    """Show MODEL's architecture, recipe, bits per weight, rounding errors, sampling defaults and files."""
    resolved = store.resolve(model)
    if serving:
        streams.write(serving_text(resolved)) if not as_json else streams.write_json(_serving_record(resolved))
        return
    description = describe(resolved)
    if as_json:
        streams.write_json(asdict(description))
    else:
        streams.write(as_text(description))


def describe(resolved: Resolved) -> Description:
    """Read what the model's directory says of itself. Raises CheckpointError naming a damaged file."""
    from localmoe.cli.opening import label

    path = resolved.path
    files = [FileSize(entry.name, entry.stat().st_size) for entry in sorted(path.iterdir()) if entry.is_file()]
    common: dict[str, Any] = {
        "model": label(resolved),
        "kind": resolved.kind,
        "path": str(path),
        "size_bytes": sum(file.size_bytes for file in files),
        "sampling": settings.sampling({}, resolved.name, settings.from_checkpoint(path)),
        "config": read_json_object(path / "config.json"),
        "files": files,
    }
    if resolved.kind == "source":
        parameters, stored = _weights(path)
        return Description(**common, parameters=parameters, bits_per_weight=8 * stored / max(parameters, 1))

    from localmoe.formats.manifest import Manifest

    manifest = Manifest.read(path)
    worst = sorted(manifest.tensors.items(), key=lambda item: (-item[1].relative_error, item[0]))[:_WORST]
    return Description(
        **common,
        parameters=manifest.totals.parameters,
        bits_per_weight=manifest.totals.bits_per_weight,
        recipe=manifest.settings.recipe,
        group_size=manifest.settings.group_size,
        grid=manifest.settings.grid,
        calibration=calibration_facts(manifest),
        source={"name": manifest.source.name, "revision": manifest.source.revision},
        relative_error=manifest.totals.relative_error,
        errors=errors_by_part(manifest.tensors),
        worst=[WorstTensor(name, record.scheme, record.relative_error) for name, record in worst],
        measured=asdict(manifest.measured) if manifest.measured is not None else None,
        notes=list(manifest.notes),
    )


def calibration_facts(manifest: Manifest) -> CalibrationFacts | None:
    """What the manifest says of its calibration; None where there was none."""
    if manifest.settings.calibration is None:
        return None
    rounded = Counter(record.method for record in manifest.tensors.values() if record.method is not None)
    reached = {
        name.rpartition(".")[0]: record.tokens
        for name, record in manifest.tensors.items()
        if ".mlp.experts." in name and record.tokens is not None
    }
    rarest = min(sorted(reached), key=reached.__getitem__, default=None)
    return CalibrationFacts(
        method=manifest.settings.method,
        text_sha256=manifest.settings.calibration,
        rounded=dict(sorted(rounded.items())),
        rarest_expert=rarest,
        rarest_expert_tokens=None if rarest is None else reached[rarest],
    )


def errors_by_part(tensors: Mapping[str, TensorRecord]) -> list[PartError]:
    """The rounding errors of each part of the model and scheme, the largest mean first."""
    groups: dict[tuple[str, str], list[float]] = {}
    for name, record in tensors.items():
        part = next((part for word, part in _PARTS if word in name), "other")
        groups.setdefault((part, record.scheme), []).append(record.relative_error)
    errors = [
        PartError(part, scheme, len(values), sum(values) / len(values), max(values))
        for (part, scheme), values in groups.items()
    ]
    return sorted(errors, key=lambda error: (-error.mean_relative_error, error.part))


def _weights(path: Path) -> tuple[int, int]:
    """(weights, bytes) of a source's tensors; the scales of FP8 blocks count as bytes only."""
    from localmoe.formats.checkpoint import Checkpoint

    with Checkpoint.open(path) as checkpoint:
        parameters = stored = 0
        for info in checkpoint.tensors.values():
            stored += info.nbytes
            if not info.name.endswith("_scale_inv"):
                parameters += info.nbytes // info.dtype.itemsize
    return parameters, stored


def as_text(description: Description) -> str:
    """What `show` prints, control characters made visible."""
    from localmoe.cli.render import table

    facts = [
        ("directory", description.path),
        ("architecture", _architecture(description.config)),
        ("weights", f"{units.quantity(description.parameters)}, {description.bits_per_weight:.2f} bits each"),
        ("size", units.size(description.size_bytes)),
        ("sampling", settings.as_text(description.sampling)),
    ]
    if description.recipe is not None:
        made = f"{description.recipe}, groups of {description.group_size}, {description.grid} grid"
        facts.insert(2, ("recipe", made))
        if description.calibration is not None:
            facts[3:3] = _calibration(description.calibration)
        facts.insert(-1, ("error", f"{description.relative_error:.4f} of the weights' norm"))
        facts.insert(-1, ("lost", _lost(description.measured)))
    width = max(len(name) for name, _ in facts)
    blocks = [
        printable_line(description.model),
        "\n".join(f"  {name:<{width}}  {printable_line(value)}" for name, value in facts),
    ]
    if description.errors:
        rows = [
            (e.part, e.scheme, str(e.matrices), f"{e.mean_relative_error:.4f}", f"{e.max_relative_error:.4f}")
            for e in description.errors
        ]
        header = ("  PART", "SCHEME", "MATRICES", "MEAN ERROR", "WORST")
        rows = [(f"  {row[0]}", *row[1:]) for row in rows]
        blocks += ["", table(header, rows, ("left", "left", "right", "right", "right"))]
    blocks += ["", *(f"  note: {printable_line(note)}" for note in description.notes)] if description.notes else []
    files = [(f"  {file.name}", units.size(file.size_bytes)) for file in description.files]
    blocks += ["", table(("  FILE", "SIZE"), files, ("left", "right"))]
    return "\n".join(blocks) + "\n"


def _lost(measured: dict[str, Any] | None) -> str:
    from localmoe.cli.quantize import loss
    from localmoe.formats.manifest import Measured

    return loss(Measured(**measured)) if measured is not None else "not measured"


def _serving_record(resolved: Resolved) -> dict[str, Any]:
    from localmoe.cli.opening import label

    return {"model": label(resolved), "path": str(resolved.path), "engines": [asdict(s) for s in _support(resolved)]}


def _support(resolved: Resolved) -> tuple[EngineSupport, ...]:
    from localmoe.serving import support

    return support(read_json_object(resolved.path / "config.json"), str(resolved.path))


def serving_text(resolved: Resolved) -> str:
    """Which engines load the model, on how many GPUs, and the commands to type."""
    from localmoe.cli.opening import label
    from localmoe.serving import PLAIN_EMBEDDING, TIKTOKEN, TRANSFORMERS
    from localmoe.text import tiktoken, tokenizer_file

    lines, engines = [label(resolved)], _support(resolved)
    for found in engines:
        lines += ["", found.engine]
        if found.problems:
            lines += [f"  does not load it: {p.what}  ({p.rule}; {p.source})" for p in found.problems]
            continue
        lines.append(f"  experts shared out whole: on {_sizes(found.tensor_parallel_whole_experts)} GPUs")
        lines.append(f"  experts cut like all else: on {_sizes(found.tensor_parallel) or 'no number of'} GPUs")
        for purpose, commands in found.commands:
            lines += [f"  {purpose}:", *(f"    {command}" for command in commands)]
    if any(problem.rule == PLAIN_EMBEDDING for found in engines for problem in found.problems):
        lines += ["", TRANSFORMERS]
    tokenizer = tokenizer_file(resolved.path)
    if tokenizer is not None and tokenizer.name == tiktoken.FILE:
        lines += ["", TIKTOKEN]
    lines += ["", "Conditions read from the engines' sources (localmoe/serving.py), not tried here."]
    return "".join(f"{printable_line(line)}\n" for line in lines)


def _sizes(sizes: tuple[int, ...]) -> str:
    return " or ".join(", ".join(map(str, sizes)).rsplit(", ", 1))


def _calibration(facts: CalibrationFacts) -> list[tuple[str, str]]:
    counts = ", ".join(f"{name} {count}" for name, count in facts.rounded.items())
    lines = [("calibration", f"{facts.method}, on text {facts.text_sha256[:12]}; matrices rounded by {counts}")]
    if facts.rarest_expert is not None:
        lines.append(("rarest expert", f"{facts.rarest_expert}, {facts.rarest_expert_tokens:,} tokens of that text"))
    return lines


def _architecture(config: Mapping[str, Any]) -> str:
    words = [str(config.get("model_type", "unknown"))]
    for key, name in (
        ("num_hidden_layers", "layers"),
        ("hidden_size", "wide"),
        ("n_routed_experts", "routed experts"),
        ("num_experts_per_tok", "a token"),
        ("max_position_embeddings", "tokens of context"),
    ):
        if config.get(key) is not None:
            words.append(f"{config[key]} {name}")
    return ", ".join(words)
