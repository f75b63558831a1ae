"""Multi-head latent attention: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1 and appendix C.

All heads' keys and values are linear maps of one latent a token, and only the latent is cached, beside one
rotated key that all heads share. Two ways to the same result, equal up to rounding:

- naive: k = k_b latent, v = v_b latent for every cached token, then ordinary attention. Few operations a
  query, so it is for long chunks.
- absorbed: q k = q (k_b latent) = (q k_b) latent. The query is folded through k_b and attends to the
  latents themselves, and v_b is applied to the result. Nothing is expanded, so it is for decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from localmoe.formats.weights import dequantize
from localmoe.kernels.attention import DecodeAttention, MlaWeights
from localmoe.kernels.cpu import MATVEC_TOKENS
from localmoe.kernels.dispatch import Kernels
from localmoe.model.config import ModelConfig
from localmoe.model.kv_cache import LatentCache
from localmoe.model.layers import Linear, RMSNorm, WeightSource
from localmoe.model.rope import rotate, softmax_scale

Path = Literal["naive", "absorbed"]

# Both latent norms have this eps whatever rms_norm_eps is, in DeepSeek's code and in transformers
LATENT_NORM_EPS = 1e-6
SHORT_PROMPT = 32
"""Tokens up to which the native kernels, a few at a time, are faster than expanding keys and values (measured)."""

# Scores, and the naive path's keys and values, are made for as many heads at a time as fit in this
_WORKSPACE_BYTES = 256 << 20


@dataclass(frozen=True)
class Positions:
    """What a pass knows about its tokens' places, the same for every layer."""

    rotations: Tensor  # complex64 [T, p/2]
    rotations_flat: Tensor  # the same as float32 [T, p]: real, imaginary, real, ...
    future: Tensor | None  # bool [T, T], True where the key comes after the query; None for one token
    path: Path


_NEGLIGIBLE = 1e-30
"""Far below a float32 sum's rounding. Sharp heads leave numbers with which a CPU multiplies fifteen times slower."""


def cheaper_path(config: ModelConfig, tokens: int, context: int) -> Path:
    """The path with fewer multiplications for `tokens` queries over `context` keys, by head.

    A few tokens always go the absorbed way, so that decode is one path from the first token on, and those checked in
    one pass get the bits that they get one by one; a short prompt does, too.
    """
    r, v, p, n = config.kv_lora_rank, config.v_head_dim, config.qk_rope_head_dim, config.qk_nope_head_dim
    naive = context * r * (n + v) + tokens * context * (n + p + v)
    absorbed = tokens * r * (n + v) + tokens * context * (2 * r + p)
    return "absorbed" if tokens <= SHORT_PROMPT or absorbed < naive else "naive"


def naive_attention(
    q_nope: Tensor, q_pe: Tensor, rows: Tensor, k_b: Tensor, v_b: Tensor, future: Tensor | None
) -> Tensor:
    """Attention over expanded keys and values; arguments as for `absorbed_attention`."""
    rank = k_b.shape[2]
    latent, k_pe = rows[:, :rank], rows[:, rank:]  # [S, r], [S, p]
    k_nope = _expand(latent, k_b)  # [A, S, n]
    value = _expand(latent, v_b)  # [A, S, v]
    scores = (q_pe @ k_pe.T).baddbmm_(q_nope, k_nope.transpose(1, 2))  # [A, T, S]
    return torch.bmm(_causal_softmax(scores, future), value)  # [A, T, v]


def absorbed_attention(
    q_nope: Tensor, q_pe: Tensor, rows: Tensor, k_b: Tensor, v_b: Tensor, future: Tensor | None
) -> Tensor:
    """Attention over the latents themselves.

    q_nope [A, T, n] and q_pe [A, T, p] (rotated), both already scaled; rows [S, r + p] from the latent
    cache; k_b [A, n, r], v_b [A, v, r]. Returns [A, T, v]. All float32.
    """
    latent = rows[:, : k_b.shape[2]]  # [S, r]
    q = torch.cat((torch.bmm(q_nope, k_b), q_pe), dim=2)  # [A, T, r + p]
    attended = _causal_softmax(q @ rows.T, future) @ latent  # [A, T, r]
    return torch.bmm(attended, v_b.transpose(1, 2))  # [A, T, v]


def _expand(latent: Tensor, matrices: Tensor) -> Tensor:
    """Every head's map of every latent: [S, r] and [A, d, r] -> [A, S, d], as one matrix product."""
    heads, width, rank = matrices.shape
    return F.linear(latent, matrices.reshape(-1, rank)).view(-1, heads, width).transpose(0, 1)


def _causal_softmax(scores: Tensor, future: Tensor | None) -> Tensor:
    """Softmax of [A, T, S] over the keys, what is `_NEGLIGIBLE` as 0; the last T keys are this pass's own tokens."""
    if future is not None:
        scores[..., -len(future) :].masked_fill_(future, float("-inf"))
    return F.threshold(scores.softmax(dim=-1), _NEGLIGIBLE, 0.0, inplace=True)


class Attention:
    """One layer's attention with its weights."""

    def __init__(self, config: ModelConfig, source: WeightSource, layer: int, kernels: Kernels) -> None:
        module = f"model.layers.{layer}.self_attn"
        bias = config.attention_bias
        self._config = config
        self._layer = layer
        self._scale = softmax_scale(config)
        if config.q_lora_rank is None:
            self._q_proj = Linear(source, f"{module}.q_proj", kernels)
        else:
            self._q_a_proj = Linear(source, f"{module}.q_a_proj", kernels, bias=bias)
            self._q_a_norm = RMSNorm(source, f"{module}.q_a_layernorm", LATENT_NORM_EPS)
            self._q_b_proj = Linear(source, f"{module}.q_b_proj", kernels)
        self._kv_a_proj = Linear(source, f"{module}.kv_a_proj_with_mqa", kernels, bias=bias)
        self._kv_a_norm = RMSNorm(source, f"{module}.kv_a_layernorm", LATENT_NORM_EPS)
        self._o_proj = Linear(source, f"{module}.o_proj", kernels, bias=bias)
        self._kv_b = source.weight(f"{module}.kv_b_proj")  # [A * (n + v), r]
        self.decode = None if bias else kernels.attention(self._decode_weights(source, module))
        """The same of a few tokens in one native call, where there is one."""

    def _decode_weights(self, source: WeightSource, module: str) -> MlaWeights:
        config = self._config
        with_down = config.q_lora_rank is not None
        return MlaWeights(
            query=source.weight(f"{module}.q_b_proj" if with_down else f"{module}.q_proj"),
            latent=source.weight(f"{module}.kv_a_proj_with_mqa"),
            expand=self._kv_b,
            output=source.weight(f"{module}.o_proj"),
            latent_norm=self._kv_a_norm.weight,
            heads=config.num_attention_heads,
            nope=config.qk_nope_head_dim,
            scale=self._scale,
            epsilon=LATENT_NORM_EPS,
            query_down=(source.weight(f"{module}.q_a_proj"), self._q_a_norm.weight) if with_down else None,
        )

    def __call__(self, x: Tensor, positions: Positions, cache: LatentCache) -> Tensor:
        """Attend from `x` [T, H], which is appended to `cache`, to every token there. Returns [T, H]."""
        if self.decode is not None and positions.path == "absorbed":
            held = cache.reserve(self._layer, len(x))
            if self.decode.reads(held):
                return self._few_by_few(self.decode, x, positions.rotations_flat, held, cache.length)
        q_nope, q_pe = self._query(x, positions)
        k_b, v_b = self._expansions()
        rows = self._remember(x, positions, cache)  # [S, r + p]
        attend = naive_attention if positions.path == "naive" else absorbed_attention
        step = self._heads_at_a_time(len(x), len(rows))
        parts = [
            attend(q_nope[h : h + step], q_pe[h : h + step], rows, k_b[h : h + step], v_b[h : h + step],
                   positions.future)
            for h in range(0, len(q_nope), step)
        ]  # fmt: skip
        out = parts[0] if len(parts) == 1 else torch.cat(parts)  # [A, T, v]
        return self._o_proj(out.transpose(0, 1).flatten(1))

    def _few_by_few(self, native: DecodeAttention, x: Tensor, rotations: Tensor, held: Tensor, start: int) -> Tensor:
        """As many tokens at a time as a native call takes."""
        slices = [slice(first, first + MATVEC_TOKENS) for first in range(0, len(x), MATVEC_TOKENS)]
        parts = [native(x[few], rotations[few], held, start + few.start) for few in slices]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def remember(self, x: Tensor, positions: Positions, cache: LatentCache) -> None:
        """Append the latents of `x` [T, H] to `cache` and attend to nothing."""
        cache.write(self._layer, self._rows(x, positions))

    def _expansions(self) -> tuple[Tensor, Tensor]:
        """Every head's maps from the latent to its keys and values, float32: [A, n, r] and [A, v, r]."""
        kv_b = dequantize(self._kv_b).view(self._config.num_attention_heads, -1, self._config.kv_lora_rank)
        return kv_b[:, : self._config.qk_nope_head_dim], kv_b[:, self._config.qk_nope_head_dim :]

    def _query(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Scaled queries: [A, T, n], and [A, T, p] rotated."""
        config = self._config
        q = self._project_query(x).mul_(self._scale)  # [T, A * (n + p)]
        q = q.view(len(x), config.num_attention_heads, config.qk_head_dim).transpose(0, 1)  # [A, T, n + p]
        q_nope, q_pe = q[..., : config.qk_nope_head_dim], q[..., config.qk_nope_head_dim :]
        return q_nope, rotate(q_pe, positions.rotations)

    def _project_query(self, x: Tensor) -> Tensor:
        if self._config.q_lora_rank is None:
            return self._q_proj(x)
        return self._q_b_proj(self._q_a_norm(self._q_a_proj(x)))

    def _remember(self, x: Tensor, positions: Positions, cache: LatentCache) -> Tensor:
        """Append this pass's latents and shared keys; all of the layer's rows in float32 [S, r + p]."""
        return cache.append(self._layer, self._rows(x, positions)).float()

    def _rows(self, x: Tensor, positions: Positions) -> Tensor:
        """What the cache holds of `x` [T, H]: [T, r + p]."""
        rank = self._config.kv_lora_rank
        kv_a = self._kv_a_proj(x)  # [T, r + p]
        latent, k_pe = self._kv_a_norm(kv_a[:, :rank]), rotate(kv_a[:, rank:], positions.rotations)
        return torch.cat((latent, k_pe), dim=1)

    def _heads_at_a_time(self, tokens: int, context: int) -> int:
        """How many heads' scores, keys and values fit in the workspace: at least one."""
        config = self._config
        bytes_a_head = 4 * context * (tokens + config.qk_nope_head_dim + config.v_head_dim)
        return max(1, min(config.num_attention_heads, _WORKSPACE_BYTES // bytes_a_head))
