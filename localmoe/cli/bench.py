"""`localmoe bench`: tokens a second, and where a token's time goes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmoe.cli import opening, options, plot, speed, streams, units
from localmoe.cli.opening import label, locate
from localmoe.cli.option_groups import MachineOptions, grouped
from localmoe.cli.plan import Foreseen, foreseen
from localmoe.cli.sanitize import printable_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from localmoe.benchmark import Benchmark
    from localmoe.engine import Engine

_KEYS = (
    "model", "kernels", "threads", "prompt_tokens", "completion_tokens", "context", "open_seconds",
    "first_token_seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "read_bandwidth_bytes_per_second",
    "bytes_per_token", "disk_bytes_per_token", "bandwidth_fraction", "peak_rss_bytes", "rss_anon_bytes", "breakdown",
    "beside {part: ms} (what runs at the same time as a card's parts)",
    "hit_rate_by_layer (null: no card)",
    "predicted {prefill_tokens_per_second, decode_tokens_per_second}: what plan reckons from doctor's figures",
    "with --explain-speed also " + speed.KEYS, "with --plot also " + plot.KEYS,
)  # fmt: skip
_UNEVEN = 1.1  # the mean over the median of a token's time: from there on the parts do not seem to add up


@dataclass(frozen=True)
class Work:
    """What is timed."""

    prompt: Annotated[int, typer.Option("-p", "--prompt", metavar="N", min=1, help="Tokens to prefill.")] = 512
    count: Annotated[int, typer.Option("-n", metavar="N", min=1, help="Tokens to decode.")] = 128
    context: Annotated[
        int, typer.Option("--context", metavar="N", min=0, help="Tokens in the cache before decoding begins.")
    ] = 0
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Medians over so many.")] = 3


@grouped
def bench(
    model: options.Model,
    work: Work,
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help(", ".join(_KEYS)))] = False,
    *,
    on: MachineOptions,
    explain_speed: options.ExplainSpeed = False,
    plot_to: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE.png", help="Draw decode speed by context, and the experts' heat map by layer."
        ),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Measure how fast MODEL runs here: prefill and decode in tokens/s, and how much of the memory bandwidth that is.

    Random tokens, so it needs no text. Memory bandwidth is measured in the same run; breakdown is in milliseconds of
    a decoded token.
    """
    machine = on.machine()
    if plot_to is not None:
        plot.check(plot_to)
    resolved = locate(model)

    from localmoe.benchmark import measure

    opened: list[Engine] = []

    def open_engine() -> Engine:
        opened.append(opening.load_engine(resolved.path, machine))
        return opened[0]

    try:
        result = measure(
            open_engine,
            prompt_tokens=work.prompt,
            completion_tokens=work.count,
            context=work.context,
            repeats=work.repeats,
            progress=lambda what: streams.passing_remark(f"{what} ..."),
        )
        charts = None if plot_to is None else plot.measure(resolved, machine, work.context)
    finally:
        streams.passing_remark("")
    plan = foreseen(resolved.path / "config.json", machine, work.prompt, work.context + work.count // 2)
    why = {"speed": speed.of_benchmark(opened[0], result)} if explain_speed else {}
    drawn = _drawn(charts, label(resolved), result, plot_to)
    if as_json:
        predicted = {"prefill_tokens_per_second": plan.prefill, "decode_tokens_per_second": plan.decode}
        explained = {key: speed.as_json(value) for key, value in why.items()}
        streams.write_json({"model": label(resolved), **asdict(result), "predicted": predicted, **explained, **drawn})
        return
    streams.write(_lines(label(resolved), result, plan))
    if plot_to is not None:
        streams.write(f"drawn in {printable_line(plot_to)}\n")
    for value in why.values():
        speed.tell(value)


def _drawn(charts: plot.Charts | None, name: str, result: Benchmark, to: Path | None) -> dict[str, Any]:
    """Draw what was measured for a plot, if anything; what `--json` says of it."""
    if charts is None or to is None:
        return {}
    used = units.counted(result.threads, "thread")
    plot.draw(charts, printable_line(f"{name}, {result.kernels} kernels, {used}"), to)
    return charts.as_json(to)


def _lines(name: str, result: Benchmark, plan: Foreseen) -> str:
    lines = [
        f"{name}, {result.kernels} kernels, {units.counted(result.threads, 'thread')}",
        f"open      {result.open_seconds:.2f} s; to the first token of a 16-token prompt "
        f"{result.first_token_seconds:.2f} s",
        f"prefill   {result.prefill_tokens_per_second:.1f} tokens/s, {result.prompt_tokens} tokens; plan foresees "
        f"{plan.prefill:.1f}",
        f"decode    {result.decode_tokens_per_second:.1f} tokens/s, {result.completion_tokens} tokens after "
        f"{result.context}; plan foresees {plan.decode:.1f}",
    ]
    lines += [f"          {note}" for note in plan.notes]
    if result.bandwidth_fraction is not None and result.read_bandwidth_bytes_per_second is not None:
        lines.append(
            f"          {result.bytes_per_token / 1e9:.2f} GB a token: {result.bandwidth_fraction:.0%} of the "
            f"{result.read_bandwidth_bytes_per_second / 1e9:.1f} GB/s that memory gives"
            + ("; the CPU's cache gives more" if result.bandwidth_fraction > 1 else "")
        )
    if result.disk_bytes_per_token is not None and result.disk_bytes_per_token > 0.01 * result.bytes_per_token:
        mean = sum(result.breakdown.values()) / 1e3  # some tokens find their experts in memory: the median hides it
        lines.append(
            f"          {result.disk_bytes_per_token / 1e9:.2f} GB a token from the disk, at "
            f"{result.disk_bytes_per_token / mean / 1e9:.2f} GB/s; {1 / mean:.2f} tokens/s on average"
        )
    lines.append(f"a token   {_by_part(result.breakdown)} ms")
    mean, median = sum(result.breakdown.values()), 1e3 / result.decode_tokens_per_second
    if mean > _UNEVEN * median:
        lines.append(f"          {mean:.2f} ms on average, {median:.2f} the median: something held up some tokens")
    if result.beside:
        lines.append(f"          beside them {_by_part(result.beside)} ms")
    memory = f"memory    {result.peak_rss_bytes / 2**30:.2f} GiB at most, mapped weights included"
    if result.rss_anon_bytes is not None:
        memory += f"; {result.rss_anon_bytes / 2**20:.0f} MiB of it is not the weights' files"
    return "\n".join([*lines, memory]) + "\n"


def _by_part(milliseconds: Mapping[str, float]) -> str:
    return ", ".join(f"{part} {ms:.2f}" for part, ms in milliseconds.items())
