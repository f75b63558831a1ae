"""The model of the tests of `scripts/train_demo`, and the words of its stories."""

from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_hidden_layers": 3, "num_attention_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 8, "n_group": 4, "num_experts_per_tok": 3,
    "trained_context": 32, "context": 128,
}  # fmt: skip
WORDS = ["goat", "drum", "river", "king", "boat", "tree", "child", "bird", "stone", "song"]
