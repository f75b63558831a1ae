"""`localmoe doctor`: what this machine is, how fast it is at what models need, and what would make it faster."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmoe import store
from localmoe.cli import options, streams, units
from localmoe.cli.sanitize import printable_line
from localmoe.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from localmoe.offload.machine import Figure
    from localmoe.offload.probe import Card, Facts

_KEYS = (
    "cpu, processors, cores, threads, features, tier, tiers, cache_bytes, memory_bytes, available_bytes, huge_pages, "
    "memory_limit, cpu_limit, load, cards [{name, memory_bytes, free_bytes, driver, compute_capability, link}], "
    "figures {name: {value, unit, origin, note}}, advice, failed, saved (the file that plan reads, or null)"
)
_ONE_CHANNEL = 25e9  # bytes/s: above what one channel of DDR4 reads, below what two do
_SLOW_DISK = 1e9


def doctor(
    threads: options.Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help(_KEYS))] = False,
    debug: options.Debug = False,
) -> None:
    """Measure this machine: memory, kernels, disk; say what would make it faster.

    Takes a few seconds, 1.5 GiB of memory and, in $LOCALMOE_HOME, for a moment a file of 256 MiB. `plan` reckons with
    what it finds.
    """
    from localmoe.offload.measure import measure
    from localmoe.offload.probe import look

    home = store.home()
    try:
        streams.passing_remark("looking around ...")
        facts = look()
        figures, failed = measure(facts, home, threads, streams.passing_remark)
    finally:
        streams.passing_remark("")
    used = threads or facts.cores
    saved, why_not = _save(home, facts, used, figures)
    facts = replace(facts, failed=(*facts.failed, *failed, *why_not))
    advice = what_would_help(facts, figures, used)
    if as_json:
        streams.write_json(_record(facts, figures, advice, used, saved))
    else:
        streams.write(_text(facts, figures, advice, used, saved))


def _save(home: Path, facts: Facts, threads: int, figures: Mapping[str, Figure]) -> tuple[Path | None, tuple[str, ...]]:
    from localmoe.offload.record import Record, save

    if not figures:
        return None, ()
    try:
        card = facts.cards[0].name if facts.cards else ""
        return save(home, Record.today(facts.cpu, threads, _tier(facts), figures, card)), ()
    except StorageError as error:
        return None, (f"record: {error}",)


def what_would_help(facts: Facts, figures: Mapping[str, Figure], threads: int) -> list[str]:
    """Lines of advice, what helps most first; only what this machine shows."""
    lines = []
    if facts.load is not None and facts.load > 0.5 * facts.processors:
        lines.append(f"other programs are at work (a load of {facts.load:.1f}): measure again when the machine is idle")
    read, disk = figures.get("read"), figures.get("disk")
    if facts.tiers and "avx2" not in facts.tiers:
        lines.append(
            "the kernels have neither AVX2 nor AVX-512 here: if this is a virtual machine, pass the CPU through"
        )
    if read is not None and read.value < _ONE_CHANNEL:
        lines.append(
            f"memory reads {_rate(read)}, and decode is as fast as memory: that is one channel's worth. Two equal "
            "modules in the right slots, or XMP/EXPO switched on, may double it"
        )
    if facts.cpu_limit is not None and facts.cpu_limit < facts.processors:
        lines.append(
            f"this control group may use {facts.cpu_limit:.3g} of {facts.processors} processors: raise its limit"
        )
    if threads < facts.cores:
        lines.append(f"--threads {threads} leaves {facts.cores - threads} of {facts.cores} cores idle")
    if facts.memory_limit is not None and facts.memory_bytes is not None and facts.memory_limit < facts.memory_bytes:
        lines.append(
            f"this control group may use {units.size(facts.memory_limit)} of {units.size(facts.memory_bytes)} of "
            "memory: experts beyond it are read from the disk"
        )
    if disk is not None and disk.value < _SLOW_DISK:
        lines.append(
            f"the disk reads {_rate(disk)}: put $LOCALMOE_HOME and $HF_HOME on an NVMe drive, for opening models and "
            "for experts that memory does not hold"
        )
    if facts.huge_pages == "never":
        lines.append("transparent huge pages are off: `echo madvise` into /sys/kernel/mm/transparent_hugepage/enabled")
    if facts.cards:
        lines.append("`localmoe plan MODEL --device cuda` says what the card adds")
    return lines


def _tier(facts: Facts) -> str:
    return facts.tiers[-1] if facts.tiers else ""


def _record(
    facts: Facts, figures: Mapping[str, Figure], advice: list[str], threads: int, saved: Path | None
) -> dict[str, Any]:
    from localmoe.offload.machine import FIGURE_UNITS

    measured = {name: asdict(figure) | {"unit": FIGURE_UNITS[name]} for name, figure in figures.items()}
    return asdict(facts) | {
        "threads": threads,
        "tier": _tier(facts) or None,
        "figures": measured,
        "advice": advice,
        "saved": str(saved) if saved else None,
    }


def _text(facts: Facts, figures: Mapping[str, Figure], advice: list[str], threads: int, saved: Path | None) -> str:
    rows = [
        ("CPU", f"{facts.cpu}, {threads} threads on {facts.processors} processors"),
        ("features", " ".join(facts.features) or "none that matter"),
        ("kernels", f"{_tier(facts) or 'not known'}, of {', '.join(facts.tiers) or 'none'}"),
        ("cache", units.size(facts.cache_bytes) if facts.cache_bytes else "not known"),
        ("memory", _memory(facts)),
        ("huge pages", facts.huge_pages or "not known"),
        ("limits", _limits(facts)),
        *((f"GPU {number}", _card(card)) for number, card in enumerate(facts.cards)),
        *([] if facts.cards else [("GPU", "no NVIDIA card found")]),
        *_figure_rows(figures),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += [f"failed: {line}" for line in facts.failed]
    lines += ["", *(f"faster: {line}" for line in advice)] if advice else []
    lines += ["", f"kept for `localmoe plan` in {saved}"] if saved else []
    return "".join(f"{printable_line(line)}\n" for line in lines)


def _figure_rows(figures: Mapping[str, Figure]) -> list[tuple[str, str]]:
    rows = []
    for name, label, places in (
        ("read", "memory reads", ""),
        ("experts", "experts", "int4, a token's in a layer"),
        ("gpu.read", "the card's memory", ""),
        ("gpu.pcie", "to the card", "from pinned memory"),
        ("disk", "disk reads", figures["disk"].note if "disk" in figures else ""),
    ):
        if name in figures:
            rows.append((label, _rate(figures[name]) + (f" ({places})" if places else "")))
    for prefix, label, rate in (("weights.", "one token", _rate), ("many.", "many tokens", _products)):
        parts = [
            f"{name.removeprefix(prefix)} {rate(each)}" for name, each in figures.items() if name.startswith(prefix)
        ]
        if parts:
            rows.append((label, ", ".join(parts)))
    return rows


def _rate(figure: Figure) -> str:
    return f"{figure.value / 1e9:.3g} GB/s"


def _products(figure: Figure) -> str:
    return f"{figure.value / 1e9:.3g} G multiply-adds/s"


def _memory(facts: Facts) -> str:
    if facts.memory_bytes is None:
        return "not known"
    free = f", {units.size(facts.available_bytes)} available" if facts.available_bytes is not None else ""
    return f"{units.size(facts.memory_bytes)}{free}"


def _limits(facts: Facts) -> str:
    memory = f"{units.size(facts.memory_limit)} of memory" if facts.memory_limit is not None else ""
    cpu = f"{facts.cpu_limit:.3g} processors" if facts.cpu_limit is not None else ""
    return ", ".join(part for part in (memory, cpu) if part) or "none by the control group"


def _card(card: Card) -> str:
    parts = [card.name]
    if card.memory_bytes is not None:
        free = f", {units.size(card.free_bytes)} free" if card.free_bytes is not None else ""
        parts.append(f"{units.size(card.memory_bytes)}{free}")
    parts.append(f"compute capability {card.compute_capability}, driver {card.driver}")
    if card.link is not None:
        parts.append(f"PCIe {card.link[0]} x{card.link[1]}")
    return ", ".join(parts)
