"""`localmoe eval`: how well a model predicts a text, and how far it is from its source."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmoe.cli import model_argument, options, prompt, streams
from localmoe.cli.option_groups import MachineOptions, grouped
from localmoe.errors import UsageError

if TYPE_CHECKING:
    from localmoe.cli.render import Advance
    from quantize.evaluate import EvaluatedEngine, EvaluationProgress, LayerwiseModel
    from quantize.positions import Evaluation, Positions, TokenClass

_FIGURES = (
    "tokens, perplexity, perplexity_error, reference_perplexity, reference_perplexity_error, kld_mean, kld_error, "
    "kld_median, kld_p90, kld_p99, kld_max, same_top1"
)
_KEYS = (
    f"{_FIGURES}; null without --reference; layerwise (true, false); classes [{{by, name, and the same figures}}] "
    "or null"
)


@grouped
def evaluate(
    model: options.Model,
    text: Annotated[Path, typer.Option("--text", metavar="FILE", show_default=False, help="The text to predict.")],
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="MODEL", help="Compare with this model, mostly MODEL:source."),
    ] = None,
    by_class: Annotated[
        bool,
        typer.Option("--by-class", help="Also by kind of token, and by how certain the reference is of the next one."),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Draw the KLD by place in the window, and its histogram."),
    ] = None,
    layerwise: Annotated[
        bool | None,
        typer.Option(
            "--layerwise/--no-layerwise",
            show_default=False,
            help="Run the models layer by layer in float32, every weight read once.  "
            "[default: when they do not fit into memory together]",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help(_KEYS))] = False,
    *,
    on: MachineOptions,
    deterministic: options.Deterministic = False,
    debug: options.Debug = False,
) -> None:
    """Measure MODEL on a text: perplexity and, against a reference, KL divergence and agreement.

    KLD is the divergence of MODEL's next-token distribution from the reference's, in nats a token; same top-1
    is how often both find the same token likeliest. +- is one standard error.
    """
    machine = replace(on.machine(), deterministic=deterministic)
    content = prompt.read_file(text)
    reference = None if reference is None else model_argument.meant(reference)
    if plot is not None:
        if reference is None:
            raise UsageError("--plot draws the divergence from a reference: name one with --reference")
        from quantize.plots import check_plot

        check_plot(plot)

    streamed = _layerwise(layerwise, machine, [model] if reference is None else [model, reference])
    found, classes = _measured((model, reference), machine, content, streamed=streamed, by_class=by_class)
    result = found.summary()
    if plot is not None:
        from quantize.plots import plot_divergence

        plot_divergence(found, plot, f"{model} against {reference}, {result.tokens:,} tokens")
    if as_json:
        records = None if classes is None else [_class_record(entry) for entry in classes]
        streams.write_json(asdict(result) | {"layerwise": streamed, "classes": records})
    else:
        streams.write(as_text(result) + (_classes_text(classes) if classes else ""))


def _measured(
    models: tuple[str, str | None], machine: options.Machine, content: str, *, streamed: bool, by_class: bool
) -> tuple[Positions, list[TokenClass] | None]:
    """Run a model and its reference over the text, with a progress bar."""
    from localmoe.cli.render import progress_bar
    from quantize.evaluate import evaluate as measure

    model, reference = models
    with ExitStack() as opened:
        if streamed:
            advance = opened.enter_context(progress_bar("eval", counts="tokens"))
            engine: EvaluatedEngine | LayerwiseModel = _streamed(model, advance, opened)
            other: EvaluatedEngine | LayerwiseModel | None = (
                _streamed(reference, advance, opened) if reference is not None else None
            )
        else:
            engine, other = _engines(model, reference, machine, opened)
            advance = opened.enter_context(progress_bar("eval", counts="tokens"))

        def report(progress: EvaluationProgress) -> None:
            advance(progress.done_tokens, progress.total_tokens, "tokens")

        found = measure(engine, content, reference=other, progress=report)
        return found, found.classes(engine.tokenizer) if by_class else None


def _layerwise(asked: bool | None, machine: options.Machine, models: list[str]) -> bool:
    """Whether to run layer by layer: as asked, or where the weights do not fit into memory together."""
    from localmoe.cli.opening import locate
    from localmoe.memory import USABLE, available_memory

    chosen = machine.kernels not in ("auto", "reference") or machine.cache_dtype not in ("auto", "float32")
    if asked and chosen:
        raise UsageError("--layerwise computes with the float32 reference: leave out --kernels and --cache-dtype")
    if asked is not None:
        return asked
    budget = available_memory() if machine.ram is None else machine.ram
    paths = {locate(name).path for name in models}
    needed = sum(shard.stat().st_size for path in paths for shard in path.glob("*.safetensors"))
    if chosen or budget is None or needed <= budget * USABLE:
        return False
    streams.tell(
        f"{needed / 1e9:.1f} GB of weights do not fit into {budget / 1e9:.1f} GB of memory: running layer by layer"
    )
    return True


def _engines(
    model: str, reference: str | None, machine: options.Machine, opened: ExitStack
) -> tuple[EvaluatedEngine, EvaluatedEngine | None]:
    from localmoe.cli.opening import open_engine

    engine = opened.enter_context(open_engine(model, machine)[1])
    if reference is None:
        return engine, None
    # No rounding but the checkpoint's own, which a card's kernels would add
    exactly = replace(machine, kernels="reference", cache_dtype="auto", device="cpu", vram=None)
    return engine, opened.enter_context(open_engine(reference, exactly)[1])


def _streamed(model: str, advance: Advance, opened: ExitStack) -> LayerwiseModel:
    from localmoe.cli.opening import locate
    from localmoe.formats.checkpoint import ReadingCheckpoint
    from localmoe.text import Tokenizer
    from quantize.evaluate import LayerwiseModel
    from quantize.stream import one_thread_each

    opened.enter_context(one_thread_each())
    path = locate(model).path
    return LayerwiseModel(
        ReadingCheckpoint.open(path),
        Tokenizer.from_directory(path),
        lambda done, total: advance(done, total, f"layers of {model}"),
    )


def as_text(result: Evaluation) -> str:
    """The figures, a line each."""
    lines = [
        f"tokens      {result.tokens}",
        f"perplexity  {result.perplexity:.4f}{_error(result.perplexity_error, 4)}",
    ]
    if result.reference_perplexity is not None:
        lines += [
            f"reference   {result.reference_perplexity:.4f}{_error(result.reference_perplexity_error, 4)}",
            f"KLD         mean {result.kld_mean:.5f}{_error(result.kld_error, 5)}, median {result.kld_median:.5f}, "
            f"p90 {result.kld_p90:.5f}, p99 {result.kld_p99:.5f}, max {result.kld_max:.5f}",
            f"same top-1  {result.same_top1:.2%}",
        ]
    return "\n".join(lines) + "\n"


def _error(error: float | None, digits: int) -> str:
    return "" if error is None else f" +- {error:.{digits}f}"


def _class_record(entry: TokenClass) -> dict[str, Any]:
    return {"by": entry.by, "name": entry.name} | asdict(entry.figures)


def _classes_text(classes: list[TokenClass]) -> str:
    from localmoe.cli.render import table

    rows = []
    for entry in classes:
        figures = entry.figures
        row = [f"{entry.by} {entry.name}", f"{figures.tokens:,}", f"{figures.perplexity:.3f}"]
        if figures.kld_mean is not None:
            row += [f"{figures.kld_mean:.5f}{_error(figures.kld_error, 5)}", f"{figures.kld_p99:.5f}"]
            row.append(f"{figures.same_top1:.2%}")
        rows.append(tuple(row))
    header = ("CLASS", "TOKENS", "PERPLEXITY", "KLD", "P99", "SAME TOP-1")[: len(rows[0])]
    return "\n" + table(header, rows, ("left", *["right"] * (len(header) - 1))) + "\n"  # type: ignore[arg-type]
