"""Random models built by transformers, saved by it, and opened by us."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from localmoe.formats.checkpoint import Checkpoint
from localmoe.kernels.dispatch import Kernels
from localmoe.model.config import ModelConfig
from localmoe.model.deepseek import Model
from localmoe.model.kv_cache import LatentCache
from localmoe.model.mla import Path as AttentionPath
from localmoe.offload.experts import ExpertStore

# A tiny model with every part; tests change what they are about.
BASE: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
}


@dataclass(frozen=True)
class Opened:
    """A model on disk, opened by localmoe; `theirs` is transformers' one."""

    directory: Path
    checkpoint: Checkpoint
    config: ModelConfig
    theirs: PreTrainedModel

    def ours(self, path: AttentionPath | None = None, kernels: Kernels | None = None) -> Model:
        kernels = kernels or Kernels.choose("reference")
        store = ExpertStore(self.checkpoint, self.config, kernels)
        return Model(self.config, self.checkpoint, kernels, store.layer, path=path)

    def their_logits(self, token_ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.theirs(token_ids[None], use_cache=False).logits[0]
        return logits

    def cache(self, capacity: int = 512) -> LatentCache:
        return LatentCache(self.config, capacity)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def base_config() -> dict[str, Any]:
    return dict(BASE)


@pytest.fixture
def transformers_model(tmp_path: Path) -> Callable[..., Opened]:
    """Build `{**BASE, **changes}` with random weights, in transformers and, from its files, in localmoe."""

    def build(seed: int = 0, **changes: Any) -> Opened:
        wanted = {**BASE, **changes}
        theirs = _random_model(wanted, seed)
        directory = tmp_path / f"model-{seed}"
        theirs.save_pretrained(directory)
        checkpoint = Checkpoint.open(directory)
        config = ModelConfig.from_dict(wanted)
        # the other spelling of the same model must mean the same
        saved = json.loads((directory / "config.json").read_text())
        assert ModelConfig.from_dict({**saved, "model_type": wanted["model_type"]}) == config
        return Opened(directory, checkpoint, config, theirs)

    return build


def _random_model(wanted: dict[str, Any], seed: int) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    values = {key: value for key, value in wanted.items() if key != "model_type"}
    their_type = "deepseek_v3" if wanted["model_type"] == "kimi_k2" else wanted["model_type"]
    config = AutoConfig.for_model(their_type, **values)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.2)
            else:  # wide enough for peaked attention, decided routers and no near ties at the head
                parameter.normal_(0.0, 1.3 / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3)
    return model
