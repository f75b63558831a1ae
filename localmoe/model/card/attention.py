"""A layer's latent attention on the card (`localmoe.model.mla` has the maths and the names of shapes)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from localmoe.kernels.triton.absorb import fold_queries, unfold_values
from localmoe.kernels.triton.latent import store_latents
from localmoe.kernels.triton.launch import Launch
from localmoe.kernels.triton.matmul import matmul
from localmoe.kernels.triton.matvec import matvec, new_output
from localmoe.kernels.triton.mla_decode import attend
from localmoe.kernels.triton.norm import rms_norm
from localmoe.kernels.triton.weights import DeviceMatrix, upload
from localmoe.model.card.rows import RowBuffers, Vectors
from localmoe.model.config import ModelConfig
from localmoe.model.kv_cache import unpack_int8
from localmoe.model.layers import WeightSource
from localmoe.model.mla import LATENT_NORM_EPS
from localmoe.model.rope import softmax_scale
from localmoe.model.sizes import PREFILL_BYTES, SCORE_BYTES

# cuDNN, which torch may prefer on newer cards, plans each new shape anew and takes memory that torch does not count
_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_UNPACKED_ROWS = 4096


@dataclass(frozen=True)
class CardLinear:
    """A stored matrix and its bias, if it has one, float32 [out]."""

    matrix: DeviceMatrix
    bias: Tensor | None = None

    @classmethod
    def of(cls, source: WeightSource, module: str, device: torch.device, *, bias: bool = False) -> CardLinear:
        """Raises DeviceError for a form that the card's kernels do not read."""
        own = source.tensor(f"{module}.bias").float().to(device) if bias else None
        return cls(upload([source.weight(module)], device), own)

    def few(self, x: Vectors, out: Tensor, launch: Launch) -> Tensor:
        """Of up to 8 rows, into `out`."""
        return matvec(x.of(self.matrix), self.matrix, out, launch, self.bias)

    def many(self, x: Tensor, launch: Launch) -> Tensor:
        """Of any number of rows: [T, in] -> float32 [T, out]."""
        out = matmul(x, self.matrix, new_output(x, self.matrix), launch)
        return out if self.bias is None else out.add_(self.bias)


class CardAttention:
    """One layer's attention with its weights."""

    def __init__(
        self, config: ModelConfig, source: WeightSource, layer: int, device: torch.device, launch: Launch
    ) -> None:
        module, bias = f"model.layers.{layer}.self_attn", config.attention_bias
        self._config = config
        self._launch = launch
        self._scale = softmax_scale(config)
        self._low: CardLinear | None = None
        if config.q_lora_rank is not None:
            self._low = CardLinear.of(source, f"{module}.q_a_proj", device, bias=bias)
            self._low_norm = source.tensor(f"{module}.q_a_layernorm.weight").float().to(device)
        self._query = CardLinear.of(source, f"{module}.{'q_proj' if self._low is None else 'q_b_proj'}", device)
        self._latent = CardLinear.of(source, f"{module}.kv_a_proj_with_mqa", device, bias=bias)
        self._latent_norm = source.tensor(f"{module}.kv_a_layernorm.weight").float().to(device)
        self._expand = upload([source.weight(f"{module}.kv_b_proj")], device)
        self._output = CardLinear.of(source, f"{module}.o_proj", device, bias=bias)

    def few(self, rows: RowBuffers, count: int, cache: Tensor, rotations: Tensor) -> None:
        """Absorbed: from `rows.normed` to `rows.delta`, the first `count` rows. `cache` holds the layer's latents as
        stored, [capacity, width]; `rotations` float32 [capacity, p]. The rows' places begin at `rows.start`."""
        config, launch, x = self._config, self._launch, rows.normed.first(count)
        nope, value = config.qk_nope_head_dim, config.v_head_dim
        query, latent = rows.query[:count], rows.latent[:count]
        if self._low is not None:
            self._low.few(x, rows.low[:count], launch)
            x_query = rows.low_normed.first(count)
            rms_norm(rows.low[:count], self._low_norm, LATENT_NORM_EPS, x_query.natural, x_query.octets)
        else:
            x_query = x
        self._query.few(x_query, query.flatten(1), launch)
        self._latent.few(x, latent, launch)
        store_latents(
            query, latent, self._latent_norm, rotations, rows.start, cache, nope=nope, epsilon=LATENT_NORM_EPS
        )
        fold_queries(query, self._expand, rows.folded[:count], launch, nope=nope, value=value)
        attend(
            rows.folded[:count], query, cache, rows.start, rows.workspace, rows.attended[:count], launch,
            nope=nope, scale=self._scale, octets=self._expand.octets,
        )  # fmt: skip
        values = rows.values[:count]
        wants_octets = self._output.matrix.octets
        unfold_values(rows.attended[:count], self._expand, values, launch, nope=nope, value=value, octets=wants_octets)
        self._output.few(Vectors(values, values), rows.delta[:count], launch)

    def many(self, x: Tensor, cache: Tensor, start: int, place: Tensor, rotations: Tensor) -> Tensor:
        """Naive, over expanded keys and values: x float32 [T, H] -> [T, H]. `place` is `start` on the device."""
        config, launch, tokens = self._config, self._launch, len(x)
        if self._low is None:
            query = self._query.many(x, launch)
        else:
            low = self._low.many(x, launch)
            query = self._query.many(rms_norm(low, self._low_norm, LATENT_NORM_EPS, torch.empty_like(low)), launch)
        query = query.view(tokens, config.num_attention_heads, config.qk_head_dim)
        store_latents(
            query, self._latent.many(x, launch), self._latent_norm, rotations, place, cache,
            nope=config.qk_nope_head_dim, epsilon=LATENT_NORM_EPS,
        )  # fmt: skip
        held = self._unpacked(cache[: start + tokens])
        out = torch.empty(tokens, config.num_attention_heads, config.v_head_dim, device=x.device)
        step = self._heads_at_a_time(len(held))
        for head in range(0, config.num_attention_heads, step):
            part = slice(head, head + step)
            keys, values = self._expanded(held, head, min(step, config.num_attention_heads - head))
            self._attend_heads(query[:, part].to(keys.dtype), keys, values, start, out[:, part])
        return self._output.many(out.flatten(1), launch)

    def _unpacked(self, rows: Tensor) -> Tensor:
        """Of an int8 cache, as it is multiplied; a piece at a time, since float32 has no room for a long context."""
        config = self._config
        if rows.dtype != torch.uint8:
            return rows
        held = torch.empty(len(rows), config.latent_width, dtype=self._launch.dot, device=rows.device)
        for start in range(0, len(rows), _UNPACKED_ROWS):
            part = slice(start, start + _UNPACKED_ROWS)
            held[part] = unpack_int8(rows[part], config.kv_lora_rank)
        return held

    def _expanded(self, held: Tensor, head: int, heads: int) -> tuple[Tensor, Tensor]:
        """Keys [S, h, n + p] and values [S, h, v] of some heads from `head` on."""
        config, launch = self._config, self._launch
        nope, value, rank = config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
        matrix = self._expand.rows(head * (nope + value), (head + heads) * (nope + value))
        both = matmul(held[:, :rank], matrix, new_output(held, matrix), launch).to(launch.dot)
        both = both.view(len(held), heads, nope + value)
        shared = held[:, None, rank:].to(launch.dot).expand(-1, heads, -1)  # [S, h, p]
        return torch.cat((both[..., :nope], shared), dim=2), both[..., nope:]

    def _attend_heads(self, query: Tensor, keys: Tensor, values: Tensor, start: int, out: Tensor) -> None:
        """Query [T, h, n + p], whose first row stands at `start`, to out [T, h, v]."""
        tokens, context = len(query), len(keys)
        step = max(16, SCORE_BYTES // (6 * context * query.shape[1]))
        for first in range(0, tokens, step):
            own = query[first : first + step]
            seen = start + first + len(own)
            visible = torch.ones(len(own), seen, dtype=torch.bool, device=query.device).tril_(start + first)
            with sdpa_kernel(_BACKENDS):
                attended = F.scaled_dot_product_attention(
                    own.transpose(0, 1)[None],
                    keys[:seen].transpose(0, 1)[None],
                    values[:seen].transpose(0, 1)[None],
                    attn_mask=visible,
                    scale=self._scale,
                )  # [1, h, T, v]
            out[first : first + step] = attended[0].transpose(0, 1)

    def _heads_at_a_time(self, context: int) -> int:
        config = self._config
        # expanded twice over (float32, then as it is multiplied) beside the keys
        a_head = context * (6 * (config.qk_nope_head_dim + config.v_head_dim) + 2 * config.qk_head_dim)
        return max(1, min(config.num_attention_heads, PREFILL_BYTES // a_head))
