"""Checkpoints that others packed into integers, read as they are: GPTQ (v1, v2), AWQ, and compressed-tensors with zero
points or scales that are not bf16. All of them mean

    w = (u - z) * s        u, z unsigned integers, z and s one a group

and differ in how u, z and s lie. Where u - z fits the signed integers of our layout, and s is a bf16 number, the same
weights can be stored there exactly (a group whose u - z reaches from -7 to 8 takes the scale's sign to the other side);
where not, that is an error which names the matrix. O = out_features, I = in_features, G = groups of a row.

Sources: AutoGPTQ's and GPTQModel's qlinear `pack` (v1 stores z - 1, v2 z), AutoAWQ's WQLinear_GEMM.from_linear,
compressed-tensors' pack_to_int32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from localmoe.errors import CheckpointError, UnsupportedModelError, UsageError
from localmoe.formats import int4, int8
from localmoe.formats.checkpoint import ReadingCheckpoint, read_json, tensors_of
from localmoe.formats.safetensors import TensorInfo
from localmoe.formats.scheme import GROUP_SIZES, QuantizationConfig, Scheme, SchemeGroup
from localmoe.formats.weights import DenseWeight, Weight
from quantize.recipes import PART_PATTERNS

Packing = Literal["gptq", "awq", "compressed-tensors"]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring columns the nibbles of a word hold, from the lowest."""

_SUFFIXES: Mapping[Packing, tuple[str, ...]] = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_zero_point", "weight_scale", "weight_shape", "weight_g_idx"),
}
"""The tensors of a packed module; the first holds the values, and says that the module is one."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Form:
    """What config.json says: `group` is -1 for one scale a row, `zero_offset` what is added to stored zero points."""

    packing: Packing
    bits: int
    group: int
    zero_offset: int = 0

    def __str__(self) -> str:
        version = " v1" if self.zero_offset else " v2" if self.packing == "gptq" else ""
        return f"{self.packing}{version}, {self.bits} bits, groups of {self.group if self.group > 0 else 'a row'}"


@dataclass(frozen=True)
class Packed:
    """One matrix: `values` int16 [O, I], u - z, and `scales` float32 [O, G]."""

    values: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """float32 [O, I]."""
        groups = self.values.float().view(*self.scales.shape, -1)  # [O, G, g]
        return (groups * self.scales.unsqueeze(-1)).flatten(1)


def form_of(config: Mapping[str, Any]) -> Form | None:
    """How others packed a checkpoint with this config.json; None where it is not packed, or in our own layout.

    Raises UnsupportedModelError naming the field that stands in the way.
    """
    found = config.get("quantization_config")
    if not isinstance(found, Mapping):
        return None
    method = found.get("quant_method")
    if method == "gptq":
        return _gptq(found)
    if method == "awq":
        return _awq(found)
    return _compressed_tensors(found) if method == "compressed-tensors" else None


def _gptq(found: Mapping[str, Any]) -> Form:
    spelling = found.get("checkpoint_format", "gptq")
    if spelling not in ("gptq", "gptq_v2"):
        raise _unsupported("checkpoint_format", spelling, "gptq and gptq_v2 are read")
    if found.get("desc_act"):
        raise _unsupported("desc_act", True, "its groups are not neighbouring columns, which our layout wants")
    if found.get("dynamic"):
        raise _unsupported("dynamic", found["dynamic"], "one form for all matrices is read")
    return Form("gptq", _bits(found, (4, 8)), _group(found), 1 if spelling == "gptq" else 0)


def _awq(found: Mapping[str, Any]) -> Form:
    version = str(found.get("version", "gemm")).lower()
    if version != "gemm":
        raise _unsupported("version", version, "gemm is read")
    return Form("awq", _bits(found, (4,)), _group(found))


def _compressed_tensors(found: Mapping[str, Any]) -> Form | None:
    """A form for what `QuantizationConfig` does not read because of its zero points or its rows' scales."""
    groups = found.get("config_groups")
    if found.get("format") != "pack-quantized" or not isinstance(groups, Mapping) or len(groups) != 1:
        return None
    weights = next(iter(groups.values())).get("weights") if isinstance(next(iter(groups.values())), Mapping) else None
    if not isinstance(weights, Mapping) or weights.get("type") != "int":
        return None
    if weights.get("actorder") in ("group", "dynamic", True):
        raise _unsupported("actorder", weights["actorder"], "its groups are not neighbouring columns")
    group = -1 if weights.get("strategy") == "channel" else weights.get("group_size")
    return Form("compressed-tensors", _bits({"bits": weights.get("num_bits")}, (4, 8)), _group({"group_size": group}))


def _bits(found: Mapping[str, Any], known: tuple[int, ...]) -> int:
    bits = found.get("bits", found.get("w_bit"))
    if bits not in known:
        raise _unsupported("bits", bits, f"{' and '.join(map(str, known))} are read")
    return int(bits)


def _group(found: Mapping[str, Any]) -> int:
    group = found.get("group_size", found.get("q_group_size"))
    if type(group) is not int or not (group == -1 or 32 <= group <= 1 << 16):
        raise _unsupported("group_size", group, "-1 and 32 or more are read")
    return group


def _unsupported(field: str, value: object, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"config.json: quantization_config.{field} is {str(value)[:60]!r}: {why}")


class ForeignCheckpoint(ReadingCheckpoint):
    """A directory that others packed: `packed` reads one matrix, `weight` gives its numbers."""

    def __init__(self, directory: Path, config: dict[str, Any], tensors: Mapping[str, TensorInfo], form: Form) -> None:
        super().__init__(directory, {k: v for k, v in config.items() if k != "quantization_config"}, tensors)
        self.form = form
        self._first, *_ = _SUFFIXES[form.packing]

    @classmethod
    def open_foreign(cls, directory: Path, config: dict[str, Any], form: Form) -> ForeignCheckpoint:
        """Read the headers. Raises CheckpointError, UsageError for a checkpoint in our own layout."""
        checkpoint = cls(directory, config, tensors_of(directory), form)
        if form.packing == "compressed-tensors" and checkpoint._is_ours(config):
            raise UsageError(
                f"{directory}: is quantized already, in localmoe's own layout (compressed-tensors, {form.bits} bits): "
                "run it as it is"
            )
        if not any(True for _ in checkpoint.packed_modules()):
            raise CheckpointError(f"{directory}: config.json says {form}, but no tensor is named *.{checkpoint._first}")
        return checkpoint

    def _is_ours(self, config: Mapping[str, Any]) -> bool:
        try:
            QuantizationConfig.from_dict(config["quantization_config"])
        except UnsupportedModelError:
            return False
        scales = (info for name, info in self.tensors.items() if name.endswith(".weight_scale"))
        return all(info.dtype == torch.bfloat16 for info in scales)

    def packed_modules(self) -> Iterator[str]:
        """Names of the packed matrices."""
        ending = f".{self._first}"
        yield from (name.removesuffix(ending) for name in self.tensors if name.endswith(ending))

    def companions(self, module: str) -> Iterator[str]:
        """Names of all the tensors that a packed matrix has."""
        names = (f"{module}.{suffix}" for suffix in _SUFFIXES[self.form.packing])
        yield from (name for name in names if name in self.tensors)

    def main(self, module: str) -> TensorInfo:
        """The tensor with the matrix's values."""
        return self.info(f"{module}.{self._first}")

    def shape(self, module: str) -> tuple[int, int]:
        """(O, I) of a packed matrix. Raises CheckpointError."""
        info = self.main(module)
        self._check_words(info)
        rows, columns, lanes = *info.shape, 32 // self.form.bits
        if self.form.packing == "gptq":
            return columns, rows * lanes
        return (columns * lanes, rows) if self.form.packing == "awq" else (rows, columns * lanes)

    def packed(self, module: str) -> Packed:
        """One matrix. Raises CheckpointError for tensors that contradict each other, and for act-order."""
        out_features, in_features = self.shape(module)
        group = self.form.group if self.form.group > 0 else in_features
        if in_features % group:
            raise self._wrong(self.main(module).name, f"has rows of {in_features}, not a multiple of {group}")
        groups, bits = in_features // group, self.form.bits
        read = {"gptq": self._read_gptq, "awq": self._read_awq, "compressed-tensors": self._read_ct}
        values, zeros, scales = read[self.form.packing](module, out_features, groups)
        for what, found in (("values", values), ("zero points", zeros), ("scales", scales)):
            wanted = (out_features, in_features if what == "values" else groups)
            if tuple(found.shape) != wanted:
                raise self._wrong(self.main(module).name, f"has {what} of {list(found.shape)}, not {list(wanted)}")
        if not scales.isfinite().all():
            raise self._wrong(self.main(module).name, "has scales that are NaN or infinite; pull the model again")
        if not ((zeros >= 0) & (zeros < 1 << bits)).all():
            raise self._wrong(self.main(module).name, f"has zero points that are no numbers of {bits} bits")
        difference = values.view(out_features, groups, group) - zeros.unsqueeze(-1)
        return Packed(difference.flatten(1), scales)

    def weight(self, module: str) -> Weight:
        """A packed matrix in float32, any other as it is."""
        if f"{module}.{self._first}" in self.tensors:
            return DenseWeight(self.packed(module).dequantize())
        return super().weight(module)

    def _read_gptq(self, module: str, out_features: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        values = _unpack(self._words(f"{module}.qweight").t(), self.form.bits)  # [O, I]
        zeros = _unpack(self._words(f"{module}.qzeros"), self.form.bits)  # [G, O]
        order = f"{module}.g_idx"
        if order in self.tensors:
            expected = torch.arange(values.shape[1]) // (values.shape[1] // groups)
            if not torch.equal(self.read(order).long(), expected):
                raise self._wrong(order, "is act-order (columns by activation), which our layout cannot hold")
        # Both store z modulo 2^bits
        zeros = (zeros + self.form.zero_offset) % (1 << self.form.bits) if self.form.zero_offset else zeros
        return values, zeros.t(), self._scales(f"{module}.scales").t()

    def _read_awq(self, module: str, out_features: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        unordered = torch.tensor(AWQ_ORDER).argsort()
        found = []
        for name in ("qweight", "qzeros"):
            lanes = _unpack(self._words(f"{module}.{name}"), 4)  # [I or G, O], eight by eight in AWQ's order
            found.append(lanes.view(len(lanes), -1, 8)[:, :, unordered].flatten(1).t())
        return found[0], found[1], self._scales(f"{module}.scales").t()

    def _read_ct(self, module: str, out_features: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        values = _unpack(self._words(f"{module}.weight_packed"), self.form.bits)
        name = f"{module}.weight_zero_point"
        middle = 1 << (self.form.bits - 1)
        zeros = torch.full((out_features, groups), middle, dtype=torch.int16)
        if name in self.tensors:
            info = self.info(name)
            if info.dtype == torch.int32:  # packed along the rows
                zeros = _unpack(self._words(name).t(), self.form.bits).t()[:out_features]
            elif prod(info.shape) == out_features * groups:
                zeros = self.read(name).to(torch.int16).view(out_features, groups) + middle
            else:
                raise self._wrong(name, f"has zero points of {list(info.shape)}, not {[out_features, groups]}")
        if f"{module}.weight_g_idx" in self.tensors:
            raise self._wrong(f"{module}.weight_g_idx", "is act-order, which our layout cannot hold")
        return values, zeros, self._scales(f"{module}.weight_scale")

    def _words(self, name: str) -> Tensor:
        """int32 [n, m]: several numbers a word."""
        self._check_words(self.info(name))
        return self.read(name)

    def _check_words(self, info: TensorInfo) -> None:
        if info.dtype != torch.int32 or len(info.shape) != 2 or 0 in info.shape:
            raise self._wrong(info.name, f"should be a matrix of int32; it is {info.dtype} {list(info.shape)}")

    def _scales(self, name: str) -> Tensor:
        found = self.read(name)
        if found.dtype not in _FLOATS or found.ndim != 2:
            raise self._wrong(name, f"should be a matrix of floats; it is {found.dtype} {list(found.shape)}")
        return found.float()


def _unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [n, m] -> int16 [n, m * 32 / bits], from the lowest bits of each word on."""
    raw = words.contiguous().view(torch.uint8).to(torch.int16)  # [n, 4 m], little-endian
    return raw if bits == 8 else torch.stack((raw & 15, raw >> 4), dim=-1).flatten(1)


def stored(packed: Packed, scheme: Scheme, where: str, *, round_scales: bool) -> tuple[Tensor, Tensor]:
    """(int8 q [O, I], bf16 scale [O, I/g]) of the same numbers in our layout.

    Raises CheckpointError, beginning with `where`, for groups that our integers do not hold, and for scales that are
    no bf16 numbers unless `round_scales`.
    """
    form = int4 if scheme.kind == "int4" else int8
    rows, in_features = packed.values.shape
    groups = packed.values.view(rows, -1, scheme.group_size)  # [O, I/g, g]: ours may be finer than theirs
    lowest, highest = groups.amin(dim=-1), groups.amax(dim=-1)
    upright = (lowest >= form.LOWEST) & (highest <= form.HIGHEST)
    mirrored = ~upright & (-highest >= form.LOWEST) & (-lowest <= form.HIGHEST)
    outside = ~(upright | mirrored)
    if outside.any():
        raise CheckpointError(
            f"{where} is asymmetric: {int(outside.sum()):,} of its {outside.numel():,} groups reach beyond "
            f"[{form.LOWEST}, {form.HIGHEST}] and cannot be stored without loss; quantize what it was made from"
        )
    q = torch.where(mirrored.unsqueeze(-1), -groups, groups).view(rows, in_features).to(torch.int8)
    scales = packed.scales.repeat_interleave(upright.shape[1] // packed.scales.shape[1], dim=1)
    scales = torch.where(mirrored, -scales, scales)
    rounded = scales.bfloat16()
    if not rounded.isfinite().all():
        raise CheckpointError(f"{where} has scales too large for bfloat16")
    inexact = int((rounded.float() != scales).sum())
    if inexact and not round_scales:
        raise CheckpointError(
            f"{where} has {inexact:,} scales of {scales.numel():,} that are no bfloat16 numbers; "
            "--round-scales rounds them, by 0.2 % at most"
        )
    return q, rounded


def common_scheme(checkpoint: ForeignCheckpoint) -> Scheme:
    """One scheme for all packed matrices: the source's groups, or the widest of ours that divides them and every row.

    Raises UnsupportedModelError where there is none.
    """
    form = checkpoint.form
    found = _scheme(form, {checkpoint.shape(module)[1] for module in checkpoint.packed_modules()})
    if found is None:
        groups = ", ".join(map(str, GROUP_SIZES))
        raise _unsupported("group_size", form.group, f"no group of {groups} divides it and every row")
    return found


def converted(form: Form, config: Mapping[str, Any]) -> QuantizationConfig:
    """What a conversion makes of matrices in `form`, from config.json alone, which does not name them: all but those
    that hardly anybody packs."""
    names = ("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank")
    widths = {config[name] for name in names if type(config.get(name)) is int}
    scheme = _scheme(form, widths) or Scheme(_kind(form), min(GROUP_SIZES))
    left = ("lm_head", *PART_PATTERNS["router"], *PART_PATTERNS["mtp_input"])
    return QuantizationConfig((SchemeGroup(scheme, ("Linear",)),), ignore=left)


def _scheme(form: Form, rows: Iterable[int]) -> Scheme | None:
    """The widest of our groups that divides the form's and rows of these widths."""
    divided = [*rows, form.group] if form.group > 0 else [*rows]
    fitting = [size for size in GROUP_SIZES if all(width % size == 0 for width in divided)]
    return Scheme(_kind(form), max(fitting)) if fitting else None


def _kind(form: Form) -> Literal["int4", "int8"]:
    return "int4" if form.bits == 4 else "int8"


def open_packed(directory: Path) -> ForeignCheckpoint | None:
    """The checkpoint in `directory` if others packed it, None if not. Raises as `form_of` and `open_foreign` do."""
    if not (directory / "config.json").is_file():
        return None
    config = read_json(directory / "config.json")
    form = form_of(config)
    return ForeignCheckpoint.open_foreign(directory, config, form) if form is not None else None
