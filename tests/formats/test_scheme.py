"""quantization_config: what is written is read back, and what is not implemented is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from localmoe.errors import UnsupportedModelError
from localmoe.formats.scheme import QuantizationConfig, Scheme, SchemeGroup

MIXED = QuantizationConfig(
    groups=(
        SchemeGroup(Scheme("int4", 32), ("Linear",)),
        SchemeGroup(Scheme("int8", 32), (r"re:.*self_attn\.", r"re:.*mlp\.shared_.*")),
    ),
    ignore=("lm_head", r"re:.*mlp\.gate$", r"re:.*kv_b_proj$"),
)


def test_precedence_is_ignore_then_name_then_linear() -> None:
    assert MIXED.scheme_for("lm_head") is None
    assert MIXED.scheme_for("model.layers.3.self_attn.kv_b_proj") is None
    assert MIXED.scheme_for("model.layers.3.mlp.gate") is None
    assert MIXED.scheme_for("model.layers.3.mlp.gate_proj") == Scheme("int4", 32)
    assert MIXED.scheme_for("model.layers.3.self_attn.o_proj") == Scheme("int8", 32)
    assert MIXED.scheme_for("model.layers.3.mlp.experts.0.up_proj") == Scheme("int4", 32)


def test_an_embedding_is_no_linear() -> None:
    """Checkpoints of others leave it out of `ignore`, since their engines never take it for one."""
    assert MIXED.scheme_for("model.embed_tokens") is None
    for target in ("Embedding", "model.embed_tokens", r"re:.*embed_tokens$"):
        group = SchemeGroup(Scheme("int8", 64), (target,))
        packed = QuantizationConfig((group, *MIXED.groups), MIXED.ignore)
        assert packed.scheme_for("model.embed_tokens") == Scheme("int8", 64)
        assert packed.scheme_for("model.layers.0.mlp.up_proj") == Scheme("int4", 32)


@pytest.mark.parametrize("method", ["compressed-tensors", "localmoe-nf4"])
def test_written_and_read_back(method: Any) -> None:
    first = Scheme("nf4", 64) if method == "localmoe-nf4" else Scheme("int4", 32)
    config = QuantizationConfig((SchemeGroup(first, ("Linear",)), MIXED.groups[1]), MIXED.ignore, method)
    assert QuantizationConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("quant_method",), "awq"),
        (("format",), "float-quantized"),
        (("kv_cache_scheme",), {"num_bits": 8}),
        (("config_groups",), {}),
        (("ignore",), ["re:("]),
        (("ignore",), ["re:" + "a" * 600]),
        (("config_groups", "group_0", "input_activations"), {"num_bits": 8}),
        (("config_groups", "group_0", "weights", "symmetric"), False),
        (("config_groups", "group_0", "weights", "actorder"), "group"),
        (("config_groups", "group_0", "weights", "strategy"), "channel"),
        (("config_groups", "group_0", "weights", "group_size"), 48),
        (("config_groups", "group_0", "weights", "num_bits"), 3),
        (("config_groups", "group_0", "weights", "type"), "float"),
        (("config_groups", "group_0", "weights", "type"), []),
        (("config_groups", "group_0", "weights", "num_bits"), {}),
        (("config_groups", "group_0", "targets"), []),
    ],
)
def test_what_changes_the_numbers_is_refused_by_name(path: tuple[str, ...], value: Any) -> None:
    config = copy.deepcopy(MIXED.to_dict())
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(UnsupportedModelError, match=path[-1] if path[-1] not in ("num_bits", "type") else "weights"):
        QuantizationConfig.from_dict(config)


def test_shapes_and_bits_of_the_stored_tensors() -> None:
    assert Scheme("int4", 32).bits_per_weight == 4.5
    assert Scheme("int8", 64).bits_per_weight == 8.25
    assert Scheme("nf4", 64).bits_per_weight == 4.5
    assert Scheme("int4", 32).tensors("x", 10, 96) == {
        "x.weight_packed": (torch.int32, (10, 12)),
        "x.weight_scale": (torch.bfloat16, (10, 3)),
        "x.weight_shape": (torch.int64, (2,)),
    }
    assert Scheme("nf4", 64).tensors("x", 10, 128)["x.weight_absmax"] == (torch.float32, (10, 2))
