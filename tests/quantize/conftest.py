"""A miniature checkpoint of DeepSeek-V3's module names, written with the safetensors library and not our writer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import localmoe

DEMO = Path(localmoe.__file__).parent / "data" / "demo"

MakeSource = Callable[..., Path]

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 96, "hidden_size": 160,
    "intermediate_size": 288, "moe_intermediate_size": 96, "num_hidden_layers": 2, "num_nextn_predict_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5, "kv_lora_rank": 32,
    "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_scaling": None, "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
}  # fmt: skip


def matrices() -> dict[str, tuple[int, int]]:
    """Names and shapes of everything that DeepSeek ships in FP8."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        attention = {"q_a_proj": (64, 160), "q_b_proj": (128, 64), "kv_a_proj_with_mqa": (48, 160)}
        attention |= {"kv_b_proj": (192, 32), "o_proj": (160, 128)}
        shapes |= {f"{prefix}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        experts = ["mlp.shared_experts", *(f"mlp.experts.{expert}" for expert in range(4))]
        for module in experts if layer else ["mlp"]:
            width = 96 if layer else 288
            shapes[f"{prefix}.{module}.gate_proj.weight"] = (width, 160)
            shapes[f"{prefix}.{module}.up_proj.weight"] = (width, 160)
            shapes[f"{prefix}.{module}.down_proj.weight"] = (160, width)
    return shapes


def plain_tensors(generator: torch.Generator) -> dict[str, Tensor]:
    """Everything that is never quantized at the source."""
    normal = lambda *shape: (torch.randn(*shape, generator=generator) * 0.1).bfloat16()  # noqa: E731
    tensors = {"model.embed_tokens.weight": normal(96, 160), "lm_head.weight": normal(96, 160)}
    tensors["model.norm.weight"] = normal(160) + 1
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        widths = {"input_layernorm": 160, "post_attention_layernorm": 160}
        widths |= {"self_attn.q_a_layernorm": 64, "self_attn.kv_a_layernorm": 32}
        tensors |= {f"{prefix}.{name}.weight": normal(width) + 1 for name, width in widths.items()}
        if layer:
            tensors[f"{prefix}.mlp.gate.weight"] = normal(4, 160)
            bias = torch.randn(4, generator=generator)
            tensors[f"{prefix}.mlp.gate.e_score_correction_bias"] = bias
    tensors |= {f"model.layers.2.{name}.weight": normal(160) + 1 for name in ("enorm", "hnorm", "shared_head.norm")}
    tensors["model.layers.2.eh_proj.weight"] = normal(160, 320)
    tensors["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return tensors


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values and one factor a 128 x 128 block, a block at a time."""
    rows, columns = weight.shape
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scale[i, j] = weight[block].abs().max() / 448
            values[block] = (weight[block] / scale[i, j]).to(torch.float8_e4m3fn)
    return values, scale


@pytest.fixture
def make_source(tmp_path: Path) -> MakeSource:
    """make_source(name, dtype, change=function of the tensors, shards=1, **config) -> directory."""

    def make(
        name: str = "source",
        dtype: str = "bf16",
        change: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
        shards: int = 1,
        seed: int = 0,
        **config: object,
    ) -> Path:
        generator = torch.Generator().manual_seed(seed)
        tensors = plain_tensors(generator)
        settings: dict[str, object] = CONFIG | config
        for weight_name, shape in matrices().items():
            weight = torch.randn(shape, generator=generator) * 0.05
            if dtype == "fp8":
                tensors[weight_name], tensors[f"{weight_name}_scale_inv"] = to_fp8(weight)
            else:
                tensors[weight_name] = weight.to(
                    {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
                )
        if dtype == "fp8":
            fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
            settings = {"quantization_config": fp8} | settings
        change(tensors)
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(settings))
        (directory / "tokenizer.json").write_text('{"not": "read here"}')
        (directory / "modeling_deepseek.py").write_text("raise SystemExit")
        if shards == 1:
            save_file(tensors, directory / "model.safetensors")
            return directory
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = dict(sorted(tensors.items())[shard::shards])
            save_file(part, directory / file)
            weight_map |= dict.fromkeys(part, file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return directory

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # these matrices are small, and threads that wait for each other dislike a busy machine


@pytest.fixture(scope="session")
def demo() -> Path:
    return DEMO


@pytest.fixture(scope="session")
def demo_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """demo_artifacts(recipe, grid="mse") -> directory; each is made once a session."""
    from quantize.pipeline import quantize

    root = tmp_path_factory.mktemp("demo")

    def artifact(recipe: str, grid: str = "mse") -> Path:
        directory = root / f"{recipe}-{grid}"
        if not directory.exists():
            quantize(DEMO, directory, recipe, grid=grid)  # type: ignore[arg-type]
        return directory

    return artifact
