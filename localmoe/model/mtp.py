"""The multi-token-prediction layer: from the model's state at a token and the next token, the one after that.

DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 2.2, with what the published weights want and the figure there
does not show: the state is the main model's *after* its final norm, `eh_proj` takes the embedding first, and a chained
guess reads this layer's state after `shared_head.norm`. The embedding and the head are the main model's, unless the
checkpoint still holds its copies of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from localmoe.formats.weights import Weight
from localmoe.kernels.dispatch import Kernels
from localmoe.model.config import ModelConfig
from localmoe.model.deepseek import Block, Blocks
from localmoe.model.kv_cache import LatentCache
from localmoe.model.layers import Linear, RMSNorm, WeightSource, embedding_rows
from localmoe.model.mla import Positions
from localmoe.model.moe import Experts


def mtp_module(config: ModelConfig) -> str:
    """Where a checkpoint keeps its first MTP layer."""
    return f"model.layers.{config.num_hidden_layers}"


def has_mtp(config: ModelConfig, source: WeightSource) -> bool:
    """Whether the checkpoint has an MTP layer; converted ones often lost it, whatever their config says."""
    return has_matrix(source, f"{mtp_module(config)}.eh_proj")


def has_matrix(source: WeightSource, module: str) -> bool:
    """Whether a module's matrix is there, in any form."""
    return any(f"{module}.{ending}" in source for ending in ("weight", "weight_packed", "weight_nf4"))


class MainModel(Protocol):
    """What the layer takes from the model that it guesses for, wherever that is computed; `localmoe.model.deepseek` and
    `localmoe.model.card.model` have one."""

    config: ModelConfig

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> float32 [T, H]."""
        ...

    def positions(self, start: int, count: int) -> Positions:
        """The places `start` to `start + count` of a sequence."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """The head: states [T, H] -> float32 logits [T, V]."""
        ...


class MtpLayer:
    """The first MTP layer of a checkpoint, which must have one; computed on the CPU.

    Its cache has one layer, `cache(capacity)`. The row of token i is of the state there and of token i + 1, so it lacks
    one token of the main model's at least; it may begin later, too.
    """

    def __init__(
        self, model: MainModel, source: WeightSource, kernels: Kernels, experts: Callable[[int], Experts]
    ) -> None:
        config, module = model.config, mtp_module(model.config)
        self.width = config.hidden_size
        self._model = model
        self._kernels = kernels
        self._embedding_norm = RMSNorm(source, f"{module}.enorm", config.rms_norm_eps)
        self._state_norm = RMSNorm(source, f"{module}.hnorm", config.rms_norm_eps)
        self._projection = Linear(source, f"{module}.eh_proj", kernels)
        self._block = Block(config, source, config.num_hidden_layers, kernels, experts)
        self._blocks = Blocks([self._block], kernels)
        self._norm = RMSNorm(source, f"{module}.shared_head.norm", config.rms_norm_eps)
        self._embedding: Weight | None = None
        if has_matrix(source, f"{module}.embed_tokens"):
            self._embedding = source.weight(f"{module}.embed_tokens")  # [V, H], as stored
        self._head: Linear | None = None
        if has_matrix(source, f"{module}.shared_head.head"):
            self._head = Linear(source, f"{module}.shared_head.head", kernels)

    def cache(self, capacity: int, dtype: torch.dtype) -> LatentCache:
        """An empty latent cache for this layer alone."""
        return LatentCache(self._model.config, capacity, dtype, layers=(self._model.config.num_hidden_layers,))

    def remember(self, states: Tensor, next_ids: Sequence[int], cache: LatentCache, start: int = 0) -> None:
        """Append the latents of `states` [T, H] with the tokens that came next. `start` is the token that the cache's
        first row is of.

        Only what later tokens attend to is computed: no attention, no experts.
        """
        self._kernels.share_cores(len(states))
        positions = self._model.positions(start + cache.length, len(states))
        self._block.remember(self._inputs(states, next_ids), positions, cache)
        cache.advance(len(states))

    def step(self, states: Tensor, next_ids: Sequence[int], cache: LatentCache, start: int = 0) -> Tensor:
        """As `remember`, and return the layer's own state at the last token, [T, H] -> [1, H]: for `logits`, and for a
        chained guess in place of the main model's state."""
        self._kernels.share_cores(len(states))
        positions = self._model.positions(start + cache.length, len(states))
        x = self._blocks(self._inputs(states, next_ids), positions, cache)
        cache.advance(len(states))
        return self._norm(x[-1:])

    def logits(self, state: Tensor) -> Tensor:
        """Float32 logits [1, V] of the token after the next, from what `step` returned."""
        return self._model.logits(state) if self._head is None else self._head(state)

    def _inputs(self, states: Tensor, next_ids: Sequence[int]) -> Tensor:
        """[T, H] and the following tokens [T] -> the block's input [T, H]."""
        own, ids = self._embedding, torch.tensor(next_ids)
        embedded = self._model.embed(ids) if own is None else embedding_rows(own, ids)
        return self._projection(torch.cat((self._embedding_norm(embedded), self._state_norm(states)), dim=1))
