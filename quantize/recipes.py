"""The recipes: what gets how many bits. A module's part is read off its name, which all these models share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from localmoe.errors import UsageError
from localmoe.formats.scheme import NF4_BLOCK, Kind, QuantizationConfig, Scheme, SchemeGroup

Part = Literal[
    "routed_experts", "shared_expert", "dense_mlp", "attention", "kv_b", "head", "router", "embedding", "mtp_input"
]

PART_PATTERNS: Mapping[Part, tuple[str, ...]] = {
    "routed_experts": (r"re:.*\.mlp\.experts\.\d+\.(gate|up|down)_proj$",),
    # Not spelled out: a group's regex target with the word `experts` in it is taken by transformers for
    # the routed experts' group.
    "shared_expert": (r"re:.*\.mlp\.shared_[a-z]+\.(gate|up|down)_proj$",),
    "dense_mlp": (r"re:.*\.mlp\.(gate|up|down)_proj$",),
    "attention": (r"re:.*\.self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|o_proj)$",),
    "kv_b": (r"re:.*\.self_attn\.kv_b_proj$",),
    "head": (r"re:lm_head$", r"re:.*\.shared_head\.head$"),
    "router": (r"re:.*\.mlp\.gate$",),
    "embedding": (r"re:.*embed_tokens$",),
    "mtp_input": (r"re:.*\.eh_proj$",),
}
"""By part, the `quantization_config` patterns of its modules. All are regexes: transformers would take the
experts' scheme from the first group that has a plain name among its targets. Every recipe leaves the router and the MTP
layer's input projection alone."""

SERVED_COLUMNS = 128
"""Columns of a packed linear that SGLang (and vLLM before 0.25) wants a multiple of; see localmoe/serving.py."""
_DENSE_DOWN = r"re:.*\.mlp\.down_proj$"


@dataclass(frozen=True)
class Recipe:
    """Kinds of number by part; parts that are not named keep the source's precision, and so do modules that one of
    `kept` names. `served`: vLLM and SGLang are to load what it makes of a dense layer."""

    name: str
    kinds: Mapping[Part, Kind]
    served: bool = False
    kept: tuple[str, ...] = ()

    def for_model(self, config: Mapping[str, Any]) -> Recipe:
        """The recipe for a model with this config.json: a `served` one leaves the dense layers' down projection alone
        where other engines would not load it packed (V2-Lite's 10,944 columns)."""
        width = config.get("intermediate_size")
        if self.served and type(width) is int and width % SERVED_COLUMNS:
            return replace(self, kept=(_DENSE_DOWN,))
        return self

    @property
    def calibrates(self) -> bool:
        """Whether it has int4 matrices: others are not calibrated."""
        return "int4" in self.kinds.values()

    def scheme_of(self, module: str, group_size: int) -> Scheme | None:
        """How a module's matrix is stored, if the group divides its rows."""
        part = part_of(module)
        if part is None or any(re.match(pattern.removeprefix("re:"), module) for pattern in self.kept):
            return None
        return self.scheme(part, group_size)

    def scheme(self, part: Part, group_size: int) -> Scheme | None:
        """How a part's matrices are stored; NF4 has its own block size."""
        kind = self.kinds.get(part)
        return Scheme(kind, NF4_BLOCK if kind == "nf4" else group_size) if kind else None

    def quantization_config(self, group_size: int, ignore: tuple[str, ...] = ()) -> QuantizationConfig:
        """What config.json says; `ignore` names modules that stay unquantized beyond the recipe's own."""
        main = self.scheme("routed_experts", group_size)
        assert main is not None  # every recipe quantizes the routed experts
        named: dict[Scheme, list[str]] = {}
        unquantized: list[str] = []
        for part, patterns in PART_PATTERNS.items():
            scheme = self.scheme(part, group_size)
            if scheme is None:
                unquantized += patterns
            elif scheme != main or part == "embedding":  # which is no `Linear`, so it is always named
                named.setdefault(scheme, []).extend(patterns)
        # The group for every `Linear` stands last: readers that take the first group for the dense
        # layers (transformers, asked to dequantize) find theirs.
        groups = (*(SchemeGroup(scheme, tuple(targets)) for scheme, targets in named.items()),)
        return QuantizationConfig(
            groups=(*groups, SchemeGroup(main, ("Linear",))),
            ignore=(*_plain(unquantized), *self.kept, *ignore),
            method="localmoe-nf4" if main.kind == "nf4" else "compressed-tensors",
        )


def _plain(patterns: list[str]) -> list[str]:
    """`lm_head` by its plain name, which is what other engines look for among the ignored."""
    return ["lm_head" if pattern == r"re:lm_head$" else pattern for pattern in patterns]


_DENSE_INT8: dict[Part, Kind] = {"shared_expert": "int8", "dense_mlp": "int8", "attention": "int8"}
_ENDS_INT8: dict[Part, Kind] = {"kv_b": "int8", "head": "int8", "embedding": "int8"}
_DENSE_INT4: dict[Part, Kind] = {"shared_expert": "int4", "dense_mlp": "int4", "attention": "int4"}

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("balanced", {"routed_experts": "int4", **_DENSE_INT8}, served=True),
        Recipe("experts-only", {"routed_experts": "int4"}),
        Recipe("local", {"routed_experts": "int4", **_DENSE_INT8, **_ENDS_INT8}),
        Recipe("compact", {"routed_experts": "int4", **_DENSE_INT4, **_ENDS_INT8}),
        Recipe(
            "smallest",
            {"routed_experts": "int4", **_DENSE_INT4, "kv_b": "int8", "head": "int4", "embedding": "int4"},
        ),
        Recipe("int8", {"routed_experts": "int8", **_DENSE_INT8, **_ENDS_INT8}),
        Recipe("nf4", {"routed_experts": "nf4", **_DENSE_INT8}),
    )
}


def recipe_named(name: str) -> Recipe:
    """Raises UsageError for a name that is not a recipe's."""
    recipe = RECIPES.get(name)
    if recipe is None:
        raise UsageError(f"unknown recipe {name[:40]!r}: the recipes are {', '.join(RECIPES)}")
    return recipe


def part_of(module: str) -> Part | None:
    """Which part a module is of, or None for those that no model of ours has."""
    for part, patterns in PART_PATTERNS.items():
        if any(re.match(pattern.removeprefix("re:"), module) for pattern in patterns):
            return part
    return None
