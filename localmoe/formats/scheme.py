"""Which matrix is stored how, as `quantization_config` in config.json says it.

Two methods are written and read. `compressed-tensors` in its `pack-quantized` format (symmetric, grouped
int4 and int8: https://github.com/vllm-project/compressed-tensors) is what other engines load unchanged.
`localmoe-nf4` keeps the same structure with NF4 experts, which no other engine loads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from localmoe.errors import UnsupportedModelError

Kind = Literal["int4", "int8", "nf4"]
Method = Literal["compressed-tensors", "localmoe-nf4"]

GROUP_SIZES = (32, 64, 128)
NF4_BLOCK = 64

_BITS: dict[Kind, int] = {"int4": 4, "int8": 8, "nf4": 4}
_LONGEST_PATTERN = 512  # a pattern is run over every module name: a config from the hub gets no room for tricks

TensorSpec = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Scheme:
    """How one quantized matrix is stored: the kind of number, and how many of a row share a scale."""

    kind: Kind
    group_size: int

    @property
    def bits(self) -> int:
        """Bits of one stored value, scales not included."""
        return _BITS[self.kind]

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight costs, scales included (`weight_shape`'s 16 bytes a matrix are not counted)."""
        scale_bits = 32 if self.kind == "nf4" else 16
        return self.bits + scale_bits / self.group_size

    def divides(self, in_features: int) -> bool:
        """Whether rows of this length can be stored: groups do not cross rows."""
        return in_features % self.group_size == 0

    def tensors(self, module: str, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, dtypes and shapes of the tensors that store `module`'s [out, in] matrix."""
        groups = in_features // self.group_size
        if self.kind == "nf4":
            return {
                f"{module}.weight_nf4": (torch.uint8, (out_features, in_features // 2)),
                f"{module}.weight_absmax": (torch.float32, (out_features, groups)),
            }
        words = in_features * self.bits // 32
        return {
            f"{module}.weight_packed": (torch.int32, (out_features, words)),
            f"{module}.weight_scale": (torch.bfloat16, (out_features, groups)),
            f"{module}.weight_shape": (torch.int64, (2,)),
        }


@dataclass(frozen=True)
class SchemeGroup:
    """One scheme and the modules it is for: a class (`"Linear"`, `"Embedding"`), a name, or `"re:PATTERN"`."""

    scheme: Scheme
    targets: tuple[str, ...]


def _matches(module: str, targets: Iterable[str]) -> bool:
    """Whether a name or an `re:` pattern of `targets` is for `module` (patterns match from the start)."""
    return any(
        re.match(target[3:], module) is not None if target.startswith("re:") else target == module for target in targets
    )


@dataclass(frozen=True)
class QuantizationConfig:
    """The `quantization_config` of config.json: schemes by module, and what is left as it was."""

    groups: tuple[SchemeGroup, ...]
    ignore: tuple[str, ...]
    method: Method = "compressed-tensors"

    def scheme_for(self, module: str) -> Scheme | None:
        """The scheme of a linear module or an embedding, or None where it is not quantized.

        Ignored names come first, then groups that name the module, then the group for every module of its class:
        the precedence that compressed-tensors and transformers use.
        """
        if _matches(module, self.ignore):
            return None
        for group in self.groups:
            if _matches(module, group.targets):
                return group.scheme
        of_class = "Embedding" if module.endswith("embed_tokens") else "Linear"
        for group in self.groups:
            if of_class in group.targets:
                return group.scheme
        return None

    def to_dict(self) -> dict[str, Any]:
        """The value to write under `quantization_config`."""
        return {
            "quant_method": self.method,
            "format": "pack-quantized" if self.method == "compressed-tensors" else "nf4",
            "quantization_status": "compressed",
            "config_groups": {f"group_{index}": _group_to_dict(group) for index, group in enumerate(self.groups)},
            "ignore": list(self.ignore),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> QuantizationConfig:
        """Parse; whatever would change the numbers and is not implemented is refused by name.

        Raises UnsupportedModelError.
        """
        method = config.get("quant_method")
        wanted_format = {"compressed-tensors": "pack-quantized", "localmoe-nf4": "nf4"}.get(str(method))
        if wanted_format is None:
            raise UnsupportedModelError(
                f"config.json: quantization_config.quant_method {method!r} is not supported "
                "(compressed-tensors, localmoe-nf4 and fp8 are)"
            )
        if config.get("format") != wanted_format:
            raise _unsupported("format", config.get("format"))
        for field in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            if config.get(field):
                raise _unsupported(field, config[field])
        groups = config.get("config_groups")
        ignore = config.get("ignore") or []
        if not isinstance(groups, Mapping) or not groups:
            raise _unsupported("config_groups", groups)
        if not isinstance(ignore, list):
            raise _unsupported("ignore", ignore)
        return cls(
            groups=tuple(_group_from_dict(name, groups[name]) for name in sorted(groups)),
            ignore=tuple(_pattern("ignore", item) for item in ignore),
            method="compressed-tensors" if method == "compressed-tensors" else "localmoe-nf4",
        )


def _unsupported(field: str, value: object) -> UnsupportedModelError:
    shown = repr(value)
    return UnsupportedModelError(
        f"config.json: quantization_config.{field} is {shown[:80]}, which localmoe does not implement"
    )


def _pattern(field: str, text: object) -> str:
    """A target or ignore entry that is safe to use: a string, short, and valid where it is a pattern."""
    if not isinstance(text, str) or len(text) > _LONGEST_PATTERN:
        raise _unsupported(field, text)
    if text.startswith("re:"):
        try:
            re.compile(text[3:])
        except re.error as error:
            raise _unsupported(field, text) from error
    return text


def _group_to_dict(group: SchemeGroup) -> dict[str, Any]:
    scheme = group.scheme
    return {
        "targets": list(group.targets),
        "weights": {
            "num_bits": scheme.bits,
            "type": "nf4" if scheme.kind == "nf4" else "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": scheme.group_size,
            "dynamic": False,
            "actorder": None,
        },
        "input_activations": None,
        "output_activations": None,
    }


def _group_from_dict(name: str, group: object) -> SchemeGroup:
    where = f"config_groups.{name}"
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise _unsupported(where, group)
    weights = group["weights"]
    for field in ("input_activations", "output_activations"):
        if group.get(field):
            raise _unsupported(f"{where}.{field}", group[field])
    if group.get("format") not in (None, "pack-quantized", "nf4"):
        raise _unsupported(f"{where}.format", group["format"])
    # actorder `static` (also called `weight`) orders columns while rounding only: groups stay neighbours
    fixed = {
        "symmetric": (True,),
        "strategy": ("group",),
        "dynamic": (False, None),
        "actorder": (None, False, "static", "weight"),
    }
    for field, allowed in fixed.items():
        if weights.get(field) not in allowed:
            raise _unsupported(f"{where}.weights.{field}", weights.get(field))
    kinds: Mapping[Kind, tuple[object, object]] = {"int4": ("int", 4), "int8": ("int", 8), "nf4": ("nf4", 4)}
    found = (weights.get("type"), weights.get("num_bits"))
    kind = next((kind for kind, wanted in kinds.items() if wanted == found), None)
    if kind is None:
        raise _unsupported(f"{where}.weights", f"{weights.get('num_bits')} bits of {weights.get('type')}")
    size = weights.get("group_size")
    if size not in ((NF4_BLOCK,) if kind == "nf4" else GROUP_SIZES):
        raise _unsupported(f"{where}.weights.group_size", size)
    targets = group.get("targets")
    if not isinstance(targets, list) or not targets:
        raise _unsupported(f"{where}.targets", targets)
    return SchemeGroup(Scheme(kind, int(size)), tuple(_pattern(f"{where}.targets", item) for item in targets))
