"""What becomes of every tensor of a source, decided from the headers before the first byte is written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch

from localmoe.errors import CheckpointError, UnsupportedModelError
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.safetensors import TensorInfo
from localmoe.formats.scheme import QuantizationConfig, Scheme, SchemeGroup
from localmoe.formats.shards import Unit
from quantize.foreign import ForeignCheckpoint, common_scheme
from quantize.recipes import SERVED_COLUMNS, Recipe, part_of
from quantize.sources import FLOATS, FP8, SCALE, SourceReader

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite")
"""The architectures whose module names the recipes know (localmoe.model reads the same ones)."""

_TIED = ("head", "embedding")
"""The parts that are one matrix where they are tied, which stays as it is."""

Action = Literal["quantize", "widen", "copy", "convert"]
"""`widen`: FP8 that stays unquantized becomes bf16; `convert`: what others packed is stored in our layout."""


@dataclass(frozen=True)
class Job:
    """One source tensor and the output tensors it becomes."""

    action: Action
    source: TensorInfo
    unit: Unit
    scheme: Scheme | None = None
    shape: tuple[int, int] | None = None
    """[out, in] of a packed source, whose tensor has another."""

    @property
    def parameters(self) -> int:
        return prod(self.shape or self.source.shape)


@dataclass(frozen=True)
class Plan:
    """All jobs, in the order of the output; the config to write; sentences for the user."""

    jobs: tuple[Job, ...]
    config: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def units(self) -> list[Unit]:
        return [job.unit for job in self.jobs]

    @property
    def reading_order(self) -> list[Job]:
        """The jobs file by file of the source, in a file as they are written: so what is written has no holes for long
        and can be hashed as it comes."""
        return sorted(self.jobs, key=lambda job: job.source.file.name)


def plan(reader: SourceReader, recipe: Recipe, group_size: int) -> Plan:
    """Decide for every tensor of an unquantized checkpoint.

    Reads the MTP layer's copies of embedding and head, to drop those that equal the main model's.
    Raises UnsupportedModelError for a `model_type` that the recipes do not know, CheckpointError for a
    tensor that cannot be what its name says.
    """
    checkpoint = reader.checkpoint
    _check_model_type(checkpoint)
    recipe = recipe.for_model(checkpoint.config)
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    dropped = _equal_copies(reader)
    jobs, kept_back = [], []
    for info in sorted(checkpoint.tensors.values(), key=lambda info: _output_order(info.name)):
        if info.name in dropped or info.name.endswith(SCALE):
            continue
        job = _job(info, recipe, group_size, tied)
        jobs.append(job)
        if job.scheme is None and _module(info) is not None:
            kept_back.append(info)
    quantized = [module for job in jobs if job.scheme is not None and (module := _module(job.source))]
    config = recipe.quantization_config(group_size)
    stray = [module for info in kept_back if (module := _module(info)) and config.scheme_for(module)]
    config = recipe.quantization_config(group_size, _ignore_patterns(stray, quantized))
    _check_agreement(jobs, config)
    notes = [f"{name} equals {twin} and is left out" for name, twin in dropped.items()]
    notes += _undivided(kept_back, recipe, group_size, tied)
    fp8 = any(info.dtype == FP8 for info in checkpoint.tensors.values())
    return Plan(tuple(jobs), _output_config(checkpoint.config, config, fp8), tuple(sorted(notes)))


def plan_conversion(checkpoint: ForeignCheckpoint) -> Plan:
    """Decide for every tensor of a checkpoint that others packed: packed matrices are converted, the rest is copied.

    Raises UnsupportedModelError, CheckpointError.
    """
    _check_model_type(checkpoint)
    scheme = common_scheme(checkpoint)
    packed = set(checkpoint.packed_modules())
    companions = {name for module in packed for name in checkpoint.companions(module)}
    jobs = [
        Job("convert", checkpoint.main(module), Unit(module, scheme.tensors(module, *shape)), scheme, shape)
        for module in packed
        for shape in [checkpoint.shape(module)]
    ]
    kept = [info for info in checkpoint.tensors.values() if info.name not in companions]
    jobs += [Job("copy", info, Unit(info.name, {info.name: (info.dtype, info.shape)})) for info in kept]
    jobs.sort(key=lambda job: _output_order(job.unit.name))
    plain = [module for info in kept if (module := _module(info))]
    config = QuantizationConfig((SchemeGroup(scheme, ("Linear",)),), _ignore_patterns(plain, sorted(packed)))
    for job in jobs:
        module = job.unit.name if job.scheme else _module(job.source)
        if module is not None and config.scheme_for(module) != job.scheme:
            raise CheckpointError(f"{job.source.file.name}: {job.source.name} is a name that localmoe has no rule for")
    notes = (f"converted from {checkpoint.form}; nothing was quantized again",)
    return Plan(tuple(jobs), _output_config(checkpoint.config, config, fp8=False), notes)


def _check_model_type(checkpoint: Checkpoint) -> None:
    model_type = checkpoint.config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"{checkpoint.directory / 'config.json'}: model_type {str(model_type)[:40]!r} is not supported; "
            f"localmoe quantizes {', '.join(MODEL_TYPES)}"
        )


def _job(info: TensorInfo, recipe: Recipe, group_size: int, tied: bool) -> Job:
    module = info.name.removesuffix(".weight")
    scheme = recipe.scheme_of(module, group_size) if info.name.endswith(".weight") else None
    if tied and part_of(module) in _TIED:
        scheme = None
    if scheme is not None:
        if len(info.shape) != 2 or info.dtype not in (*FLOATS, FP8) or 0 in info.shape:
            raise CheckpointError(
                f"{info.file.name}: {info.name} should be a matrix of floats; it is {info.dtype} {list(info.shape)}"
            )
        if scheme.divides(info.shape[1]):
            return Job("quantize", info, Unit(module, scheme.tensors(module, *info.shape)), scheme)
    if info.dtype == FP8:
        return Job("widen", info, Unit(info.name, {info.name: (torch.bfloat16, info.shape)}))
    return Job("copy", info, Unit(info.name, {info.name: (info.dtype, info.shape)}))


def _equal_copies(reader: SourceReader) -> dict[str, str]:
    """MTP tensors that equal the main model's, with the name of what they equal."""
    return {name: twin for name, twin in possible_copies(reader.checkpoint.tensors).items() if reader.equal(name, twin)}


def possible_copies(names: Collection[str]) -> dict[str, str]:
    """The MTP layers' embeddings and heads among a checkpoint's tensors, and which tensor each may be a copy of."""
    head = "lm_head.weight" if "lm_head.weight" in names else "model.embed_tokens.weight"
    twins = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": head}
    found = {}
    for name in sorted(names, key=_natural):
        match = re.fullmatch(r"model\.layers\.\d+\.(embed_tokens\.weight|shared_head\.head\.weight)", name)
        if match and (twin := twins[match[1]]) in names:
            found[name] = twin
    return found


def _module(info: TensorInfo) -> str | None:
    """The name of the module whose matrix this is."""
    return info.name.removesuffix(".weight") if len(info.shape) == 2 and info.name.endswith(".weight") else None


def _ignore_patterns(modules: Iterable[str], quantized: Iterable[str]) -> tuple[str, ...]:
    """`ignore` entries for just these modules: a regex over all layers where it hits nothing else, else the name."""
    names = "\n".join(quantized)
    entries: dict[str, None] = {}
    for module in modules:
        pattern = re.sub(r"\d+", r"\\d+", re.escape(module)) + "$"
        plain = r"\d+" not in pattern or re.search(f"^{pattern}", names, re.MULTILINE) is not None
        entries[module if plain else f"re:{pattern}"] = None
    return tuple(entries)


def _check_agreement(jobs: Iterable[Job], config: QuantizationConfig) -> None:
    """Readers find a module's scheme through the patterns alone: they must give what was planned."""
    for job in jobs:
        module = _module(job.source)
        if module is not None and config.scheme_for(module) != job.scheme:
            raise CheckpointError(f"{job.source.file.name}: {job.source.name} is a name that localmoe has no rule for")


def _undivided(infos: Iterable[TensorInfo], recipe: Recipe, group_size: int, tied: bool) -> list[str]:
    """Notes on matrices that the recipe quantizes, but whose rows the group or other engines' tiles do not divide."""
    counts: Counter[tuple[str, int, str]] = Counter()
    for info in infos:
        module = info.name.removesuffix(".weight")
        part = part_of(module)
        scheme = recipe.scheme(part, group_size) if part else None
        if scheme is not None and not (tied and part in _TIED):
            held = scheme.divides(info.shape[1])
            why = f"{SERVED_COLUMNS}, which SGLang needs" if held else str(scheme.group_size)
            counts[re.sub(r"\d+", "*", module), info.shape[1], why] += 1
    return [
        f"{modules} ({count} of them) stays unquantized: its rows of {length} are not a multiple of {why}"
        for (modules, length, why), count in counts.items()
    ]


def _output_config(source: dict[str, Any], quantization: QuantizationConfig, fp8: bool) -> dict[str, Any]:
    """The source's config.json with our `quantization_config`; without its remote code, which stays behind."""
    config = {key: value for key, value in source.items() if key not in ("quantization_config", "auto_map")}
    if fp8:
        spelled = [key for key in ("dtype", "torch_dtype") if key in config]
        config |= dict.fromkeys(spelled or ["torch_dtype"], "bfloat16")
    return config | {"quantization_config": quantization.to_dict()}


def _output_order(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """The head last, as sources have it: it is written last, then."""
    return name.startswith("lm_head."), _natural(name)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
