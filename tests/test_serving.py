"""What vLLM and SGLang load: their rules on our recipes and the published models' shapes, and each rule broken."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from localmoe import serving
from localmoe.serving import ENGINES, RULES, EngineSupport, Layout, support, tensor_parallel_problems
from quantize.recipes import RECIPES

CONFIGS = Path(__file__).parent / "configs"


def config_of(name: str, recipe: str = "balanced", group_size: int = 32) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    config["num_hidden_layers"] = min(config["num_hidden_layers"], 5)  # the others are like the last
    quantization = RECIPES[recipe].for_model(config).quantization_config(group_size).to_dict()
    return config | {"quantization_config": json.loads(json.dumps(quantization))}


def found(config: dict[str, Any]) -> dict[str, EngineSupport]:
    return {entry.engine: entry for entry in support(config, "/models/it")}


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("name", ["deepseek-v3"])
def test_balanced_v3_goes_on_sixteen_gpus_and_more(name: str, group_size: int) -> None:
    """Experts and the shared one are 2048 wide: 64 on each of 32, which only padded tiles and groups up to 64 allow."""
    for engine, entry in found(config_of(name, "balanced", group_size)).items():
        assert entry.problems == ()
        more = (32,) if engine == "vLLM" and group_size < 128 else ()
        assert entry.tensor_parallel == entry.tensor_parallel_whole_experts == (1, 2, 4, 8, 16, *more)
        assert entry.expert_parallel[-1] == 32  # 256 experts


def test_v2_lite_by_hand() -> None:
    """16 heads; experts 1408 = 11 x 128 wide; the dense layer's down_proj has 10944 = 85.5 x 128 columns and stays."""
    balanced = found(config_of("deepseek-v2-lite"))
    assert balanced["vLLM"].tensor_parallel == (1, 2, 4)  # 1408 / 8 = 176 is no multiple of 32
    assert balanced["vLLM"].tensor_parallel_whole_experts == (1, 2, 4, 8)  # the shared one's 2816 / 16 = 176 neither
    assert balanced["SGLang"].tensor_parallel_whole_experts == (1,)  # gate_proj: 10944 / 2 is no multiple of 64
    everything = config_of("deepseek-v2-lite")
    everything["quantization_config"]["ignore"].remove(r"re:.*\.mlp\.down_proj$")
    assert [problem.what for problem in found(everything)["SGLang"].problems] == [
        "down_proj has 10944 columns on each of 1 GPUs, not a multiple of 128"
    ]
    apart = found(config_of("deepseek-v2-lite", "experts-only"))
    assert apart["SGLang"].tensor_parallel == (1, 2)  # 1408 / 4 = 352 is no multiple of 64
    assert apart["vLLM"].tensor_parallel == (1, 2, 4)  # but of 32
    assert apart["SGLang"].tensor_parallel_whole_experts == (1, 2, 4, 8, 16)
    assert found(config_of("deepseek-v2-lite", "experts-only", 128))["vLLM"].tensor_parallel == (1,)


def test_what_our_other_recipes_give_up() -> None:
    for recipe in ("local", "compact", "smallest", "int8"):
        packed = found(config_of("deepseek-v3", recipe))
        ends = {"unquantized head", "unquantized embedding"}
        assert {problem.rule for problem in packed["vLLM"].problems} == ends
        assert {problem.rule for problem in packed["SGLang"].problems} == ends | {"unquantized kv_b_proj"}
        assert all(entry.commands == () for entry in packed.values())
    nf4 = found(config_of("deepseek-v3", "nf4"))
    assert {problem.rule for entry in nf4.values() for problem in entry.problems} == {"method"}
    assert all(entry.commands == () for entry in nf4.values())


def test_an_unquantized_source_is_served_too() -> None:
    config = config_of("deepseek-v3")
    del config["quantization_config"]
    assert found(config)["vLLM"].tensor_parallel == (1, 2, 4, 8, 16, 32)


def broken(what: str) -> dict[str, Any]:
    config = deepcopy(config_of("deepseek-v3"))
    quantization = config["quantization_config"]
    *_, linear = quantization["config_groups"].values()
    if what == "one scheme for all experts":
        quantization["ignore"].append(r"re:.*\.mlp\.experts\.\d+\.down_proj$")
    elif what == "the experts' group":
        linear["targets"] = [r"re:.*\.mlp\.experts\.\d+\.(gate|up|down)_proj$"]
    elif what == "merged linears":
        quantization["ignore"].append(r"re:.*kv_a_proj_with_mqa$")
    return config


@pytest.mark.parametrize(
    ("rule", "engines"),
    [
        ("one scheme for all experts", set(ENGINES)),
        ("the experts' group", {"SGLang"}),
        ("merged linears", set(ENGINES)),
    ],
)
def test_rules_of_the_schemes(rule: str, engines: set[str]) -> None:
    problems = [problem for entry in found(broken(rule)).values() for problem in entry.problems]
    assert {problem.engine for problem in problems if problem.rule == rule} == engines


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [("symmetric", False, "symmetric"), ("actorder", "group", "no act-order"), ("group_size", 256, "group size")],
)
def test_rules_of_what_localmoe_itself_would_not_open(
    field: str, value: object, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(config_of("deepseek-v3"))
    *_, linear = layout.raw["config_groups"].values()
    linear["weights"][field] = value
    assert {problem.rule for check in RULES for problem in check(layout)} == {rule}


def test_every_rule_names_a_file_of_the_engine() -> None:
    configs = [broken("one scheme for all experts"), broken("the experts' group"), broken("merged linears")]
    configs += [config_of("deepseek-v2-lite"), config_of("deepseek-v3", "nf4"), config_of("deepseek-v3", "compact")]
    problems = [problem for config in configs for entry in found(config).values() for problem in entry.problems]
    assert len({problem.rule for problem in problems}) >= 6
    assert all(re.match(r"(vllm|sglang)/[\w/]+\.py(: \w+)?$", problem.source) for problem in problems)


def test_heads_and_mlps_must_be_shared_out_evenly() -> None:
    layout = Layout(config_of("glm-4.7-flash"))  # 20 heads
    what = [what for what, _ in tensor_parallel_problems(layout, 8, True, padded=True)]
    assert "20 attention heads are not a multiple of 8" in what
    assert found(config_of("glm-4.7-flash"))["vLLM"].tensor_parallel == (1, 2, 4)


def test_the_commands() -> None:
    config = config_of("deepseek-v3")
    vllm, sglang = support(config, "/my models/v3")
    assert dict(vllm.commands)["one node, 8 GPUs"] == (
        "vllm serve '/my models/v3' --tensor-parallel-size 8 --enable-expert-parallel",
    )
    ray = next(lines for purpose, lines in vllm.commands if "Ray" in purpose)
    assert ray[0].startswith("ray start --head")
    assert "--tensor-parallel-size 8 --pipeline-parallel-size 2 --enable-expert-parallel" in ray[-1]
    assert "--distributed-executor-backend ray" in ray[-1]
    assert dict(sglang.commands)["one node, 8 GPUs"] == (
        "python -m sglang.launch_server --model-path '/my models/v3' --tp-size 8 --ep-size 8",
    )
    first, second = dict(sglang.commands)["two nodes of 8 GPUs"]
    assert "--tp-size 16 --ep-size 16 --nnodes 2 --dist-init-addr FIRST_NODE:20000 --node-rank 0" in first
    assert "--node-rank 1" in second


def test_torch_is_not_needed() -> None:
    import subprocess
    import sys

    code = "import sys; import localmoe.serving; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert serving.ENGINES == ("vLLM", "SGLang")
