"""A Hugging Face model directory, opened: headers are read, weights stay in the file until they are used."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor

from localmoe.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from localmoe.formats.fp8 import scale_shape
from localmoe.formats.mapping import bring, lock, map_file, tells_what_is_in_memory
from localmoe.formats.safetensors import TensorInfo, read_header
from localmoe.formats.scheme import QuantizationConfig, Scheme
from localmoe.formats.weights import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, Nf4Weight, Weight, dequantize

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Checkpoint:
    """Config, tensors by name, and each matrix in the form that the files hold it in.

    `read` copies a tensor out of the file (memory is bounded by it); `tensor` and `weight` are views of
    the mapped file: opening costs the headers, and the page cache holds what is used.
    """

    def __init__(self, directory: Path, config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        self.directory = directory
        self.config = config
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        self.quantization, self.fp8_block = _parse_quantization(config)
        self._mapped: dict[Path, Tensor] = {}
        self._closed = False
        self._warming: list[threading.Thread] = []
        self._huge_pages = True

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Open a directory with config.json and safetensors shards.

        Raises ModelNotFoundError when it is not a model's directory, CheckpointError, naming the file and
        the tensor, for damaged or missing files, UnsupportedModelError for a quantization we do not read.
        """
        if not (directory / "config.json").is_file():
            raise ModelNotFoundError(f"{directory}: not a model directory (it has no config.json)")
        return cls(directory, read_json(directory / "config.json"), tensors_of(directory))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mapped files; views that are still held keep theirs alive. Waits for what is warmed just now: a
        thread that lets a file go while Python ends would end the process."""
        self._closed = True
        for thread in self._warming:
            thread.join()
        self._mapped.clear()

    def warm(self, names: Iterable[str] | None = None, *, keep: bool = False) -> threading.Thread:
        """Map every page in the background, reading what is not in memory yet: far cheaper than a fault for each few.

        For a model that fits memory; of another one only the tensors `names`, before any is used, which then stay there
        with `keep`, as far as the user may lock memory. Does nothing where the kernel cannot (before Linux 5.14), or
        where a file cannot be read: whoever uses a tensor hears of that. Ends early when the checkpoint is closed.
        """
        self._huge_pages = names is None
        if names is None:
            files = sorted({info.file for info in self.tensors.values()})
            pieces = [(file, 0, file.nbytes) for file in map(self._file, files)]
        else:
            pieces = [(self._file(path), start, size) for path, start, size in _joined(map(self.info, names))]
        thread = threading.Thread(target=self._bring, args=(pieces, keep), name="localmoe-warm", daemon=True)
        self._warming.append(thread)
        thread.start()
        return thread

    def _bring(self, pieces: list[tuple[Tensor, int, int]], keep: bool) -> None:
        for piece in pieces:  # held here, so that their pages stay mapped
            if not bring(*piece, exactly=not self._huge_pages, stopped=lambda: self._closed):
                return
            keep = keep and lock(*piece)

    def tells_what_is_in_memory(self) -> bool:
        """Whether the system says which pages of the mapped files are in memory."""
        return all(tells_what_is_in_memory(path) for path in {info.file for info in self.tensors.values()})

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies. Raises CheckpointError when there is none of this name."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.directory.name}: tensor {name} is missing from the checkpoint")
        return info

    def modules(self) -> Iterator[str]:
        """Names of the modules that have a weight, stored in any form, in sorted order."""
        endings = (".weight", ".weight_packed", ".weight_nf4")
        yield from sorted(
            name.removesuffix(ending) for name in self.tensors for ending in endings if name.endswith(ending)
        )

    def read(self, name: str) -> Tensor:
        """A copy of the tensor in fresh memory, read from the file without mapping it."""
        info = self.info(name)
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        view = buffer.numpy().data
        with info.file.open("rb", buffering=0) as file:
            done = 0
            while done < info.nbytes:
                count = os.preadv(file.fileno(), [view[done:]], info.offset + done)
                if count == 0:
                    raise CheckpointError(f"{info.file.name}: ends inside {name}; download it again")
                done += count
        return buffer.view(info.dtype).reshape(info.shape)

    def tensor(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file. It must not be written to: the mapping is read-only."""
        info = self.info(name)
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        raw = self._file(info.file)[info.offset : info.offset + info.nbytes]
        if info.offset % info.dtype.itemsize:
            raw = raw.clone()  # safetensors promises no alignment; our own writer gives it
        return raw.view(info.dtype).reshape(info.shape)

    def rows(self, module: str, indices: Tensor) -> Tensor:
        """Rows `indices` int64 [n] of a matrix, as float32 [n, in]; each is read once, and no other is.

        Raises CheckpointError as `weight`, and for FP8, whose rows share their scales.
        """
        distinct, places = torch.unique(indices, return_inverse=True)
        read = partial(self._read_rows, rows=distinct.tolist())
        scheme, name = self.scheme_of(module), f"{module}.weight"
        if scheme is not None:
            return dequantize(self._quantized(module, scheme, read))[places]
        info = self.info(name)
        if len(info.shape) != 2 or info.dtype not in _FLOATS:
            raise self._wrong(name, f"should be a matrix of floats; it is {info.dtype} {list(info.shape)}")
        return read(name).to(torch.float32)[places]

    def _read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """A copy of some rows of a matrix in fresh memory."""
        info = self.info(name)
        size = info.shape[1] * info.dtype.itemsize
        buffer = torch.empty(len(rows) * size, dtype=torch.uint8)
        view = buffer.numpy().data
        with info.file.open("rb", buffering=0) as file:
            for at, row in enumerate(rows):
                if os.preadv(file.fileno(), [view[at * size : (at + 1) * size]], info.offset + row * size) != size:
                    raise CheckpointError(f"{info.file.name}: ends inside {name}; download it again")
        return buffer.view(info.dtype).view(-1, info.shape[1])

    def scheme_of(self, module: str) -> Scheme | None:
        """How `module`'s matrix is quantized, or None. FP8 sources have no scheme: see `fp8_block`."""
        return self.quantization.scheme_for(module) if self.quantization else None

    def weight(self, module: str) -> Weight:
        """`module`'s matrix (name without `.weight`) as it is stored, after a check of every shape.

        Raises CheckpointError naming the tensor that is missing, or that contradicts its companions.
        """
        scheme = self.scheme_of(module)
        if scheme is not None:
            return self._quantized(module, scheme, self.tensor)
        values = self.tensor(f"{module}.weight")
        if values.ndim != 2:
            raise self._wrong(f"{module}.weight", f"is not a matrix: shape {list(values.shape)}")
        if values.dtype == torch.float8_e4m3fn:
            return self._fp8(module, values)
        if values.dtype not in _FLOATS:
            raise self._wrong(f"{module}.weight", f"has dtype {values.dtype}, which no scheme explains")
        return DenseWeight(values)

    def _quantized(self, module: str, scheme: Scheme, read: Callable[[str], Tensor]) -> Weight:
        """All of the matrix, or what `read` gives of its tensors: some rows of each."""
        values_name = f"{module}.weight_nf4" if scheme.kind == "nf4" else f"{module}.weight_packed"
        values = self.info(values_name)
        if len(values.shape) != 2:
            raise self._wrong(values_name, f"is not a matrix: shape {list(values.shape)}")
        out_features = values.shape[0]
        in_features = values.shape[1] * values.dtype.itemsize * 8 // scheme.bits
        if not scheme.divides(in_features):
            raise self._wrong(values_name, f"has rows of {in_features}, not a multiple of {scheme.group_size}")
        for name, (dtype, shape) in scheme.tensors(module, out_features, in_features).items():
            found = self.info(name)
            if (found.dtype, found.shape) != (dtype, shape):
                raise self._wrong(
                    name,
                    f"is {found.dtype} {list(found.shape)}; {scheme.kind} in groups of {scheme.group_size} "
                    f"needs {dtype} {list(shape)}",
                )
        if scheme.kind == "nf4":
            return Nf4Weight(read(values_name), read(f"{module}.weight_absmax"))
        declared = self.read(f"{module}.weight_shape").tolist()
        if declared != [out_features, in_features]:
            raise self._wrong(
                f"{module}.weight_shape", f"says {declared}; the values are {[out_features, in_features]}"
            )
        form = Int4Weight if scheme.kind == "int4" else Int8Weight
        return form(read(values_name), read(f"{module}.weight_scale"), scheme.group_size)

    def _fp8(self, module: str, values: Tensor) -> Weight:
        if self.fp8_block is None:
            raise self._wrong(f"{module}.weight", "is FP8, but config.json has no fp8 quantization_config")
        name = f"{module}.weight_scale_inv"
        if name not in self.tensors:
            raise self._wrong(f"{module}.weight", f"is FP8 but its scale {name} is missing")
        scale = self.tensor(name)
        wanted = scale_shape(values.shape[0], values.shape[1], self.fp8_block)
        if tuple(scale.shape) != wanted or scale.dtype not in _FLOATS:
            raise self._wrong(name, f"is {scale.dtype} {list(scale.shape)}; {list(wanted)} of float32 is needed")
        return Fp8Weight(values, scale, self.fp8_block)

    def _wrong(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.info(name).file.name}: {name} {what}")

    def _file(self, path: Path) -> Tensor:
        """The whole file, mapped once."""
        if path not in self._mapped:
            self._mapped[path] = map_file(path, huge_pages=self._huge_pages)
        return self._mapped[path]


class ReadingCheckpoint(Checkpoint):
    """Copies every tensor out of the file, for one pass over files that memory need not hold: nothing stays mapped,
    and a file that is cut off under way is an error and not a dead process."""

    def tensor(self, name: str) -> Tensor:
        """The tensor in fresh memory."""
        return self.read(name)


def _joined(infos: Iterable[TensorInfo]) -> list[tuple[Path, int, int]]:
    """(file, offset, bytes) of tensors; those that touch are one."""
    joined: list[tuple[Path, int, int]] = []
    for info in sorted(infos, key=lambda info: (info.file, info.offset)):
        path, start, size = joined[-1] if joined else (info.file, -1, 0)
        if path == info.file and start + size == info.offset:
            joined[-1] = path, start, size + info.nbytes
        else:
            joined.append((info.file, info.offset, info.nbytes))
    return joined


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model directory. Raises CheckpointError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def _parse_quantization(config: Mapping[str, Any]) -> tuple[QuantizationConfig | None, tuple[int, int] | None]:
    """(our schemes, None) or (None, FP8's block) or (None, None), as config.json says."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None, None
    if not isinstance(quantization, dict):
        raise CheckpointError("config.json: quantization_config is not an object")
    if quantization.get("quant_method") != "fp8":
        return QuantizationConfig.from_dict(quantization), None
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise UnsupportedModelError(
            "config.json: quantization_config.weight_block_size is missing; only block-scaled FP8 is supported"
        )
    return None, (block[0], block[1])


def tensors_of(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a directory's shards, by name. Raises CheckpointError."""
    index_path = directory / INDEX_NAME
    if not index_path.is_file():
        if not (directory / SINGLE_NAME).is_file():
            raise CheckpointError(f"{directory}: neither {SINGLE_NAME} nor {INDEX_NAME} is there")
        return {info.name: info for info in read_header(directory / SINGLE_NAME)[0]}
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: weight_map is missing or empty")
    shards: dict[str, dict[str, TensorInfo]] = {}
    tensors: dict[str, TensorInfo] = {}
    for name, file_name in weight_map.items():
        if not _is_shard_name(file_name):
            raise CheckpointError(
                f"{INDEX_NAME}: weight_map has {str(file_name)[:80]!r} for {name[:80]!r}, "
                "which is not the name of a safetensors file"
            )
        if file_name not in shards:
            shards[file_name] = _indexed_shard(directory, file_name)
        if name not in shards[file_name]:
            raise CheckpointError(f"{INDEX_NAME}: {name} should be in {file_name}, which does not hold it")
        tensors[name] = shards[file_name][name]
    return tensors


def _is_shard_name(value: object) -> TypeGuard[str]:
    """Whether it is a plain file name, which leads nowhere out of the directory."""
    return isinstance(value, str) and Path(value).name == value and value.endswith(".safetensors")


def _indexed_shard(directory: Path, file_name: str) -> dict[str, TensorInfo]:
    """Tensors of a shard that the index names."""
    if not (directory / file_name).is_file():
        raise CheckpointError(f"{INDEX_NAME}: names {file_name}, which is missing; pull the model again")
    return {info.name: info for info in read_header(directory / file_name)[0]}
