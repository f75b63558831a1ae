"""Numbers as people read them."""

from __future__ import annotations

_SIZES = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: int) -> str:
    """Bytes with three digits, 1024-based: `9.12 GiB`."""
    power = 0
    while power < 4 and count >= 1024 ** (power + 1):
        power += 1
    number = count / 1024**power
    return f"{number:.0f} {_SIZES[power]}" if number >= 100 else f"{number:.3g} {_SIZES[power]}"


def rate(tokens_per_second: float) -> str:
    """A speed without an exponent, with three digits or more: `1,077 tokens/s`."""
    digits = f"{tokens_per_second:,.0f}" if tokens_per_second >= 100 else f"{tokens_per_second:.3g}"
    return f"{digits} tokens/s"


def counted(count: int, what: str) -> str:
    """`1 turn`, `2 turns`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def are_left(count: int, what: str) -> str:
    """`1 turn is left`, `no turn is left`."""
    return f"no {what} is left" if count == 0 else f"{counted(count, what)} {'is' if count == 1 else 'are'} left"


def quantity(count: int) -> str:
    """A count in thousands, millions or billions: `15.7 B`."""
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return str(count)
