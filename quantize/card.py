"""The model card: README.md of an output. It says what the manifest says, for people, and nothing of its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from localmoe.errors import UnsupportedModelError
from localmoe.formats.manifest import Manifest, Measured
from localmoe.serving import PLAIN_EMBEDDING, TRANSFORMERS, support

CARD_NAME = "README.md"

_REPO = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")


def card(manifest: Manifest, config: Mapping[str, Any]) -> bytes:
    """README.md as bytes; the same manifest and config.json give the same."""
    model_type = config.get("model_type")
    name = manifest.source.name if _REPO.fullmatch(manifest.source.name or "") else None
    parts = [
        _front_matter(name, manifest, "model.embed_tokens" in manifest.tensors),
        f"# {name or model_type}, quantized with localmoe: {manifest.settings.recipe}\n",
        _facts(manifest, name),
        _loss(manifest.measured),
        _use(),
        _serving(config),
    ]
    if manifest.notes:
        parts.append("## Notes\n\n" + "".join(f"- {note}\n" for note in manifest.notes))
    return "\n".join(parts).encode()


def _front_matter(name: str | None, manifest: Manifest, packed_embedding: bool) -> str:
    library = "localmoe" if packed_embedding else "transformers"
    lines = ["---", f"library_name: {library}", "tags:", "- localmoe"]
    if manifest.settings.recipe != "nf4":
        lines.append("- compressed-tensors")
    if name is not None:
        lines += [f"base_model: {name}", "base_model_relation: quantized"]
    return "\n".join([*lines, "---", ""])


def _facts(manifest: Manifest, name: str | None) -> str:
    settings, totals = manifest.settings, manifest.totals
    source = f"{name}, revision {manifest.source.revision}" if name else "a local checkpoint"
    schemes = Counter(record.scheme for record in manifest.tensors.values())
    method = "rounding to the nearest"
    if settings.calibration is not None:
        rounded = Counter(record.method for record in manifest.tensors.values() if record.method is not None)
        counts = ", ".join(f"{kind} {count}" for kind, count in sorted(rounded.items(), key=str))
        method = f"{settings.method}, calibrated on the text with SHA-256 {settings.calibration[:16]} ({counts})"
    rows = [
        ("source", source),
        ("recipe", f"{settings.recipe}, groups of {settings.group_size}"),
        ("matrices", ", ".join(f"{count} {scheme}" for scheme, count in sorted(schemes.items()))),
        ("method", f"{method}; scales: {settings.grid}"),
        ("weights", f"{totals.parameters:,}"),
        ("size", f"{totals.bytes:,} bytes, {totals.bits_per_weight:.2f} bits a weight, scales included"),
        ("error of the weights", f"{totals.relative_error:.4f} of their norm"),
        ("made by", f"localmoe {manifest.localmoe}"),
    ]
    return "| | |\n| --- | --- |\n" + "".join(f"| {label} | {value} |\n" for label, value in rows)


def _loss(measured: Measured | None) -> str:
    title = "## What was lost\n\n"
    if measured is None:
        return title + "Not measured.\n"
    rows = [("perplexity", _with_error(measured.perplexity, measured.perplexity_error, ".4f"))]
    if measured.reference_perplexity is not None:
        error = measured.reference_perplexity_error
        rows.append(("perplexity of the source", _with_error(measured.reference_perplexity, error, ".4f")))
    if measured.kld_mean is not None:
        rows += [
            ("KL divergence to the source, mean", _with_error(measured.kld_mean, measured.kld_error, ".5f")),
            (
                "median, 90 %, 99 %, largest",
                f"{measured.kld_median:.5f}, {measured.kld_p90:.5f}, {measured.kld_p99:.5f}, {measured.kld_max:.5f}",
            ),
            ("same likeliest token", f"{measured.same_top1:.2%}"),
        ]
    return (
        f"{title}On localmoe's held-out text ({measured.tokens:,} predicted tokens, SHA-256 "
        f"{measured.text_sha256[:16]}), in float32, divergence in nats a token, +- one standard error:\n\n"
        "| | |\n| --- | --- |\n" + "".join(f"| {label} | {value} |\n" for label, value in rows)
    )


def _with_error(value: float, error: float | None, form: str) -> str:
    return f"{value:{form}}" if error is None else f"{value:{form}} +- {error:{form}}"


def _use() -> str:
    return (
        "## Use\n\n"
        "With DIR for this directory:\n\n"
        "```\n"
        'localmoe run DIR "Tell me a story about a dragon"\n'
        "localmoe chat DIR\n"
        "localmoe verify DIR           # every file against the hashes in localmoe.json\n"
        "```\n"
    )


def _serving(config: Mapping[str, Any]) -> str:
    """How vLLM and SGLang take the same files, or why not."""
    lines = ["## Serve\n"]
    try:
        engines = support(config, "DIR")
    except UnsupportedModelError:
        return ""
    for found in engines:
        if found.problems:
            lines.append(f"{found.engine} does not load these files: {'; '.join(p.what for p in found.problems)}.\n")
            continue
        lines.append(f"{found.engine}, on {', '.join(map(str, found.tensor_parallel_whole_experts))} GPUs:\n")
        commands = [line for purpose, typed in found.commands for line in (f"# {purpose}", *typed)]
        lines.append("\n".join(["```", *commands, "```\n"]))
    if any(problem.rule == PLAIN_EMBEDDING for found in engines for problem in found.problems):
        lines.append(f"{TRANSFORMERS}\n")
    return "\n".join(lines)
