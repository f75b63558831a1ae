"""A session in one safetensors file: written whole or not at all, read straight into a latent cache.

token_ids        I32 [T]
latents.I        [T, width]   layer I's rows as the cache holds them: BF16, F32, or U8 (an int8 cache's bytes)
mtp.latents      [t, width]   the MTP layer's, where it was running: of the tokens since it was, but for the last s
mtp.state        F32 [s, H]   the state that it waits with, of the last token; or none
expert_heat      F32 [layers, experts], where something counted it
checksum         U8 [32]      SHA-256 of the file's header and every other tensor's SHA-256, in the file's order
__metadata__     `localmoe.sessions.Facts`
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from localmoe.errors import CheckpointError, ContextOverflowError, SessionError, StorageError
from localmoe.formats.journal import sync_directory
from localmoe.formats.safetensors import DTYPE_NAMES, TensorInfo, read_header
from localmoe.formats.scheme import TensorSpec
from localmoe.session import CachedTokens
from localmoe.sessions import Facts, damaged, name_of, read_facts

_WORKERS = 4  # hashing keeps up with a fast disk; it holds no lock of Python's
_CHUNK = 1 << 20  # bytes hashed while they are in the processor's cache


@dataclass(frozen=True)
class Restored:
    """What a file held that the cache does not: what was said and how, and how often experts fired."""

    facts: Facts
    expert_heat: Tensor | None


def write(path: Path, facts: Facts, cached: CachedTokens, expert_heat: Tensor | None = None) -> Facts:
    """Save `cached` and `facts`, whose counts are filled in; returns them. `path` gets the new file in one step, when
    it is on disk; a failure leaves the old one, and `cached`, as they were. Raises StorageError.
    """
    tensors = _tensors(cached)
    if expert_heat is not None:
        tensors["expert_heat"] = expert_heat.float()
    drafted = len(tensors["mtp.latents"]) if "mtp.latents" in tensors else 0
    facts = replace(facts, tokens=len(tensors["token_ids"]), draft_tokens=drafted)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    header = _header(tensors, facts)
    size = len(header) + sum(tensor.nbytes for tensor in tensors.values()) + 32
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{name_of(path)}-")
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                _make_room(file.fileno(), size)
                _write_all(file.fileno(), header, tensors)
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise
        sync_directory(path.parent)
    except OSError as error:
        raise StorageError(
            f"{path}: the session cannot be written ({size:,} bytes): {error.strerror or error}"
        ) from error
    return facts


def restore(path: Path, cached: CachedTokens, model_hash: str, cache_dtype: str, model: str = "this model") -> Restored:
    """Fill the empty `cached` from a file, which is checked to the last bit while it is read.

    An MTP layer's part is used where `cached` has that drafter. Raises, leaving `cached` to be thrown away,
    SessionError for a file that is damaged, of another model or version, or holds another kind of cache, and
    ContextOverflowError where it holds more tokens than `cached` can.
    """
    name = name_of(path)
    infos, header, facts = _open(path)
    if facts.model_hash != model_hash:
        raise SessionError(
            f"session {name} is {facts.model[:80] or 'another model'}'s, and its latents mean nothing to {model}: "
            "run it with that model, as it was then, or choose another name"
        )
    if facts.cache_dtype != cache_dtype:
        raise SessionError(
            f"session {name} holds a latent cache in {facts.cache_dtype}, not {cache_dtype}: "
            f"--cache-dtype {facts.cache_dtype} opens it"
        )
    if facts.tokens >= cached.capacity:
        raise ContextOverflowError(
            f"session {name} holds {facts.tokens:,} tokens and the context {cached.capacity:,}; choose a larger --ctx"
        )
    into = _destinations(facts, infos, cached, name)
    _read_all(path, header, infos, into, name)
    if facts.draft_tokens and cached.mtp is not None:
        start = facts.tokens - facts.draft_tokens - len(into["mtp.state"])
        cached.mtp.resume(start, facts.draft_tokens, into["mtp.state"])
    cached.adopt(into["token_ids"].tolist())
    return Restored(facts, into.get("expert_heat"))


def _tensors(cached: CachedTokens) -> dict[str, Tensor]:
    count, cache = cached.length, cached.cache
    tensors = {"token_ids": torch.tensor(cached.token_ids[:count], dtype=torch.int32)}
    tensors |= {f"latents.{layer}": cache.reserve(layer, 0)[:count] for layer in cache.layers}
    if (mtp := cached.mtp) is not None and mtp.seen == count:
        mtp.settle(cached.token_ids)
        if len(mtp.rows):
            tensors |= {"mtp.latents": mtp.rows, "mtp.state": mtp.last_state()}
    return tensors


def _header(tensors: Mapping[str, Tensor], facts: Facts) -> bytes:
    entries: dict[str, object] = {"__metadata__": facts.to_metadata()}
    position = 0
    listed = [(name, DTYPE_NAMES[tensor.dtype], list(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()]
    for name, dtype, shape, nbytes in [*listed, ("checksum", "U8", [32], 32)]:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def _make_room(descriptor: int, size: int) -> None:
    """A full disk shows now, and not after a gigabyte; where the file system cannot tell, when it is reached."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _write_all(descriptor: int, header: bytes, tensors: Mapping[str, Tensor]) -> None:
    """The file's bytes, hashed by other threads while this one writes."""
    with ThreadPoolExecutor(_WORKERS) as pool:
        views = [_bytes(tensor) for tensor in tensors.values()]
        digests = [pool.submit(_digest, view) for view in views]
        for view in [memoryview(header), *views]:
            for start in range(0, len(view), _CHUNK):
                piece = view[start : start + _CHUNK]
                while piece:
                    piece = piece[os.write(descriptor, piece) :]
        checksum = hashlib.sha256(header + b"".join(digest.result() for digest in digests)).digest()
    os.write(descriptor, checksum)


def _open(path: Path) -> tuple[list[TensorInfo], bytes, Facts]:
    """(tensors in the file's order, the header's bytes, what it says)."""
    name = name_of(path)
    facts = read_facts(path)
    try:
        infos, _ = read_header(path)
        with path.open("rb") as file:
            header = file.read(infos[0].offset if infos else 8)
    except CheckpointError as error:  # its words are about downloads
        raise damaged(name) from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    last = infos[-1] if infos else None
    if last is None or (last.name, last.dtype, last.shape) != ("checksum", torch.uint8, (32,)):
        raise damaged(name)
    return infos, header, facts


def _destinations(facts: Facts, infos: list[TensorInfo], cached: CachedTokens, name: str) -> dict[str, Tensor]:
    """Where each tensor of the file goes: rows of the cache, which are reserved and not yet counted as held."""
    count, cache, mtp = facts.tokens, cached.cache, cached.mtp
    into = {f"latents.{layer}": cache.reserve(layer, count) for layer in cache.layers}
    found = {info.name: info for info in infos[:-1]}
    if facts.draft_tokens and mtp is not None:
        shape = found["mtp.state"].shape if "mtp.state" in found else ()
        if len(shape) != 2 or facts.draft_tokens + (waiting := shape[0]) > count:
            raise damaged(name)
        (layer,) = mtp.cache.layers
        into["mtp.latents"] = mtp.cache.reserve(layer, facts.draft_tokens)
        into["mtp.state"] = torch.empty(min(waiting, 1), mtp.width if waiting else 0)
    wanted: dict[str, TensorSpec] = {"token_ids": (torch.int32, (count,))}
    wanted |= {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in into.items()}
    for key, info in found.items():
        if key not in into:
            into[key] = torch.empty(info.shape, dtype=info.dtype)
    fits = all(key in found and (found[key].dtype, found[key].shape) == spec for key, spec in wanted.items())
    if not fits:
        raise damaged(name)
    return into


def _read_all(path: Path, header: bytes, infos: list[TensorInfo], into: Mapping[str, Tensor], name: str) -> None:
    """Raises SessionError where a bit differs from what was written."""
    try:
        with path.open("rb", buffering=0) as file, ThreadPoolExecutor(_WORKERS) as pool:
            digests = list(pool.map(lambda info: _read(file.fileno(), info, into[info.name]), infos[:-1]))
            checksum = os.pread(file.fileno(), 32, infos[-1].offset)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    if hashlib.sha256(header + b"".join(digests)).digest() != checksum:
        raise damaged(name)


def _read(descriptor: int, info: TensorInfo, into: Tensor) -> bytes:
    """Read one tensor; returns its digest, of what was read if the file ends early."""
    held = into if into.device.type == "cpu" and into.is_contiguous() else torch.empty(into.shape, dtype=into.dtype)
    view, total = _bytes(held), hashlib.sha256()
    for start in range(0, len(view), _CHUNK):
        piece = view[start : start + _CHUNK]
        done = 0
        while done < len(piece) and (count := os.preadv(descriptor, [piece[done:]], info.offset + start + done)):
            done += count
        total.update(piece[:done])
    if held is not into:
        into.copy_(held)
    return total.digest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.nbytes else memoryview(b"")


def _digest(view: memoryview) -> bytes:
    return hashlib.sha256(view).digest()
