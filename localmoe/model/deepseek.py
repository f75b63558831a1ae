"""The whole model in forward order: embedding, blocks, norm, head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from localmoe.errors import InputError
from localmoe.kernels.dispatch import MLP, Kernels
from localmoe.kernels.experts import ExpertProducts
from localmoe.kernels.layer import LayerParts
from localmoe.model.config import ModelConfig
from localmoe.model.kv_cache import LatentCache
from localmoe.model.layers import Linear, RMSNorm, WeightSource, embedding_rows, expert_weights
from localmoe.model.mla import Attention, Path, Positions, cheaper_path
from localmoe.model.moe import Experts, MoE
from localmoe.model.rope import Rope

PREFILL_CHUNK = 512
"""Tokens of a prompt computed in one pass. Large enough that an expert meets a batch worth reading its weights
for (V2-Lite: 512 * 6 / 64 = 48 tokens an expert), small enough that activations stay in tens of MB and Ctrl-C is
noticed between passes."""


class Block:
    """One layer: attention and MLP (dense or MoE), each after its norm and added to the stream."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        layer: int,
        kernels: Kernels,
        experts: Callable[[int], Experts],
    ) -> None:
        module = f"model.layers.{layer}"
        self._input_norm = RMSNorm(source, f"{module}.input_layernorm", config.rms_norm_eps)
        self._attention = Attention(config, source, layer, kernels)
        self._mlp_norm = RMSNorm(source, f"{module}.post_attention_layernorm", config.rms_norm_eps)
        self._mlp: _Dense | MoE
        # An MTP layer, past the last, is of either kind
        if config.moe_layers[layer] if layer < len(config.moe_layers) else f"{module}.mlp.gate.weight" in source:
            self._mlp = MoE(config, source, f"{module}.mlp", kernels, experts(layer))
        else:
            self._mlp = _Dense(source, f"{module}.mlp", kernels)
        self._attention_time = kernels.profile.part("attention")
        self.layer = layer
        self._epsilon = config.rms_norm_eps

    def parts(self) -> LayerParts | None:
        """What it is made of, if every part may have a native form."""
        attention, mlp = self._attention.decode, self._mlp
        if attention is None or not isinstance(mlp.experts, ExpertProducts):
            return None
        router = (mlp.router.weight, mlp.router.native) if isinstance(mlp, MoE) else None
        norms = self._input_norm.weight, self._mlp_norm.weight
        return LayerParts(norms[0], attention, norms[1], mlp.experts, self._epsilon, router)

    def __call__(self, x: Tensor, positions: Positions, cache: LatentCache) -> Tensor:
        """x float32 [T, H] -> [T, H]; the layer's part of `cache` gets the pass's tokens."""
        with self._attention_time:
            x = x + self._attention(self._input_norm(x), positions, cache)
        return x + self._mlp(self._mlp_norm(x))

    def remember(self, x: Tensor, positions: Positions, cache: LatentCache) -> None:
        """Only put the latents of `x` [T, H] into the layer's part of `cache`."""
        self._attention.remember(self._input_norm(x), positions, cache)


class Blocks:
    """Blocks that follow one another: a few tokens go through all of them in one native call, where each has one."""

    def __init__(self, blocks: Sequence[Block], kernels: Kernels) -> None:
        self._blocks = blocks
        self._layers = tuple(block.layer for block in blocks)
        parts = [part for block in blocks if (part := block.parts()) is not None]
        self._native = kernels.layers(parts) if len(parts) == len(blocks) else None

    def __len__(self) -> int:
        return len(self._blocks)

    def __call__(self, x: Tensor, positions: Positions, cache: LatentCache) -> Tensor:
        """As a block's; x may be overwritten."""
        if self._native is not None and positions.path == "absorbed":
            rows = cache.reserve_all(self._layers, len(x))
            if self._native.takes(len(x), rows):
                return self._native(x, positions.rotations_flat, rows, cache.length)
        for block in self._blocks:
            x = block(x, positions, cache)
        return x


class _Dense:
    """A leading layer's MLP, without experts."""

    def __init__(self, source: WeightSource, module: str, kernels: Kernels) -> None:
        self._mlp = MLP(expert_weights(source, module), kernels)
        self.experts = self._mlp.experts
        self._time = kernels.profile.part("dense")

    def __call__(self, x: Tensor) -> Tensor:
        with self._time:
            return self._mlp(x)


class Model:
    """A DeepSeek-style model over weights that stay where `source` has them.

    `experts` supplies each MoE layer's routed experts; `path` forces naive or absorbed attention, and None
    takes the cheaper one pass by pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        kernels: Kernels,
        experts: Callable[[int], Experts],
        *,
        path: Path | None = None,
    ) -> None:
        self.config = config
        self.prefill_chunk = PREFILL_CHUNK
        self._path = path
        self._kernels = kernels
        self._rope = Rope(config)
        self._embedding = source.weight("model.embed_tokens")  # [V, H], as stored
        layers = range(config.num_hidden_layers)
        self._blocks = Blocks([Block(config, source, layer, kernels, experts) for layer in layers], kernels)
        self._norm = RMSNorm(source, "model.norm", config.rms_norm_eps)
        self._head = Linear(source, "model.embed_tokens" if config.tie_word_embeddings else "lm_head", kernels)
        self._head_time = kernels.profile.part("head")

    def new_cache(self, capacity: int) -> LatentCache:
        """An empty cache of up to `capacity` tokens."""
        return LatentCache(self.config, capacity, self._kernels.cache_dtype)

    def forward(self, token_ids: Tensor, cache: LatentCache, *, last_only: bool = False) -> Tensor:
        """Run `token_ids` int64 [T] after the tokens in `cache`, which then holds them too.

        Returns float32 logits [T, V], or [1, V] of the last token. Raises InputError for no tokens or an id
        outside the vocabulary, ContextOverflowError where the cache is full; the cache is unchanged then.
        """
        return self.forward_with_states(token_ids, cache, last_only=last_only)[0]

    def forward_with_states(
        self, token_ids: Tensor, cache: LatentCache, *, last_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """What `forward` returns, and what `states` does."""
        states = self.states(token_ids, cache)
        return self.logits(states[-1:] if last_only else states), states

    def states(self, token_ids: Tensor, cache: LatentCache) -> Tensor:
        """As `forward`, but the states after the final norm, float32 [T, H]: what the head and the MTP layer read."""
        check_tokens(token_ids, self.config.vocab_size)
        count = len(token_ids)
        self._kernels.share_cores(count)
        positions = self.positions(cache.length, count)
        x = self._blocks(self.embed(token_ids), positions, cache)
        cache.advance(count)
        return self._norm(x)

    def logits(self, states: Tensor) -> Tensor:
        """The head: states [T, H] -> float32 logits [T, V]."""
        with self._head_time:
            return self._head(states)

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> float32 [T, H]."""
        return embedding_rows(self._embedding, token_ids)

    def positions(self, start: int, count: int) -> Positions:
        """The places `start` to `start + count` of a sequence."""
        return positions(self.config, self._rope, start, count, self._path)


def positions(config: ModelConfig, rope: Rope, start: int, count: int, path: Path | None = None) -> Positions:
    """The places `start` to `start + count` of a sequence, for blocks; `path` None takes the cheaper one."""
    future = torch.ones(count, count, dtype=torch.bool).triu_(1) if count > 1 else None
    rotations = rope.rotations(start, count)
    flat = torch.view_as_real(rotations).flatten(1)
    return Positions(rotations, flat, future, path or cheaper_path(config, count, start + count))


def check_tokens(token_ids: Tensor, vocabulary: int) -> None:
    """Raises InputError for no tokens or an id outside the vocabulary."""
    if len(token_ids) == 0:
        raise InputError("there is no token to run the model on")
    if int(token_ids.min()) < 0 or int(token_ids.max()) >= vocabulary:
        raise InputError(f"a token id is outside the vocabulary of {vocabulary}")
