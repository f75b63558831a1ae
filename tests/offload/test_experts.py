"""The expert store: the right sum, in an order that does not depend on the batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from localmoe.formats.weights import DenseWeight, Weight
from localmoe.kernels.dispatch import Kernels
from localmoe.kernels.experts import ExpertProducts
from localmoe.model.config import ModelConfig
from localmoe.offload.experts import ExpertStore

EXPERTS, HIDDEN, INTERMEDIATE, TOP = 12, 32, 16, 4


class Source:
    """Random experts by name; counts look-ups."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.looked_up: list[str] = []
        self.tensors = {
            f"model.layers.2.mlp.experts.{expert}.{part}": torch.randn(*shape, generator=generator) / 5
            for expert in range(EXPERTS)
            for part, shape in {
                "gate_proj": (INTERMEDIATE, HIDDEN),
                "up_proj": (INTERMEDIATE, HIDDEN),
                "down_proj": (HIDDEN, INTERMEDIATE),
            }.items()
        }

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def weight(self, module: str) -> Weight:
        self.looked_up.append(module)
        return DenseWeight(self.tensors[module])

    def __contains__(self, name: str) -> bool:
        return name in self.tensors


def batch(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP] for _ in range(count)])
    return torch.randn(count, HIDDEN, generator=generator), ids, torch.rand(count, TOP, generator=generator)


def layer_of(source: Source, kernels: Kernels | None = None) -> ExpertProducts:
    values: dict[str, Any] = {
        "model_type": "deepseek_v2", "vocab_size": 8, "hidden_size": HIDDEN, "intermediate_size": 8,
        "moe_intermediate_size": INTERMEDIATE, "num_hidden_layers": 3, "num_attention_heads": 2,
        "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
        "n_routed_experts": EXPERTS, "num_experts_per_tok": TOP, "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0, "max_position_embeddings": 16,
    }  # fmt: skip
    return ExpertStore(source, ModelConfig.from_dict(values), kernels or Kernels.choose("reference")).layer(2)


@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_the_sum_is_that_of_each_tokens_experts(count: int) -> None:
    source = Source()
    hidden, ids, weights = batch(count)
    found = layer_of(source)(hidden, ids, weights)
    wanted = torch.zeros(count, HIDDEN, dtype=torch.float64)
    for token, slot in itertools.product(range(count), range(TOP)):
        gate, up, down = (
            source.tensors[f"model.layers.2.mlp.experts.{int(ids[token, slot])}.{part}"].double()
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        x = hidden[token].double()
        wanted[token] += float(weights[token, slot]) * (down @ (F.silu(gate @ x) * (up @ x)))
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-5)


def test_experts_are_looked_up_when_they_first_fire_and_once() -> None:
    source = Source()
    experts = layer_of(source)
    assert source.looked_up == []
    ids, weights = torch.tensor([[3, 8, 0, 5]]), torch.ones(1, TOP)
    for _ in range(3):
        experts(torch.ones(1, HIDDEN), ids, weights)
    assert len(source.looked_up) == 3 * TOP
    assert {module.split(".")[5] for module in source.looked_up} == {"0", "3", "5", "8"}
