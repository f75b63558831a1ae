"""How many bytes each part of a model takes, from its config alone: what `plan` reckons with before any download.

A recipe comes in as the `QuantizationConfig` that it would write, so this module knows no recipes. For an artifact the
sums equal its shards' tensors to the byte (tests/model/test_sizes.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from localmoe.errors import UnsupportedModelError
from localmoe.formats.fp8 import scale_shape
from localmoe.formats.scheme import QuantizationConfig, TensorSpec
from localmoe.formats.shards import spec_bytes
from localmoe.model.config import ModelConfig
from localmoe.model.shapes import EMBEDDING, layer_modules, layer_tensors

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


PREFILL_BYTES = 128 << 20
"""What the card takes at a time for a prompt's expanded keys and values, of as many heads as fit, at least one."""
SCORE_BYTES = 192 << 20
"""The same for scores and masks, of as many queries as fit, should nothing fuse them."""
FIXED_BYTES = 160 << 20
"""What passes of a few rows work in, rotations of every position, and what torch's libraries take for themselves."""
HEAD_ROWS = 64
"""Rows whose logits are on the card at a time: a vocabulary is wide."""


@dataclass(frozen=True)
class Storage:
    """How a checkpoint stores its matrices: by schemes, in FP8 blocks (a source), or in `dtype` throughout."""

    quantization: QuantizationConfig | None
    dtype: torch.dtype = torch.bfloat16
    fp8_block: tuple[int, int] | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], quantization: QuantizationConfig | None = None) -> Storage:
        """What config.json says of its own files; with `quantization`, what quantizing them by it would make.

        FP8 that a recipe leaves alone becomes bf16. Raises UnsupportedModelError for a form that localmoe does not
        read.
        """
        own = config.get("quantization_config")
        named = config.get("dtype", config.get("torch_dtype")) or "bfloat16"
        dtype = _DTYPES.get(str(named))
        if dtype is None:
            raise UnsupportedModelError(
                f"config.json: torch_dtype {str(named)[:40]!r} is not a float that localmoe reads"
            )
        if not own:
            return cls(quantization, dtype)
        if not isinstance(own, Mapping):
            raise UnsupportedModelError("config.json: quantization_config is not an object")
        if own.get("quant_method") != "fp8":
            return cls(QuantizationConfig.from_dict(own), dtype)
        if quantization is not None:
            return cls(quantization, torch.bfloat16)
        block = own.get("weight_block_size")
        if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
            raise UnsupportedModelError(
                "config.json: quantization_config.weight_block_size is missing; only block-scaled FP8 is supported"
            )
        return cls(None, torch.bfloat16, (block[0], block[1]))

    def matrix(self, module: str, shape: tuple[int, int]) -> tuple[str, list[TensorSpec]]:
        """(form, tensors) of a linear module's [out, in] matrix; rows that no whole groups fill stay as they were."""
        scheme = self.quantization.scheme_for(module) if self.quantization else None
        if scheme is not None and scheme.divides(shape[1]):
            return scheme.kind, list(scheme.tensors(module, *shape).values())
        if self.fp8_block is not None and module != "lm_head":
            scales = scale_shape(*shape, self.fp8_block)
            return "fp8", [(torch.float8_e4m3fn, shape), (torch.float32, scales)]
        return self.form, [(self.dtype, shape)]

    def embedding(self, module: str, shape: tuple[int, int]) -> tuple[str, list[TensorSpec]]:
        """The same of an embedding, which no source has in FP8."""
        return Storage(self.quantization, self.dtype).matrix(module, shape)

    def plain(self, name: str, shape: tuple[int, ...]) -> TensorSpec:
        """A tensor that no recipe touches. The router's correction bias is float32 in every published checkpoint."""
        return (torch.float32 if name.endswith("e_score_correction_bias") else self.dtype, shape)

    @property
    def form(self) -> str:
        """The form of what is not quantized."""
        return str(self.dtype).removeprefix("torch.").replace("bfloat16", "bf16")


@dataclass(frozen=True)
class Part:
    """Some matrices together: bytes and weights by form (int4, int8, nf4, fp8, bf16, float16, float32)."""

    stored: Mapping[str, int]
    weights: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        return sum(self.stored.values())


@dataclass(frozen=True)
class LayerSizes:
    """One layer. `mlp` is the dense MLP, or router and shared expert; `expert` one routed expert, the largest."""

    attention: Part
    mlp: Part
    expert: Part
    experts: int  # how many; 0 in a dense layer
    experts_nbytes: int  # all of them

    @property
    def always(self) -> int:
        """Bytes that every token reads."""
        return self.attention.nbytes + self.mlp.nbytes


@dataclass(frozen=True)
class ModelSizes:
    """A whole checkpoint. `head` has the final norm with it and is the embedding itself where they are tied (then
    `embedding` is 0); `mtp` only guesses, if anything."""

    layers: tuple[LayerSizes, ...]
    embedding: int
    head: Part
    mtp: int

    @property
    def always(self) -> int:
        """Bytes that every token reads: all but routed experts, embedding and MTP."""
        return self.head.nbytes + sum(layer.always for layer in self.layers)

    @property
    def experts(self) -> int:
        """Bytes of all routed experts."""
        return sum(layer.experts_nbytes for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.always + self.experts + self.embedding + self.mtp

    @property
    def expert(self) -> int:
        """Bytes of the largest routed expert: an expert slot's size."""
        return max(layer.expert.nbytes for layer in self.layers)


def model_sizes(config: ModelConfig, storage: Storage) -> ModelSizes:
    """Add up every tensor.

    Of an MTP layer's copies of embedding and head, quantizing drops those that equal the main model's, as all
    published ones do; a source is reckoned with them.
    """
    layers = tuple(_layer(config, storage, index, is_moe) for index, is_moe in enumerate(config.moe_layers))
    shape = config.vocab_size, config.hidden_size
    norm = spec_bytes(storage.plain("model.norm.weight", (config.hidden_size,)))
    if config.tie_word_embeddings:
        # which stays unquantized: it is the head as well
        head, embedding = _part([(storage.form, [storage.plain(f"{EMBEDDING}.weight", shape)])], norm, storage.form), 0
    else:
        head = _part([storage.matrix("lm_head", shape)], norm, storage.form)
        embedding = _part([storage.embedding(EMBEDDING, shape)]).nbytes
    mtp = sum(_mtp_layer(config, storage, index) for index in range(config.num_nextn_predict_layers))
    return ModelSizes(layers, embedding, head, mtp)


def _layer(config: ModelConfig, storage: Storage, index: int, is_moe: bool) -> LayerSizes:
    attention, mlp = [], []
    experts: dict[str, list[tuple[str, list[TensorSpec]]]] = {}
    for module, shape in layer_modules(config, index, is_moe):
        stored = storage.matrix(module, shape)
        if ".self_attn." in module:
            attention.append(stored)
        elif ".mlp.experts." in module:
            experts.setdefault(module.rpartition(".")[0], []).append(stored)
        else:
            mlp.append(stored)
    norms = 0
    for name, plain in layer_tensors(config, index, is_moe):
        if name.endswith(".mlp.gate.weight"):
            mlp.append((storage.form, [storage.plain(name, plain)]))
        else:
            norms += spec_bytes(storage.plain(name, plain))
    parts = [_part(matrices) for matrices in experts.values()]
    return LayerSizes(
        attention=_part(attention, norms, storage.form),
        mlp=_part(mlp),
        expert=max(parts, key=lambda part: part.nbytes, default=_part([])),
        experts=len(parts),
        experts_nbytes=sum(part.nbytes for part in parts),
    )


def _mtp_layer(config: ModelConfig, storage: Storage, index: int) -> int:
    layer = config.num_hidden_layers + index
    block = _layer(config, storage, layer, is_moe=True)
    hidden, module = config.hidden_size, f"model.layers.{layer}"
    extra = [(f"{module}.{name}", (hidden,)) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")]
    plain: list[tuple[str, tuple[int, ...]]] = [*extra, (f"{module}.eh_proj.weight", (hidden, 2 * hidden))]
    if storage.quantization is None:  # the source has copies of these two
        table = (config.vocab_size, hidden)
        plain += [(f"{module}.embed_tokens.weight", table), (f"{module}.shared_head.head.weight", table)]
    return block.always + block.experts_nbytes + sum(spec_bytes(storage.plain(*each)) for each in plain)


def _part(matrices: Iterable[tuple[str, list[TensorSpec]]], extra: int = 0, extra_form: str = "bf16") -> Part:
    """`extra` bytes of vectors go with the matrices of their form."""
    stored: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for form, specs in matrices:
        stored[form] += sum(map(spec_bytes, specs))
        weights[form] += prod(specs[0][1]) * _values_a_number(form)
    if extra:
        stored[extra_form] += extra
    return Part(dict(stored), dict(weights))


def _values_a_number(form: str) -> int:
    """Weights in one number of the first tensor: int32 words of 8 or 4, bytes of 2."""
    return {"int4": 8, "int8": 4, "nf4": 2}.get(form, 1)


CACHE_STEP = 256
"""Tokens by which the latent cache on a card grows."""


def card_cache_bytes(row: int, layers: int, tokens: int) -> int:
    """Bytes of a card that hold `tokens` in so many layers, of `row` bytes each: rows are aligned there."""
    return tokens * layers * -(-row // 16) * 16


def card_workspace(config: ModelConfig, tokens: int) -> int:
    """Bytes that `localmoe.model.card` takes beside weights and latents for passes of up to `tokens`, all float32."""
    heads, hidden, k = config.num_attention_heads, config.hidden_size, config.num_experts_per_tok
    attention = heads * (2 * config.qk_head_dim + config.v_head_dim)
    experts = k * (hidden + config.moe_intermediate_size)
    widest = max(config.intermediate_size, config.n_shared_experts * config.moe_intermediate_size)
    floats = tokens * (8 * hidden + attention + experts + 2 * widest) + HEAD_ROWS * config.vocab_size
    return FIXED_BYTES + PREFILL_BYTES + SCORE_BYTES + 4 * floats
