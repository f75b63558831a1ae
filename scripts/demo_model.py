"""DeepSeek-V3 for training, in plain torch and small: what scripts/train_demo trains.

The maths is the technical report's (arXiv 2412.19437: MLA 2.1.1, MoE with bias-balanced routing 2.1.2, multi-token
prediction 2.2) and names are the checkpoint's, so that an export is a renaming. Each projection is a plain matrix
[out, in]; the experts of a layer are stacked. Inference is localmoe's; nothing here is used by it.

Letters: B sequences, L tokens a sequence, T = B L, D hidden size, E experts, K experts a token, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes, as config.json names them. Every input of a quantized matrix is a multiple of 128."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 640
    moe_intermediate_size: int = 128
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    n_routed_experts: int = 16
    n_group: int = 4
    topk_group: int = 2
    num_experts_per_tok: int = 4
    routed_scaling_factor: float = 1.5
    first_k_dense_replace: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    trained_context: int = 1024
    context: int = 4096

    @property
    def rope_factor(self) -> float:
        return self.context / self.trained_context


@dataclass(frozen=True)
class Rope:
    """Rotations of positions 0 to L - 1, and what attention's scores are multiplied by."""

    cos: Tensor  # [L, rope / 2]
    sin: Tensor
    score_scale: float


def rope(shape: Shape, length: int, *, extended: bool, device: torch.device) -> Rope:
    """Plain rotary positions, or with `extended` YaRN's (arXiv 2309.00071, as in DeepSeek-V3's modeling file:
    beta_fast 32, beta_slow 1, mscale = mscale_all_dim = 1, so that cos and sin stay unscaled)."""
    size = shape.qk_rope_head_dim
    frequency = shape.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)  # [rope / 2]
    score_scale = (shape.qk_nope_head_dim + size) ** -0.5
    if extended:

        def dimension(rotations: float) -> float:
            """The dimension that turns so often within the trained context."""
            turns = shape.trained_context / (rotations * 2 * math.pi)
            return size * math.log(turns) / (2 * math.log(shape.rope_theta))

        low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), size - 1)
        ramp = ((torch.arange(size // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        frequency = frequency * (1 - ramp) + frequency / shape.rope_factor * ramp
        score_scale *= (0.1 * math.log(shape.rope_factor) + 1) ** 2
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return Rope(angle.cos().float().to(device), angle.sin().float().to(device), score_scale)


def rotate(x: Tensor, by: Rope) -> Tensor:
    """[B, H, L, rope] with each pair (2i, 2i + 1) turned; pairs lie apart afterwards, in queries and keys alike."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * by.cos - odd * by.sin, odd * by.cos + even * by.sin), dim=-1)


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def matrix(*size: int, zero: bool = False) -> nn.Parameter:
    """[..., out, in]; what writes into the residual stream begins at zero, so that training begins as if empty."""
    return nn.Parameter(torch.zeros(size) if zero else torch.randn(size) * 0.5 * size[-1] ** -0.5)


class Looking:
    """How well heads attend to `places`, bool [B, L, L] by token: what they give the rest, in nats."""

    def __init__(self, places: Tensor) -> None:
        self._some = places.any(-1)
        self._right = places[self._some]  # [R, L]
        self._future = torch.ones_like(places[0]).triu(1)
        self._losses: list[Tensor] = []

    def add(self, scores: Tensor) -> None:
        """Of one head, before the softmax, [B, L, L]; the mean over tokens that have a place, 0 where none has."""
        scores = scores.masked_fill(self._future, -torch.inf)[self._some]  # [R, L]
        missed = scores.logsumexp(-1) - scores.masked_fill(~self._right, -torch.inf).logsumexp(-1)
        self._losses.append(missed.sum() / max(len(missed), 1))

    @property
    def loss(self) -> Tensor:
        """The mean over the heads."""
        return torch.stack(self._losses).mean()


class Attention(nn.Module):
    """Multi-head latent attention, unabsorbed."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, s = shape, shape
        self.q_a_proj = matrix(s.q_lora_rank, s.hidden_size)
        self.q_a_layernorm = Norm(s.q_lora_rank, s.rms_norm_eps)
        self.q_b_proj = matrix(s.num_attention_heads * (s.qk_nope_head_dim + s.qk_rope_head_dim), s.q_lora_rank)
        self.kv_a_proj_with_mqa = matrix(s.kv_lora_rank + s.qk_rope_head_dim, s.hidden_size)
        self.kv_a_layernorm = Norm(s.kv_lora_rank, s.rms_norm_eps)
        self.kv_b_proj = matrix(s.num_attention_heads * (s.qk_nope_head_dim + s.v_head_dim), s.kv_lora_rank)
        self.o_proj = matrix(s.hidden_size, s.num_attention_heads * s.v_head_dim, zero=True)

    def forward(self, x: Tensor, by: Rope, looking: Looking | None = None) -> Tensor:
        """`looking` is told where the first head looks."""
        s, (batch, length, _) = self.shape, x.shape
        heads = s.num_attention_heads
        q = F.linear(self.q_a_layernorm(F.linear(x, self.q_a_proj)), self.q_b_proj)
        q = q.view(batch, length, heads, -1).transpose(1, 2)  # [B, H, L, nope + rope]
        q_nope, q_pe = q.split([s.qk_nope_head_dim, s.qk_rope_head_dim], dim=-1)
        latent, k_pe = F.linear(x, self.kv_a_proj_with_mqa).split([s.kv_lora_rank, s.qk_rope_head_dim], dim=-1)
        k_pe = rotate(k_pe[:, None], by).expand(-1, heads, -1, -1)  # [B, H, L, rope]
        kv = F.linear(self.kv_a_layernorm(latent), self.kv_b_proj).view(batch, length, heads, -1).transpose(1, 2)
        k_nope, v = kv.split([s.qk_nope_head_dim, s.v_head_dim], dim=-1)
        q, k = torch.cat((q_nope, rotate(q_pe, by)), dim=-1), torch.cat((k_nope, k_pe), dim=-1)
        if looking is not None:
            looking.add(q[:, 0] @ k[:, 0].mT * by.score_scale)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=by.score_scale)  # [B, H, L, v]
        return F.linear(out.transpose(1, 2).reshape(batch, length, -1), self.o_proj)


def copies(ids: Tensor, learned: Tensor, most: int = 6) -> Tensor:
    """ids [B, L + 1] -> bool [B, L, L]: for each token, where the one that comes next stands already. Only where it
    is learned and stands in `most` places at most: what is everywhere need not be copied."""
    following = ids[:, 1:]
    same = (following[:, :, None] == ids[:, None, :-1]).tril()  # [B, L, L]
    places = same.sum(-1)
    return same & ((places > 0) & (places <= most) & learned[:, 1:])[..., None]


class Mlp(nn.Module):
    """SwiGLU; gate and up as one matrix."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up = matrix(2, inner, hidden)
        self.down_proj = matrix(hidden, inner, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate_up, self.down_proj)


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up.flatten(0, 1)).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


class Experts(nn.Module):
    """Routed experts and the shared one. Routing as DeepSeek-V3's `noaux_tc`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, s = shape, shape
        self.router = nn.Parameter(torch.randn(s.n_routed_experts, s.hidden_size) * 0.02)
        self.register_buffer("correction_bias", torch.zeros(s.n_routed_experts))
        self.register_buffer("load", torch.zeros(s.n_routed_experts))  # tokens since the last balancing
        self.gate_up = matrix(s.n_routed_experts, 2, s.moe_intermediate_size, s.hidden_size)
        self.down_proj = matrix(s.n_routed_experts, s.hidden_size, s.moe_intermediate_size, zero=True)
        self.shared = Mlp(s.hidden_size, s.moe_intermediate_size)
        self.correction_bias: Tensor
        self.load: Tensor

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, D] -> experts [T, K] and their weights [T, K]."""
        s = self.shape
        scores = F.linear(x.float(), self.router.float()).sigmoid()  # [T, E]
        with torch.no_grad():
            biased = (scores + self.correction_bias).view(len(x), s.n_group, -1)
            group = biased.topk(2, dim=-1).values.sum(-1).topk(s.topk_group, dim=-1).indices  # [T, topk_group]
            outside = torch.ones(len(x), s.n_group, dtype=torch.bool, device=x.device).scatter_(1, group, False)
            biased = biased.masked_fill(outside[..., None], -torch.inf).flatten(1)
            chosen = biased.topk(s.num_experts_per_tok, dim=-1).indices  # [T, K]
        weights = scores.gather(1, chosen)
        return chosen, weights / (weights.sum(-1, keepdim=True) + 1e-20) * s.routed_scaling_factor

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.flatten(0, 1)  # [T, D]
        chosen, weights = self.route(x)
        by_expert = chosen.flatten().argsort(stable=True)  # pairs of token and expert, expert by expert
        counts = torch.bincount(chosen.flatten(), minlength=len(self.load))
        self.load += counts
        token = by_expert // chosen.shape[1]
        parts = x[token].split(counts.tolist())
        experts = zip(parts, self.gate_up.unbind(), self.down_proj.unbind(), strict=True)
        out = torch.cat([swiglu(part, gate_up, down) for part, gate_up, down in experts])
        out = out * weights.flatten()[by_expert, None].to(out.dtype)
        return (self.shared(x).index_add(0, token, out.to(x.dtype))).view_as(hidden)

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        """Moves the bias of each expert by `speed` towards an even load (2.1.2), and begins to count anew."""
        self.correction_bias += speed * (self.load.mean() - self.load).sign()
        self.load.zero_()


class Layer(nn.Module):
    def __init__(self, shape: Shape, *, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = Mlp(shape.hidden_size, shape.intermediate_size) if dense else Experts(shape)

    def forward(self, x: Tensor, by: Rope, looking: Looking | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), by, looking)
        return x + self.mlp(self.post_attention_layernorm(x))


class Mtp(nn.Module):
    """The multi-token-prediction layer: a state and the next token -> a state for the token after that.

    It reads the main model's state after its final norm, and `eh_proj` takes the embedding first, as R1's modeling
    file does.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.enorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.hnorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.eh_proj = matrix(shape.hidden_size, 2 * shape.hidden_size)
        self.layer = Layer(shape, dense=False)
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, state: Tensor, embedding: Tensor, by: Rope) -> Tensor:
        x = F.linear(torch.cat((self.enorm(embedding), self.hnorm(state)), dim=-1), self.eh_proj)
        return self.norm(self.layer(x, by))


class Model(nn.Module):
    COPYING = 2  # layers with a head that is told where to look

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Parameter(torch.randn(shape.vocab_size, shape.hidden_size) * 0.1)
        self.layers = nn.ModuleList(
            Layer(shape, dense=i < shape.first_k_dense_replace) for i in range(shape.num_hidden_layers)
        )
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = nn.Parameter(torch.zeros(shape.vocab_size, shape.hidden_size))
        self.mtp = Mtp(shape)

    def states(self, ids: Tensor, by: Rope, looking: Looking | None = None) -> Tensor:
        """ids [B, L] -> states [B, L, D] after the final norm. `looking` is told where a head of each of the last
        `COPYING` layers looks."""
        x = F.embedding(ids, self.embed_tokens)
        first = len(self.layers) - self.COPYING
        for number, layer in enumerate(self.layers):
            x = layer(x, by, looking if number >= first else None)
        return self.norm(x)

    def losses(self, ids: Tensor, by: Rope, *, mtp_share: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """ids [B, L + 2] -> mean losses in nats of the next token, of the one after it by the MTP layer, and of where
        the heads that copy look.

        Tokens given as `~id` are read, not learned (`demo_sequences.Mixture`: what a user says). The MTP layer sees the
        first `mtp_share` of the sequences: it learns enough from them, and costs a third.

        Small models are slow to find out that what stands in the context comes again (induction heads, Olsson et al.,
        arXiv 2209.11895): after 20 million tokens this one still had not, so that its stories forgot what they were
        about. So one head of each of the last two layers is told where to look.
        """
        learned, ids = ids >= 0, torch.where(ids < 0, ~ids, ids)
        looking = Looking(copies(ids[:, :-1], learned[:, :-1]))
        states = self.states(ids[:, :-2], by, looking)  # [B, L, D]
        main = HeadLoss.apply(states[learned[:, 1:-1]], self.lm_head, ids[:, 1:-1][learned[:, 1:-1]])
        few = max(round(len(ids) * mtp_share), 1)
        embedding = F.embedding(ids[:few, 1:-1], self.embed_tokens)
        guess, second = self.mtp(states[:few], embedding, by), learned[:few, 2:]
        return main, HeadLoss.apply(guess[second], self.lm_head, ids[:few, 2:][second]), looking.loss

    def experts(self) -> list[Experts]:
        return [module for module in self.modules() if isinstance(module, Experts)]


class HeadLoss(torch.autograd.Function):
    """Head and cross-entropy at once, some rows a time: logits of a whole batch never exist, and each is made once."""

    ROWS = 512

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        """[T, D], [V, D], [T] -> mean loss."""
        head_gradient = torch.zeros_like(head, dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), HeadLoss.ROWS):
            rows = slice(start, start + HeadLoss.ROWS)
            logits = (hidden[rows] @ head.to(hidden.dtype).T).float()  # [R, V]
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            right = target[rows, None]
            total += (log_sum - logits.gather(1, right)).sum()
            wrong = logits.sub_(log_sum).exp_()
            wrong.scatter_add_(1, right, torch.full_like(log_sum, -1.0))
            wrong = wrong.to(hidden.dtype)
            hidden_gradient[rows] = wrong @ head.to(hidden.dtype)
            head_gradient.addmm_(wrong.T, hidden[rows])
        ctx.save_for_backward(hidden_gradient, head_gradient)
        return total / max(len(hidden), 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def, override]
        hidden_gradient, head_gradient = ctx.saved_tensors
        scale = gradient / max(len(hidden_gradient), 1)
        return hidden_gradient * scale.to(hidden_gradient.dtype), head_gradient * scale, None
