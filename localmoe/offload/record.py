"""Doctor's measurements on the disk, so that `plan` need not measure: $LOCALMOE_HOME/doctor.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from localmoe.errors import StorageError
from localmoe.formats.files import write_atomically
from localmoe.offload.machine import FIGURE_UNITS, Figure, GpuSpeed, Machine, assumed_disk, assumed_gpu, cpu_speed
from localmoe.offload.probe import Card, Facts

_LINK_SHARE = 0.8  # of a PCIe link's data sheet arrives, by large copies from pinned memory

FORMAT = 1
NAME = "doctor.json"


@dataclass(frozen=True)
class Record:
    """Figures by name, and what they were measured on: another CPU's, or other threads', are of no use."""

    cpu: str
    threads: int
    tier: str
    measured: str
    """The day, as 2026-01-31."""
    figures: Mapping[str, Figure]
    card: str = ""
    """The card's name, where there was one."""

    @classmethod
    def today(cls, cpu: str, threads: int, tier: str, figures: Mapping[str, Figure], card: str = "") -> Record:
        """What was just measured."""
        return cls(cpu, threads, tier, date.today().isoformat(), figures, card)


def save(home: Path, record: Record) -> Path:
    """Write the record whole or not at all. Raises StorageError."""
    path = home / NAME
    content = {
        "format": FORMAT,
        "cpu": record.cpu,
        "threads": record.threads,
        "tier": record.tier,
        "measured": record.measured,
        "card": record.card,
        "figures": {name: {"value": figure.value, "note": figure.note} for name, figure in record.figures.items()},
    }
    try:
        home.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def read(home: Path) -> tuple[Record | None, str]:
    """(the record or None, why there is none): never raises, since a plan can do with assumptions."""
    path = home / NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None, "nothing is measured yet"
    except OSError as error:
        return None, f"{path} cannot be read ({error.strerror or error})"
    except (ValueError, RecursionError):
        return None, f"{path} is damaged"
    if isinstance(content, dict) and content.get("format") != FORMAT:
        return None, f"{path} is of another version of localmoe"
    record = _record(content)
    return (record, "") if record is not None else (None, f"{path} is damaged")


def _record(content: Any) -> Record | None:
    if not isinstance(content, dict) or not isinstance(content.get("figures"), dict):
        return None
    cpu, threads, tier, day = (content.get(key) for key in ("cpu", "threads", "tier", "measured"))
    if not (isinstance(cpu, str) and isinstance(tier, str) and isinstance(day, str) and type(threads) is int):
        return None
    figures = {}
    for name, entry in content["figures"].items():
        value, note = (entry.get("value"), entry.get("note")) if isinstance(entry, dict) else (None, None)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isinstance(note, str):
            return None
        if not 0 < value < math.inf:
            return None
        if name in FIGURE_UNITS:
            figures[name] = Figure(float(value), "cached", note)
    card = content.get("card", "")
    return Record(cpu, threads, tier, day, figures, card if isinstance(card, str) else "")


def machine_here(facts: Facts, home: Path, threads: int, *, with_card: bool, card: str = "") -> Machine:
    """This machine by doctor's record where that is of the same CPU, threads and kernels, else by assumptions; `notes`
    says which. `with_card` adds the first card of `facts`, else one called `card`, else one that is assumed."""
    record, why = read(home)
    tier = facts.tiers[-1] if facts.tiers else ""
    if record is not None and (record.cpu, record.threads, record.tier) != (facts.cpu, threads, tier):
        record, why = None, f"{home / NAME} is of another CPU, number of threads or kernel tier"
    if record is None:
        known: Mapping[str, Figure] = {}
        note = f"the speeds are assumed, since {why}: `localmoe doctor` measures them"
    else:
        known = record.figures
        note = f"the speeds that are cached were measured by `localmoe doctor` on {record.measured}"
    return Machine(
        cpu=cpu_speed(threads, facts.cache_bytes, known, tier),
        disk=known.get("disk") or assumed_disk(),
        gpu=_gpu(facts.cards, card, record) if with_card else None,
        notes=(note,),
    )


def _gpu(cards: tuple[Card, ...], name: str, record: Record | None) -> GpuSpeed:
    gpu = assumed_gpu(name)
    if cards:
        gpu = replace(assumed_gpu(cards[0].name, cards[0].memory_bytes), free=cards[0].free_bytes)
        gpu = _linked(gpu, cards[0])
    if record is None or not record.card or record.card != gpu.name:
        return gpu
    figures = record.figures
    return replace(
        gpu,
        read=figures.get("gpu.read", gpu.read),
        macs=figures.get("gpu.macs", gpu.macs),
        pcie=figures.get("gpu.pcie", gpu.pcie),
        handoff=figures.get("gpu.handoff", gpu.handoff),
    )


def _linked(gpu: GpuSpeed, card: Card) -> GpuSpeed:
    link = card.link_bytes_per_second
    if card.link is None or link is None:
        return gpu
    note = f"{_LINK_SHARE:.0%} of PCIe {card.link[0]} x{card.link[1]}"
    return replace(gpu, pcie=Figure(link * _LINK_SHARE, "assumed", note))
