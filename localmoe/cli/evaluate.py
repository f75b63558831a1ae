"""`localmoe eval`: how well a model predicts a text, and how far it is from its source."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localmoe.cli import model_argument, options, prompt, streams

if TYPE_CHECKING:
    from quantize.evaluate import Evaluation, EvaluationProgress

_KEYS = (
    "tokens",
    "perplexity",
    "reference_perplexity",
    "kld_mean",
    "kld_median",
    "kld_p99",
    "kld_max",
    "same_top1",
)


def evaluate(
    model: options.Model,
    text: Annotated[Path, typer.Option("--text", metavar="FILE", show_default=False, help="The text to predict.")],
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="MODEL", help="Compare with this model, mostly MODEL:source."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help=options.json_help(", ".join(_KEYS) + "; null without --reference"))
    ] = False,
    device: options.Device = "auto",
    kernels: options.KernelTier = "auto",
    threads: options.Threads = None,
    vram: options.Vram = None,
    ram: options.Ram = None,
    ctx: options.Context = None,
    cache_dtype: options.CacheDtype = "auto",
    deterministic: options.Deterministic = False,
    debug: options.Debug = False,
) -> None:
    """Measure MODEL on a text: perplexity and, against a reference, KL divergence and agreement.

    KLD is the divergence of MODEL's next-token distribution from the reference's, in nats a token; same top-1
    is how often both find the same token likeliest.
    """
    machine = options.machine(device, kernels, threads, vram, ram, ctx, cache_dtype)
    machine = replace(machine, deterministic=deterministic)
    content = prompt.read_file(text)
    reference = None if reference is None else model_argument.meant(reference)

    from localmoe.cli.opening import open_engine
    from localmoe.cli.render import progress_bar
    from quantize.evaluate import evaluate as measure

    with ExitStack() as opened:
        engine = opened.enter_context(open_engine(model, machine)[1])
        exactly = replace(machine, kernels="reference", cache_dtype="auto")  # no rounding but the checkpoint's own
        other = opened.enter_context(open_engine(reference, exactly)[1]) if reference is not None else None
        advance = opened.enter_context(progress_bar("eval", counts="tokens"))

        def report(progress: EvaluationProgress) -> None:
            advance(progress.done_tokens, progress.total_tokens, "tokens")

        result = measure(engine, content, reference=other, progress=report)
    if as_json:
        streams.write_json({key: getattr(result, key) for key in _KEYS})
    else:
        streams.write(_lines(result))


def _lines(result: Evaluation) -> str:
    lines = [f"tokens      {result.tokens}", f"perplexity  {result.perplexity:.4f}"]
    if result.reference_perplexity is not None:
        lines += [
            f"reference   {result.reference_perplexity:.4f}",
            f"KLD         mean {result.kld_mean:.5f}, median {result.kld_median:.5f}, "
            f"p99 {result.kld_p99:.5f}, max {result.kld_max:.5f}",
            f"same top-1  {result.same_top1:.2%}",
        ]
    return "\n".join(lines) + "\n"
