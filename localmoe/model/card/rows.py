"""What a pass of a few rows works in: made once, for every layer and every token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.kernels.triton.launch import Launch
from localmoe.kernels.triton.mla_decode import DecodeWorkspace, new_workspace
from localmoe.kernels.triton.weights import DeviceMatrix
from localmoe.model.config import ModelConfig

MOST_ROWS = 8
"""Rows of a pass that are computed each as if alone."""


@dataclass(frozen=True)
class Vectors:
    """Hidden states [T, d] twice, since a matrix of quantized words wants them in octets."""

    natural: Tensor
    octets: Tensor

    def of(self, matrix: DeviceMatrix) -> Tensor:
        """Those that `matrix` wants."""
        return self.octets if matrix.octets else self.natural

    def first(self, count: int) -> Vectors:
        """The first rows."""
        return Vectors(self.natural[:count], self.octets[:count])


class RowBuffers:
    """Float32 unless said otherwise; row t is token t's. `start` int32 [1] is the first row's place."""

    def __init__(self, config: ModelConfig, device: torch.device, launch: Launch) -> None:
        def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(MOST_ROWS, *shape, dtype=dtype, device=device)

        heads, hidden, rank = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
        low = config.q_lora_rank or 8
        k, inner = max(config.num_experts_per_tok, 1), max(config.moe_intermediate_size, 8)
        self.start = torch.zeros(1, dtype=torch.int32, device=device)
        self.stream = room(hidden)  # the residual stream
        self.delta = room(hidden)  # what the last part adds to it
        self.normed = Vectors(room(hidden), room(hidden))
        self.low = room(low)
        self.low_normed = Vectors(room(low), room(low))
        self.query = room(heads, config.qk_head_dim)
        self.latent = room(config.latent_width)
        self.folded = room(heads, rank)
        self.attended = room(heads, rank)
        self.values = room(heads * config.v_head_dim)
        self.router_logits = room(max(config.n_routed_experts, 1))
        self.expert_ids = room(k, dtype=torch.int32)
        self.expert_weights = room(k)
        widest = max(config.intermediate_size, inner * max(config.n_shared_experts, 1))
        self.inner = torch.zeros(MOST_ROWS * max(k * inner, widest), device=device)
        self.no_ids = room(1, dtype=torch.int32)
        self.ones = room(1) + 1.0
        self.states = Vectors(room(hidden), room(hidden))
        self.logits = room(config.vocab_size)
        self.workspace: DecodeWorkspace = new_workspace(MOST_ROWS, heads, rank, launch, device)

    def inner_rows(self, rows: int, width: int) -> Tensor:
        """Room for activations between an MLP's matrices: [rows, width]."""
        return self.inner[: rows * width].view(rows, width)
