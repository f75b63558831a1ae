"""Numbers as people read them."""

from __future__ import annotations


def size(count: int) -> str:
    """Bytes with three or more digits, 1024-based: `9.12 GiB`."""
    number = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            break
        number /= 1024
    else:
        unit = "TiB"
    return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.3g} {unit}"


def quantity(count: int) -> str:
    """A count in thousands, millions or billions: `15.7 B`."""
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return str(count)
