"""What this machine is: CPU, kernels, memory, limits, cards. Reads what the system tells; nothing is measured here.

Each question may fail on its own, with one line in `failed`: a doctor that dies of one missing file helps nobody.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from localmoe.kernels.cores import physical_cores
from localmoe.memory import available_memory

Run = Callable[[Sequence[str]], str]
T = TypeVar("T")

FEATURES = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "amx_int8", "amx_bf16",
)  # fmt: skip
"""The CPU features that matter to products, as /proc/cpuinfo spells them."""

_CARD_FIELDS = (
    "name", "memory.total", "memory.free", "driver_version", "compute_cap", "pcie.link.gen.max", "pcie.link.width.max",
)  # fmt: skip
_GENERATION_BYTES = 0.985e9 / 4  # a lane and direction of PCIe 1.0; each generation doubles it (0.985 GB/s is PCIe 3's)
_MIB = 1 << 20


@dataclass(frozen=True)
class Places:
    """Where the system tells things; tests put their own files there."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")


@dataclass(frozen=True)
class Card:
    """A GPU as nvidia-smi describes it. `link` is its slot's and its own best, as (generation, lanes)."""

    name: str
    memory_bytes: int | None
    free_bytes: int | None
    driver: str
    compute_capability: str
    link: tuple[int, int] | None

    @property
    def link_bytes_per_second(self) -> float | None:
        """What the link carries by its data sheet, each way; about 0.8 of it arrives."""
        if self.link is None:
            return None
        generation, lanes = self.link
        return float(_GENERATION_BYTES * 2 ** (generation - 1) * lanes)


@dataclass(frozen=True)
class Facts:
    """Sizes in bytes; None and empty where the system does not tell. `memory_limit` and `cpu_limit` (processors) are
    the control group's, `tiers` the kernel tiers that run here, the best last, `load` the last minute's average."""

    cpu: str
    processors: int
    cores: int
    features: tuple[str, ...]
    tiers: tuple[str, ...]
    cache_bytes: int
    memory_bytes: int | None
    available_bytes: int | None
    huge_pages: str | None
    memory_limit: int | None
    cpu_limit: float | None
    load: float | None
    cards: tuple[Card, ...]
    failed: tuple[str, ...]


class Attempts:
    """Runs probes one by one; one that fails leaves its line in `failed` and its default in the result."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def __call__(self, what: str, probe: Callable[[], T], default: T) -> T:
        try:
            return probe()
        except Exception as error:  # whatever a system comes up with, the other probes go on
            reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
            self.failed.append(f"{what}: {reason}")
            return default


def look(places: Places | None = None, run: Run | None = None, *, ask_cards: bool = True) -> Facts:
    """Ask the system, in a few milliseconds (nvidia-smi, where there is one, takes longer)."""
    places = places or Places()
    attempt = Attempts()
    cpuinfo = attempt("CPU", lambda: (places.proc / "cpuinfo").read_text(encoding="utf-8", errors="replace"), "")
    flags = set(_field(cpuinfo, "flags").split())
    unknown: tuple[int | None, int | None] = (None, None)
    total, available = attempt("memory", lambda: _memory(places.proc / "meminfo"), unknown)
    return Facts(
        cpu=_field(cpuinfo, "model name") or "unknown",
        processors=len(os.sched_getaffinity(0)),
        cores=attempt("cores", lambda: len(physical_cores()), 1),
        features=tuple(name for name in FEATURES if name in flags),
        tiers=attempt("kernels", _tiers, ()),
        cache_bytes=attempt("cache", lambda: last_level_cache(places.sys), 0),
        memory_bytes=total,
        available_bytes=available,
        huge_pages=attempt("transparent huge pages", lambda: _huge_pages(places.sys), None),
        memory_limit=attempt("memory limit", lambda: _memory_limit(places), None),
        cpu_limit=attempt("CPU limit", lambda: _cpu_limit(places), None),
        load=attempt("load", lambda: os.getloadavg()[0], None),
        cards=attempt("GPU", lambda: cards(run), ()) if ask_cards else (),
        failed=tuple(attempt.failed),
    )


def _tiers() -> tuple[str, ...]:
    from localmoe.kernels.cpu import available_tiers

    return available_tiers()


def last_level_cache(system: Path = Places.sys) -> int:
    """Bytes of the caches of level 3 (or the highest there is) that this process's processors share."""
    levels: dict[int, dict[str, int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        for index in (system / f"devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]*"):
            if _line(index / "type") == "Instruction":
                continue
            shared = _line(index / "shared_cpu_list") or str(cpu)
            levels.setdefault(int(_line(index / "level")), {})[shared] = _kib(_line(index / "size"))
    return sum(levels[max(levels)].values()) if levels else 0


def cards(run: Run | None = None) -> tuple[Card, ...]:
    """NVIDIA's cards; none where there is no nvidia-smi. Raises RuntimeError, OSError where it fails."""
    try:
        text = (run or _run)(["nvidia-smi", f"--query-gpu={','.join(_CARD_FIELDS)}", "--format=csv,noheader,nounits"])
    except FileNotFoundError:
        return ()
    return tuple(_card(line) for line in text.splitlines() if line.count(",") >= len(_CARD_FIELDS) - 1)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=3, check=False, errors="replace")
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{command[0]} did not answer in {error.timeout:.0f} s") from error
    if done.returncode != 0:
        said = (done.stdout.strip() or done.stderr.strip()).splitlines()
        raise RuntimeError(f"{command[0]} failed: {said[0] if said else f'status {done.returncode}'}")
    return done.stdout


def _card(line: str) -> Card:
    name, total, free, driver, capability, generation, lanes = (part.strip() for part in line.rsplit(",", 6))
    link = (int(generation), int(lanes)) if generation.isdigit() and lanes.isdigit() and int(generation) else None
    return Card(name, _mib(total), _mib(free), driver, capability, link)


def _mib(text: str) -> int | None:
    return int(text) * _MIB if text.isdigit() else None  # "[N/A]" on cards that share the CPU's memory


def usable_memory(places: Places | None = None) -> int | None:
    """Bytes that this process can still take: what is available, or its control group's limit where that is less. None
    where the system tells neither."""
    places = places or Places()
    attempt = Attempts()
    found = available_memory(places.proc / "meminfo"), attempt("limit", lambda: _memory_limit(places), None)
    return min((size for size in found if size is not None), default=None)


def _memory(meminfo: Path) -> tuple[int | None, int | None]:
    text = meminfo.read_text(encoding="ascii", errors="replace")
    found = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    return found.get("MemTotal"), found.get("MemAvailable")


def _huge_pages(system: Path) -> str | None:
    text = _line(system / "kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", text)
    return chosen[1] if chosen else None


def _memory_limit(places: Places) -> int | None:
    """The least `memory.max` from this process's control group up to the root; version 1's one file else."""
    limits = [_line(group / "memory.max") for group in _groups(places)]
    limits.append(_line(places.sys / "fs/cgroup/memory/memory.limit_in_bytes"))
    numbers = [int(limit) for limit in limits if limit.isdigit() and int(limit) < 1 << 60]  # v1's "none" is near 2^63
    return min(numbers, default=None)


def _cpu_limit(places: Places) -> float | None:
    quotas = [_line(group / "cpu.max").split() for group in _groups(places)]
    numbers = [int(pair[0]) / int(pair[1]) for pair in quotas if len(pair) == 2 and pair[0].isdigit()]
    return min(numbers, default=None)


def _groups(places: Places) -> list[Path]:
    root = places.sys / "fs/cgroup"
    try:
        own = re.search(r"^0::(/.*)$", (places.proc / "self/cgroup").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        own = None
    path = root / own[1].lstrip("/") if own and ".." not in own[1] else root
    return [root, *[root / part for part in (path, *path.parents) if part.is_relative_to(root) and part != root]]


def _field(cpuinfo: str, name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else ""


def _line(path: Path) -> str:
    """A small system file, empty where there is none."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _kib(text: str) -> int:
    number, unit = text[:-1], text[-1:]
    return int(number) * {"K": 1 << 10, "M": 1 << 20}[unit] if number.isdigit() and unit in "KM" else 0
