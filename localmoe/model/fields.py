"""Reading an untrusted config.json field by field, and the list of fields that may not be ignored.

Three kinds of field: those `ModelConfig` reads; those known to change the maths, accepted only at the value
that changes nothing (`NEUTRAL`); and the rest. Of the rest, a field whose name says that it touches the
maths (`_SUSPICIOUS`) is refused unless its value switches it off; all others (dropout, dtype, training and
bookkeeping) pass. Refusing every unknown field would reject each new transformers release, which adds
bookkeeping fields; passing every one would run a changed architecture as if it were the old one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from localmoe.errors import UnsupportedModelError

# field -> the values at which it changes nothing. An absent field and null are always neutral.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "hidden_activation": ("silu",),
    "rope_interleave": (True,),  # False pairs dimension i with i + d/2, another rotation
    "partial_rotary_factor": (1, 1.0),
    "pretraining_tp": (0, 1),
    "mlp_bias": (False,),
    "use_mla": (True,),
    "chunk_size_feed_forward": (0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}

# Parts of names of fields that changed the maths in some model: sliding windows, DSA's indexer, attention
# sinks, soft caps, muP multipliers, QK norms, extra biases, hyper-connections, linear attention, zero experts.
_SUSPICIOUS = (
    "rope_", "rotary", "activation", "norm_type", "scale_", "_scale", "sliding", "window", "index_", "indexer",
    "softcap", "sink", "multiplier", "logits_scal", "qk_norm", "q_norm", "k_norm", "_bias", "alibi", "clip",
    "swiglu", "hc_", "compress", "hash_", "engram", "linear_attn", "conv_", "ssm", "zero_expert", "layer_types",
    "mla_", "nope", "latent", "o_lora", "o_groups", "residual", "post_norm", "sandwich", "gated", "gating",
    "scoring", "topk", "attention_chunk",
)  # fmt: skip


def refuse_unimplemented(config: Mapping[str, Any], read: Collection[str]) -> None:
    """Raise UnsupportedModelError for a field outside `read` that changes the maths."""
    for name, value in config.items():
        if name in read or value is None:
            continue
        if name in NEUTRAL:
            if not any(value == allowed and type(value) is type(allowed) for allowed in NEUTRAL[name]):
                raise unsupported(name, value)
        elif any(part in name for part in _SUSPICIOUS) and value not in (False, 0, "", [], {}):
            raise unsupported(name, value)


def unsupported(name: str, value: object, why: str = "which localmoe does not implement") -> UnsupportedModelError:
    """The error for a field's value, cut to one short line whatever the value is."""
    shown = repr(value)
    return UnsupportedModelError(f"config.json: {name} is {shown if len(shown) <= 60 else shown[:57] + '...'}, {why}")


class Fields:
    """Typed access to one JSON object; every wrong value raises UnsupportedModelError naming the field."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """An int in [low, high]; required unless there is a default."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, value, "wanted a whole number")
        if not low <= value <= high:
            raise self._wrong(name, value, f"wanted {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in [low, high]; required unless there is a default."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(name, value, "wanted a number")
        if not low <= value <= high:  # false for NaN, and exact for integers too large for a float
            raise self._wrong(name, value, f"wanted {low:g} to {high:g}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "wanted true or false")
        return value

    def choice(self, name: str, options: tuple[str, ...], default: str) -> str:
        """One of `options`; anything else is an architecture we do not implement."""
        value = self._get(name, default)
        if value not in options:
            raise self._wrong(name, value, f"localmoe implements {', '.join(options)} here")
        return str(value)

    def mapping(self, name: str) -> Fields | None:
        """A nested object, or None where it is absent or null."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong(name, value, "wanted an object")
        return Fields(value, f"{self._prefix}{name}.")

    def only(self, names: Collection[str]) -> None:
        """Refuse any field (null apart) that is not in `names`: for objects where all fields are maths."""
        for name, value in self._values.items():
            if name not in names and value is not None:
                raise unsupported(self._prefix + str(name), value)

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            raise UnsupportedModelError(f"config.json lacks {self._prefix}{name}, which this architecture needs")
        return value

    def _wrong(self, name: str, value: object, wanted: str) -> UnsupportedModelError:
        return unsupported(self._prefix + name, value, f"but {wanted}")
