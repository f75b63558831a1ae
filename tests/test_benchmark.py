"""What `bench` counts, by hand; and the command on the demo."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
from typer.testing import CliRunner

from localmoe.benchmark import Benchmark, bytes_per_token
from localmoe.cli.app import app
from localmoe.cli.bench import _lines
from localmoe.cli.plan import Foreseen
from localmoe.model.config import ModelConfig

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 8,
    "moe_intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "routed_scaling_factor": 1.0,
    "max_position_embeddings": 64, "num_nextn_predict_layers": 1,
}  # fmt: skip


@dataclass
class Info:
    name: str
    nbytes: int


def test_a_token_reads_what_it_needs() -> None:
    tensors: Any = [
        Info("model.embed_tokens.weight", 1000),  # 10 rows: one is read
        Info("lm_head.weight", 700),
        Info("model.layers.0.mlp.up_proj.weight", 50),
        Info("model.layers.1.mlp.gate.weight", 6),
        *(Info(f"model.layers.1.mlp.experts.{i}.up_proj.weight", 40) for i in range(4)),  # 2 of 4
        Info("model.layers.1.mlp.shared_experts.up_proj.weight", 9),
        Info("model.layers.2.mlp.experts.0.up_proj.weight", 5000),  # the MTP layer
        Info("model.layers.2.eh_proj.weight", 3000),
    ]
    assert bytes_per_token(ModelConfig.from_dict(CONFIG), tensors) == 100 + 700 + 50 + 6 + 80 + 9
    packed = ("weight_packed", 400), ("weight_scale", 50), ("weight_shape", 16)
    tensors[:1] = [Info(f"model.embed_tokens.{suffix}", size) for suffix, size in packed]
    assert bytes_per_token(ModelConfig.from_dict(CONFIG), tensors) == 40 + 5 + 1 + 700 + 50 + 6 + 80 + 9
    tensors[:3] = [Info("model.embed_tokens.weight", 1000)]
    tied = ModelConfig.from_dict(CONFIG | {"tie_word_embeddings": True})
    assert bytes_per_token(tied, [info for info in tensors if info.name != "lm_head.weight"]) == 1000 + 145


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_bench_on_the_demo(kernels: str) -> None:
    arguments = ["bench", "demo:source", "-p", "20", "-n", "4", "--repeats", "2", "--context", "9", "--json"]
    outcome = CliRunner().invoke(app, [*arguments, "--kernels", kernels])
    assert outcome.exit_code == 0, outcome.output
    found = json.loads(outcome.stdout)
    assert (found["prompt_tokens"], found["completion_tokens"], found["context"]) == (20, 4, 9)
    for key in ("open_seconds", "first_token_seconds", "prefill_tokens_per_second", "decode_tokens_per_second"):
        assert found[key] > 0
    assert found["first_token_seconds"] > found["open_seconds"]
    assert {"attention", "router", "experts", "dense", "head", "sampling", "overhead"} == set(found["breakdown"])
    assert (found["read_bandwidth_bytes_per_second"] is None) == (kernels == "reference")
    assert found["disk_bytes_per_token"] is None or found["disk_bytes_per_token"] >= 0
    assert 0 < found["rss_anon_bytes"] <= found["peak_rss_bytes"]


def test_more_than_the_context_holds_is_refused() -> None:
    outcome = CliRunner().invoke(app, ["bench", "demo:source", "-p", "100000"])
    assert outcome.exit_code == 1


@pytest.mark.parametrize(("disk", "line"), [(None, False), (0, False), (5_000_000, False), (250_000_000, True)])
def test_what_comes_from_the_disk_is_said(disk: int | None, line: bool) -> None:
    result = Benchmark(
        "avx2",
        2,
        16,
        16,
        0,
        1.0,
        1.0,
        10.0,
        4.0,
        None,
        1_000_000_000,
        disk,
        None,
        1,
        None,
        {"experts": 450.0, "head": 50.0},
    )
    plan = Foreseen(1.0, 2.0, ("nothing is measured yet",))
    uneven = "500.00 ms on average, 250.00 the median: something held up some tokens"
    assert uneven in _lines("model", result, plan)
    assert uneven not in _lines("model", replace(result, decode_tokens_per_second=2.0), plan)
    said = "0.25 GB a token from the disk, at 0.50 GB/s; 2.00 tokens/s on average"
    assert (said in _lines("model", result, plan)) == line
    assert "\n          nothing is measured yet\n" in _lines("model", result, plan)
