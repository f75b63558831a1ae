import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from localmoe.errors import CheckpointError, UnsupportedModelError, UsageError
from localmoe.formats.checkpoint import Checkpoint
from quantize.pipeline import quantize
from quantize.sources import SourceReader, open_source

GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"


def e4m3_table() -> np.ndarray:
    """The 256 values of float8 e4m3 (OCP 8-bit floating point specification, section 5.2), from their bits."""
    table = np.empty(256, dtype=np.float32)
    for code in range(256):
        exponent, mantissa = (code >> 3) & 15, code & 7
        size = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        table[code] = -size if code & 128 else size
    table[0x7F] = table[0xFF] = np.nan
    return table


def block_by_block(values: Tensor, scale: Tensor) -> np.ndarray:
    """An independent FP8 dequantization: bits through a table, one block after another."""
    numbers = e4m3_table()[values.view(torch.uint8).numpy()]
    result = np.empty_like(numbers)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            result[block] = numbers[block] * scale[i, j].numpy()
    return result


def rows_of(directory: Path, name: str, slab_bytes: int) -> Tensor:
    with open_source(directory) as checkpoint, SourceReader(checkpoint, slab_bytes) as reader:
        return torch.cat([slab.rows for slab in reader.matrix(name)])


def test_every_fp8_matrix_of_the_demo_equals_block_by_block_exactly(demo: Path) -> None:
    count = edges = 0
    with open_source(demo) as checkpoint, SourceReader(checkpoint, 128 * 256) as reader:
        for name, info in checkpoint.tensors.items():
            if info.dtype != torch.float8_e4m3fn:
                continue
            expected = block_by_block(checkpoint.read(name), checkpoint.read(f"{name}_scale_inv"))
            found = torch.cat([slab.rows for slab in reader.matrix(name)])
            assert np.array_equal(found.numpy(), expected), name
            count += 1
            edges += info.shape[0] % 128 != 0 or info.shape[1] % 128 != 0
    assert (count, edges) == (288, 6)


@pytest.mark.parametrize("slab_bytes", [1, 128 * 160, 1 << 20])
def test_fp8_edge_blocks_in_slabs_of_any_size(make_source: Callable[..., Path], slab_bytes: int) -> None:
    source = make_source(dtype="fp8")
    name = "model.layers.0.mlp.gate_proj.weight"  # [288, 160]: edges below and to the right
    with Checkpoint.open(source) as checkpoint:
        expected = block_by_block(checkpoint.read(name), checkpoint.read(f"{name}_scale_inv"))
    assert np.array_equal(rows_of(source, name, slab_bytes).numpy(), expected)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_plain_dtypes_come_as_they_are(make_source: Callable[..., Path], dtype: str) -> None:
    source = make_source(dtype=dtype)
    with Checkpoint.open(source) as checkpoint:
        assert torch.equal(rows_of(source, GATE, 1000), checkpoint.read(GATE).float())


def refused(source: Path, tmp_path: Path) -> str:
    """The message of the CheckpointError that quantizing gives; nothing may be left of the output."""
    with pytest.raises(CheckpointError) as caught:
        quantize(source, tmp_path / "output", "balanced")
    assert not (tmp_path / "output").exists()
    return str(caught.value)


def test_missing_scale(make_source: Callable[..., Path], tmp_path: Path) -> None:
    source = make_source(dtype="fp8", change=lambda tensors: tensors.pop(f"{GATE}_scale_inv"))
    assert f"{GATE}_scale_inv is missing" in refused(source, tmp_path)


def test_scale_without_weight(make_source: Callable[..., Path], tmp_path: Path) -> None:
    source = make_source(dtype="fp8", change=lambda tensors: tensors.pop(GATE))
    assert f"{GATE}_scale_inv" in refused(source, tmp_path)


def test_misshapen_scale(make_source: Callable[..., Path], tmp_path: Path) -> None:
    source = make_source(dtype="fp8", change=lambda tensors: tensors.update({f"{GATE}_scale_inv": torch.ones(2, 2)}))
    assert f"{GATE}_scale_inv is torch.float32 [2, 2]; float32 [1, 2] is needed" in refused(source, tmp_path)


def test_fp8_without_a_config_for_it(make_source: Callable[..., Path], tmp_path: Path) -> None:
    source = make_source(dtype="fp8")
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    assert "no fp8 quantization_config" in refused(source, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [GATE, "model.norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"])
def test_not_finite(make_source: Callable[..., Path], tmp_path: Path, name: str, value: float) -> None:
    source = make_source(change=lambda tensors: tensors[name].view(-1)[3:].fill_(value))
    assert f"{name} has NaN or infinite values" in refused(source, tmp_path)


def test_nan_among_fp8_codes(make_source: Callable[..., Path], tmp_path: Path) -> None:
    source = make_source(dtype="fp8", change=lambda tensors: tensors[GATE].view(torch.uint8)[5, 7].fill_(0x7F))
    assert f"{GATE} has NaN" in refused(source, tmp_path)


def test_values_too_large_for_weights(make_source: Callable[..., Path], tmp_path: Path) -> None:
    source = make_source(change=lambda tensors: tensors[GATE].mul_(1e30))
    assert f"{GATE} has values too large" in refused(source, tmp_path)


def test_integers_where_weights_should_be(make_source: Callable[..., Path], tmp_path: Path) -> None:
    source = make_source(change=lambda tensors: tensors.update({GATE: tensors[GATE].to(torch.int8)}))
    assert f"{GATE} should be a matrix of floats" in refused(source, tmp_path)


def test_truncated_shard(make_source: Callable[..., Path], tmp_path: Path) -> None:
    source = make_source()
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "model.safetensors" in refused(source, tmp_path)


def test_quantized_sources_are_refused(make_source: Callable[..., Path], tmp_path: Path) -> None:
    quantize(make_source(), tmp_path / "first", "balanced")
    with pytest.raises(UsageError, match=r"quantized already \(compressed-tensors, int4, int8\)"):
        quantize(tmp_path / "first", tmp_path / "second", "balanced")
    with pytest.raises(UnsupportedModelError, match=r"quantization_config\.bits is 'None'"):
        quantize(make_source("gptq", quantization_config={"quant_method": "gptq"}), tmp_path / "second", "balanced")
    assert not (tmp_path / "second").exists()


def test_equal_compares_bits(make_source: Callable[..., Path]) -> None:
    source = make_source(change=lambda tensors: tensors["model.layers.2.embed_tokens.weight"][-1, -1].add_(1))
    with open_source(source) as checkpoint, SourceReader(checkpoint, 1000) as reader:
        assert reader.equal("lm_head.weight", "model.layers.2.shared_head.head.weight")
        assert not reader.equal("model.embed_tokens.weight", "model.layers.2.embed_tokens.weight")
        assert not reader.equal("model.embed_tokens.weight", "model.norm.weight")
