"""Values that options and the config file take: what they may be, and how they are read."""

from __future__ import annotations

import difflib
import math
import re
from types import MappingProxyType
from typing import TYPE_CHECKING

from localmoe.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

DEVICES = ("auto", "cpu", "cuda")
TIERS = ("auto", "reference", "portable", "avx2", "avxvnni", "avx512")
CACHE_DTYPES = ("auto", "bf16", "int8", "float32")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)(KiB|MiB|GiB|TiB|KB|MB|GB|TB|B)")
_ELSEWHERE = {"gpu": "cuda", "nvidia": "cuda"}  # other programs' words, and ours
_UNITS = {"B": 1} | {
    prefix + suffix: base ** (power + 1)
    for suffix, base in (("iB", 1024), ("B", 1000))
    for power, prefix in enumerate("KMGT")
}


def near_miss(word: str, known: Iterable[str], elsewhere: Mapping[str, str] = MappingProxyType({})) -> str | None:
    """The one of `known` that `word` was most likely meant to be, by its letters or as it is called `elsewhere`; None
    where nothing is near."""
    by_case = {each.lower(): each for each in known}
    if elsewhere.get(word.lower()) in by_case.values():
        return elsewhere[word.lower()]
    begun = [each for each in by_case if len(word) > 2 and each.startswith(word.lower())]
    begun += [each for each in by_case if len(each) > 3 and word.lower().startswith(each)]
    near = begun or difflib.get_close_matches(word.lower(), by_case, 1)
    return by_case[near[0]] if near else None


def suggestion(word: str, known: Sequence[str], otherwise: str = "") -> str:
    """`; did you mean NEAR?`, or without a near miss `otherwise`, by default the list of what is known."""
    near = near_miss(word, known)
    return f"; did you mean {near}?" if near else otherwise or f"; there are {', '.join(known)}"


def check_choice(value: object, known: Sequence[str], where: str) -> None:
    """Raises UsageError when `value` is none of `known`; `where` says who set it."""
    if value not in known:
        near = near_miss(str(value), known, _ELSEWHERE)
        raise UsageError(
            f"{where}: {value!r} is not one of {', '.join(known)}" + (f"; did you mean {near}?" if near else "")
        )


def check_sampling(name: str, value: object, where: str) -> None:
    """Raises UsageError when `value` makes no sense for the sampling setting `name`; `where` says who set it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UsageError(f"{where}: {value!r} is not a number")
    if name == "temperature" and value < 0:
        raise UsageError(f"{where}: a temperature is at least 0, not {value}")
    if name == "top_p" and not 0 < value <= 1:
        raise UsageError(f"{where}: a probability above 0 and up to 1 is needed, not {value}")
    if name == "min_p" and not 0 <= value <= 1:
        raise UsageError(f"{where}: a probability from 0 to 1 is needed, not {value}")
    if name == "top_k" and (value < 0 or value != int(value)):
        raise UsageError(f"{where}: a whole number from 0 on is needed, not {value}")
    if name == "repetition_penalty" and not 0 < value <= 100:
        raise UsageError(f"{where}: a number above 0 and up to 100 is needed, 1 is off; not {value}")
    if name in ("presence_penalty", "frequency_penalty") and abs(value) > 100:
        raise UsageError(f"{where}: a number from -100 to 100 is needed, 0 is off; not {value}")


def parse_size(text: str | None, option: str) -> int | None:
    """Bytes in a size written `12GiB` (1024-based) or `12GB` (1000-based). Raises UsageError naming `option`."""
    if text is None:
        return None
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{option}: {text!r} is not a size; write it as 12GiB or 12GB")
    number, unit = match.groups()
    size = int(float(number) * _UNITS[unit])
    if size == 0:
        raise UsageError(f"{option}: a size is more than 0 bytes, not {text}")
    return size
