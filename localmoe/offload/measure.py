"""Measures what `plan` reckons with: memory, the kernels' products, torch's, the disk. A few seconds in all.

Speeds of products are measured on weights that are all alike: the kernels' time does not depend on values.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from localmoe.errors import StorageError
from localmoe.formats.weights import DenseWeight, Int4Weight, Int8Weight, Nf4Weight, Weight
from localmoe.kernels.dispatch import Kernels
from localmoe.offload.device import choose_card
from localmoe.offload.machine import Figure
from localmoe.offload.measure_card import card_probes
from localmoe.offload.probe import Attempts, Facts

SECONDS = 8.0
"""After so many, `measure` begins nothing more."""
DISK_BYTES = 256 << 20
_COLUMNS = 4096
_MEMORY_BYTES = 192 << 20  # of one form's matrix, and four times the last-level cache where that is more
_MOST_BYTES = 1 << 30
_MANY_BYTES = 12 << 20
_MANY_TOKENS = 256
_EXPERT_ROWS, _EXPERT_COLUMNS, _EXPERTS_USED = 1408, 2048, 6  # DeepSeek-V2-Lite's
_WORD = 0x19191919
_BLOCK = 8 << 20
_PIECE = 4 << 20
_PIECES_AHEAD = 8
_DISK_SECONDS = 2.0  # of writing, and again of reading: a slow disk is measured on less
_LEAST_DISK_BYTES = 32 << 20
_LEAST_MEMORY = 3 << 29  # bytes available below which nothing is measured
_IN_MEMORY = ("tmpfs", "ramfs")


def measure(
    facts: Facts,
    home: Path,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
    seconds: float = SECONDS,
) -> tuple[dict[str, Figure], tuple[str, ...]]:
    """Figures by the names of `machine.FIGURE_UNITS`, and a line for each that could not be measured.

    What matters most comes first; nothing is begun when `seconds` are over. `home` is where the disk is measured.
    Sets torch's threads, which are the process's.
    """
    attempt = Attempts()
    figures: dict[str, Figure] = {}
    late: list[str] = []
    end = time.monotonic() + seconds
    for name, what, probe in _probes(facts, home, threads, attempt):
        if time.monotonic() > end:
            late.append(what)
            continue
        progress(f"measuring {what} ...")
        figure = attempt(what, probe, None)
        if figure is not None:
            figures[name] = figure
    if late:
        attempt.failed.append(f"no time left after {seconds:.0f} s for {', '.join(late)}")
    return figures, tuple(attempt.failed)


def _probes(
    facts: Facts, home: Path, threads: int | None, attempt: Attempts
) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    """(name, what it is, how to measure it), by weight in a plan."""
    kernels = None
    if facts.available_bytes is not None and facts.available_bytes < _LEAST_MEMORY:
        attempt.failed.append(f"memory bandwidth: only {facts.available_bytes >> 20} MiB are available")
    else:
        kernels = attempt("kernels", lambda: Kernels.choose("auto", threads), None)
    card = attempt("card", lambda: choose_card("auto", None), None) if facts.cards else None
    if card is not None:
        yield from card_probes(card.device)
    if kernels is None or kernels.backend is None:
        yield "disk", "disk read bandwidth", partial(disk, home)
        return
    size = min(_MOST_BYTES, max(_MEMORY_BYTES, 4 * facts.cache_bytes))
    backend = kernels.backend
    yield "read", "memory read bandwidth", lambda: _measured(backend.read_bandwidth())
    for form in ("int4", "int8", "bf16"):
        yield f"weights.{form}", f"one token's {form} products", partial(_one_token, kernels, form, size)
    yield "experts", "one token's experts", partial(_experts, kernels, size)
    yield "disk", "disk read bandwidth", partial(disk, home)
    for form in ("int4", "int8"):
        yield f"many.{form}", f"many tokens' {form} products", partial(_many_tokens, kernels, form)
    yield "attention", "torch's products", partial(_torch, kernels)
    yield "many.bf16", "many tokens' bf16 products", partial(_many_tokens, kernels, "bf16")
    yield "weights.nf4", "one token's nf4 products", partial(_one_token, kernels, "nf4", size)
    yield "many.nf4", "many tokens' nf4 products", partial(_many_tokens, kernels, "nf4")
    if facts.cache_bytes:
        yield "cached", "products from the cache", partial(from_cache, kernels, facts.cache_bytes)


def from_cache(kernels: Kernels, cache_bytes: int) -> Figure:
    """Bytes/s of one token's int4 products whose weights a last-level cache of this size holds."""
    return _one_token(kernels, "int4", min(cache_bytes // 2, _MANY_BYTES), 200)


def _one_token(kernels: Kernels, form: str, size: int, passes: int = 3) -> Figure:
    """Bytes/s of stored weights, by the best of the passes."""
    weight = _in_about(form, size)
    product, x = kernels.product(weight), torch.ones(1, _COLUMNS)
    kernels.share_cores(1)
    return _measured(weight.nbytes / _best(lambda: product(x), passes))


def _experts(kernels: Kernels, size: int) -> Figure:
    """Bytes/s of stored int4 weights: the experts that one token chooses in a layer, in one call, and then others,
    until each of those in `size` bytes had its turn; by the best of three such passes."""
    gate_bytes = _matrix("int4", _EXPERT_ROWS, _EXPERT_COLUMNS).nbytes
    count = max(2 * _EXPERTS_USED, size // (3 * gate_bytes))
    layer = kernels.experts(count, lambda _: _expert())
    calls = torch.arange(count // _EXPERTS_USED * _EXPERTS_USED).view(-1, 1, _EXPERTS_USED)
    x, shares = torch.ones(1, _EXPERT_COLUMNS), torch.full((1, _EXPERTS_USED), 1 / _EXPERTS_USED)
    kernels.share_cores(1)

    def all_of_them() -> None:
        for chosen in calls:
            layer(x, chosen, shares)

    return _measured(calls.numel() * 3 * gate_bytes / _best(all_of_them, 3))


def _expert() -> tuple[Weight, Weight, Weight]:
    gate, up = (_matrix("int4", _EXPERT_ROWS, _EXPERT_COLUMNS) for _ in range(2))
    return gate, up, _matrix("int4", _EXPERT_COLUMNS, _EXPERT_ROWS)


def _many_tokens(kernels: Kernels, form: str) -> Figure:
    """Multiply-adds/s."""
    weight = _in_about(form, _MANY_BYTES)
    product, x = kernels.product(weight), torch.ones(_MANY_TOKENS, _COLUMNS)
    kernels.share_cores(_MANY_TOKENS)
    return _measured(_MANY_TOKENS * weight.out_features * _COLUMNS / _best(lambda: product(x), 2))


def _torch(kernels: Kernels) -> Figure:
    """Multiply-adds/s of float32 products in the shapes that many tokens' attention has: 16 heads, 192 wide."""
    query, key = torch.ones(16, 512, 192), torch.ones(16, 192, 1024)
    kernels.share_cores(512)
    return _measured(16 * 512 * 192 * 1024 / _best(lambda: torch.bmm(query, key), 3))


def _measured(value: float) -> Figure:
    return Figure(value, "measured")


def _best(work: Callable[[], object], passes: int) -> float:
    """Seconds of the quickest pass after one to warm up."""
    work()
    times = []
    for _ in range(passes):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def _in_about(form: str, size: int) -> Weight:
    """A matrix of this form in about `size` bytes."""
    bits = {"int4": 4.5, "nf4": 4.5, "int8": 8.5, "bf16": 16}[form]
    return _matrix(form, max(64, int(size * 8 / bits / _COLUMNS)), _COLUMNS)


def _matrix(form: str, rows: int, columns: int) -> Weight:

    def full(width: int, value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows, width), value, dtype=dtype)

    match form:
        case "int4":
            return Int4Weight(full(columns // 8, _WORD, torch.int32), full(columns // 32, 0.01, torch.bfloat16), 32)
        case "int8":
            return Int8Weight(full(columns // 4, _WORD, torch.int32), full(columns // 32, 0.01, torch.bfloat16), 32)
        case "nf4":
            return Nf4Weight(full(columns // 2, 0x19, torch.uint8), full(columns // 64, 0.01, torch.float32))
        case _:
            return DenseWeight(full(columns, 0.01, torch.bfloat16))


def disk(home: Path, size: int = DISK_BYTES, mountinfo: Path = Path("/proc/self/mountinfo")) -> Figure:
    """Bytes/s of reading a file of at most `size` bytes in `home`, which is made if need be, past the page cache: as
    experts come that memory does not hold, in pieces all over the file, many asked for at once.

    The file has no name from the start, so it is gone whatever happens. Raises StorageError for a place in memory or
    too full to tell, OSError.
    """
    home.mkdir(parents=True, exist_ok=True)
    kind = _file_system(home.resolve(), mountinfo)
    if kind in _IN_MEMORY:
        raise StorageError(f"{home} is in memory ({kind}), so there is no disk to measure")
    free = os.statvfs(home)
    size = min(size, free.f_bavail * free.f_frsize // 4) // _BLOCK * _BLOCK
    if size < min(_LEAST_DISK_BYTES, DISK_BYTES):
        raise StorageError(f"{home} has too little free space to measure with")
    with tempfile.TemporaryFile(dir=home, buffering=0) as file:
        descriptor = file.fileno()
        written = _write(descriptor, size)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        rate = _read(descriptor, written)
    note = f"{kind or 'file system not known'}, {written >> 20} MiB in pieces"
    return Figure(rate, "measured", note)


def _write(descriptor: int, size: int) -> int:
    """Blocks of bytes that no file system can compress, until `size` or the time is up; all on the disk."""
    block = os.urandom(_BLOCK)
    started, written = time.perf_counter(), 0
    while written < size and (written < _LEAST_DISK_BYTES or time.perf_counter() - started < _DISK_SECONDS):
        count = os.write(descriptor, block)
        os.fdatasync(descriptor)
        written += count
    return written


def _read(descriptor: int, size: int) -> float:
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as mapped:
        mapped.madvise(mmap.MADV_RANDOM)  # nothing but what is asked for
        pieces = sorted(range(0, size, _PIECE), key=lambda start: start // _PIECE * 37 % 101)  # all over the file
        started, done = time.perf_counter(), 0
        for index, piece in enumerate(pieces):
            due = pieces[:_PIECES_AHEAD] if index == 0 else pieces[index + _PIECES_AHEAD - 1 : index + _PIECES_AHEAD]
            for start in due:
                mapped.madvise(mmap.MADV_WILLNEED, start, min(_PIECE, size - start))
            done += len(mapped[piece : piece + _PIECE])
            if time.perf_counter() - started > _DISK_SECONDS:
                break
        return done / (time.perf_counter() - started)


def _file_system(path: Path, mountinfo: Path) -> str:
    """The type of the file system that `path` is on, empty where the kernel does not tell."""
    best, kind = "", ""
    try:
        lines = mountinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split(" ")[4].replace("\\040", " ")
        if path.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, after.split(" ")[0]
    return kind
