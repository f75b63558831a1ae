"""Which processors the kernels' threads should run on: one a physical core, efficiency cores left out."""

from __future__ import annotations

import os
from pathlib import Path

_SYSTEM = Path("/sys/devices")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def physical_cores(system: Path = _SYSTEM, quota: Path = _QUOTA) -> list[int]:
    """Processors this process may use, one for each physical core, in ascending order; never empty.

    The memory bus gains nothing from SMT siblings, and a team waits for its slowest member, so Intel's efficiency
    cores are left out where there are others. A container's CPU quota bounds the number.
    """
    allowed = sorted(os.sched_getaffinity(0))
    efficiency = _list(_read(system / "cpu_atom/cpus"))
    fast = [cpu for cpu in allowed if cpu not in efficiency] or allowed
    cores: dict[str, int] = {}
    for cpu in fast:
        siblings = _read(system / f"system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(siblings or str(cpu), cpu)  # containers may hide the topology: every processor counts
    limit, _, period = _read(quota).partition(" ")
    most = max(1, int(limit) // int(period)) if limit.isdigit() and period.isdigit() else len(cores)
    return list(cores.values())[:most]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _list(text: str) -> set[int]:
    """The numbers of a list such as `0-3,8`."""
    numbers: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers
