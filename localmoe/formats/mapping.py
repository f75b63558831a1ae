"""Memory as the system gives it: files mapped and brought in ahead of their use, what is said to be there of them, and
large pages."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from localmoe.errors import CheckpointError

_POPULATE_READ = 22  # linux/mman.h; Python's mmap holds the GIL during madvise and does not name it
_HUGE_PAGE = 2 << 20  # a page of the system's is at least smaller than this; where they are larger, it declines
_PIECE = 16 << 20  # mapped at a time: closing waits for one
_libc = ctypes.CDLL(None)
_madvise, _mlock = _libc.madvise, _libc.mlock
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def map_file(path: Path, *, huge_pages: bool) -> Tensor:
    """The whole file as uint8: shared and read-only, so that no memory is committed for it.

    With `huge_pages`, what is not in memory yet comes in pages of 2 MiB: fewer to look up for experts that lie all over
    it, and fewer to map; where memory cannot hold the file, they bring much that nobody asked for. Raises
    CheckpointError.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be mapped ({error.strerror})") from error
    if huge_pages:
        with contextlib.suppress(OSError):  # an older kernel has none for files
            mapped.madvise(mmap.MADV_HUGEPAGE)
    with warnings.catch_warnings():  # torch has no read-only tensors and says so
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=torch.uint8)


def bring(file: Tensor, start: int, size: int, *, exactly: bool, stopped: Callable[[], bool]) -> bool:
    """Read and map bytes of a mapped file, or, not `exactly`, the system's larger pages around them.

    False where the kernel cannot (before Linux 5.14), where the file cannot be read, or once `stopped`.
    """
    end, start = start + size, start // mmap.PAGESIZE * mmap.PAGESIZE
    for first in range(start, end, _PIECE):
        address, length = file.data_ptr() + first, min(_PIECE, end - first)
        if exactly:  # what is only met page by page brings a window of readahead around it
            _madvise(address, length, mmap.MADV_WILLNEED)
        if stopped() or _madvise(address, length, _POPULATE_READ) != 0:
            return False
    return True


def use_huge_pages(memory: Tensor) -> None:
    """Ask that new memory of ours comes in pages of 2 MiB, where the system has them; nothing else changes."""
    start = -(-memory.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (memory.data_ptr() + memory.nbytes) // _HUGE_PAGE * _HUGE_PAGE
    if end > start:
        _madvise(start, end - start, mmap.MADV_HUGEPAGE)


def lock(file: Tensor, start: int, size: int) -> bool:
    """Keep bytes of a mapped file in memory for as long as it is mapped. False where the user may lock no more
    (`ulimit -l`)."""
    return int(_mlock(file.data_ptr() + start, size)) == 0


def tells_what_is_in_memory(path: Path) -> bool:
    """Whether Linux says which pages of a mapped file are in memory: it does to those who could write to the file, and
    tells others that all are."""
    try:
        return path.stat().st_uid == os.geteuid() or os.access(path, os.W_OK)
    except OSError:
        return False
