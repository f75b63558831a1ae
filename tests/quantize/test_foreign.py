"""Checkpoints that others packed, built here word by word: the same numbers in our layout, or a refusal by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import localmoe
from localmoe.errors import CheckpointError, LocalMoeError, UnsupportedModelError, UsageError
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.weights import Int4Weight, Int8Weight, dequantize
from localmoe.model.config import ModelConfig
from localmoe.model.shapes import check_checkpoint
from quantize.foreign import form_of
from quantize.pipeline import quantize

MakeSource = Callable[..., Path]
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # AWQ: column c of eight lies in this nibble of its word


class Matrix:
    """u, z and s of w = (u - z) s, chosen here; `zeros` are drawn from, `wide` lets u - z reach as far as it can."""

    def __init__(self, rows: int, columns: int, group: int, bits: int, zeros: tuple[int, ...], seed: int) -> None:
        dice = np.random.default_rng(seed)
        self.bits, self.group = bits, group if group > 0 else columns
        groups = columns // self.group
        self.z = dice.choice(zeros, size=(rows, groups)).astype(np.int64)
        self.u = dice.integers(0, 1 << bits, size=(rows, columns))
        scales = torch.from_numpy(dice.uniform(0.004, 0.02, size=(rows, groups))).bfloat16()
        self.s = scales.float().numpy()

    def truth(self) -> Tensor:
        difference = self.u - np.repeat(self.z, self.group, axis=1)
        return torch.from_numpy(difference.astype(np.float32) * np.repeat(self.s, self.group, axis=1))


def words(lanes: np.ndarray, bits: int) -> Tensor:
    """[n, m] unsigned -> int32 [n, m * bits / 32], the first in the lowest bits."""
    per = 32 // bits
    total = np.zeros((lanes.shape[0], lanes.shape[1] // per), np.uint64)
    for lane in range(per):
        total |= lanes[:, lane::per].astype(np.uint64) << np.uint64(bits * lane)
    return torch.from_numpy(total.astype(np.uint32).view(np.int32).copy())


def awq_words(lanes: np.ndarray) -> Tensor:
    total = np.zeros((lanes.shape[0], lanes.shape[1] // 8), np.uint64)
    for column, nibble in enumerate(NIBBLES):
        total |= lanes[:, column::8].astype(np.uint64) << np.uint64(4 * nibble)
    return torch.from_numpy(total.astype(np.uint32).view(np.int32).copy())


def packed(packing: str, module: str, matrix: Matrix) -> dict[str, Tensor]:
    scales = torch.from_numpy(matrix.s).half()
    assert torch.equal(scales.float(), torch.from_numpy(matrix.s)), "float16 holds these bf16 numbers exactly"
    if packing == "compressed-tensors":
        return {
            f"{module}.weight_packed": words(matrix.u, matrix.bits),
            f"{module}.weight_zero_point": words(matrix.z.T.copy(), matrix.bits).T.contiguous(),
            f"{module}.weight_scale": scales,
            f"{module}.weight_shape": torch.tensor(matrix.u.shape),
        }
    if packing == "awq":
        tensors = {"qweight": awq_words(matrix.u.T.copy()), "qzeros": awq_words(matrix.z.T.copy())}
    else:
        stored = matrix.z - (packing == "gptq")  # v1 stores one less
        qweight = words(matrix.u, matrix.bits).T.contiguous()  # [I / lanes, O]
        tensors = {"qweight": qweight, "qzeros": words(stored.T.copy() % (1 << matrix.bits), matrix.bits)}
        tensors["g_idx"] = torch.arange(matrix.u.shape[1], dtype=torch.int32) // matrix.group
    tensors["scales"] = scales.T.contiguous()
    return {f"{module}.{name}": tensor for name, tensor in tensors.items()}


def quantization_config(packing: str, group: int, bits: int) -> dict[str, Any]:
    if packing == "awq":
        return {"quant_method": "awq", "bits": bits, "group_size": group, "zero_point": True, "version": "gemm"}
    if packing == "compressed-tensors":
        weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group}
        group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        shared = {"quant_method": packing, "format": "pack-quantized", "ignore": ["lm_head"]}
        return shared | {"config_groups": {"group_0": group_0}}
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True,
        "checkpoint_format": packing,
    }  # fmt: skip


def convert_source(
    source: Path,
    packing: str,
    *,
    group: int = 32,
    bits: int = 4,
    zeros: tuple[int, ...] = (7, 8),
    changes: Mapping[str, Any] = {},  # of the quantization_config
) -> dict[str, Matrix]:
    """Replace the experts', dense and o_proj matrices of an unquantized directory by packed ones."""
    tensors = load_file(source / "model.safetensors")
    matrices = {}
    names = [name for name in sorted(tensors) if name.endswith(("gate_proj.weight", "up_proj.weight", "o_proj.weight"))]
    names += [name for name in sorted(tensors) if name.endswith("down_proj.weight")]
    for seed, name in enumerate(names):
        rows, columns = tensors.pop(name).shape
        tensors.pop(f"{name}_scale_inv", None)
        module = name.removesuffix(".weight")
        matrices[module] = Matrix(rows, columns, group, bits, zeros, seed)
        tensors |= packed(packing, module, matrices[module])
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(packing, group, bits) | dict(changes)
    (source / "config.json").write_text(json.dumps(config))
    return matrices


CASES = [
    ("gptq", 32, 4, (7, 8)),
    ("gptq_v2", 32, 4, (8,)),
    ("gptq", 32, 8, (127, 128)),
    ("gptq_v2", -1, 4, (7, 8)),
    ("awq", 32, 4, (7, 8)),
    ("compressed-tensors", 32, 4, (7, 8)),
    ("compressed-tensors", 32, 8, (128,)),
]


@pytest.mark.parametrize(("packing", "group", "bits", "zeros"), CASES)
def test_the_same_numbers_in_our_layout(
    make_source: MakeSource, tmp_path: Path, packing: str, group: int, bits: int, zeros: tuple[int, ...]
) -> None:
    source = make_source()
    matrices = convert_source(source, packing, group=group, bits=bits, zeros=zeros)
    report = quantize(source, tmp_path / "output", "converted")
    assert report.manifest.settings.recipe == "converted"
    assert report.manifest.totals.relative_error == 0
    assert any(note.startswith(f"converted from {packing.removesuffix('_v2')}") for note in report.manifest.notes)
    before = load_file(source / "model.safetensors")
    with Checkpoint.open(tmp_path / "output") as output:
        check_checkpoint(ModelConfig.from_dict(output.config), output)
        for module, matrix in matrices.items():
            weight = output.weight(module)
            assert isinstance(weight, Int4Weight if bits == 4 else Int8Weight)
            assert torch.equal(dequantize(weight), matrix.truth()), module
        for name in ("lm_head.weight", "model.layers.1.mlp.gate.weight", "model.layers.0.self_attn.kv_b_proj.weight"):
            assert torch.equal(output.read(name), before[name])
    assert quantize(source, tmp_path / "output", "converted").already_there


def test_a_converted_model_runs_and_lost_nothing(tmp_path: Path, demo: Path) -> None:
    source = tmp_path / "demo-gptq"
    source.mkdir()
    for path in demo.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if f"{name}_scale_inv" in tensors]:  # what stays is bf16 in such files
        tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05)
        del tensors[f"{name}_scale_inv"]
    save_file(tensors, source / "model.safetensors")
    matrices = convert_source(source, "gptq")
    output = tmp_path / "output"
    manifest = quantize(source, output, "converted").manifest
    assert manifest.measured is not None, manifest.notes
    assert manifest.measured.kld_max is not None
    assert manifest.measured.kld_max < 1e-9  # the same numbers, read by another path
    assert manifest.measured.same_top1 == 1
    with localmoe.load(output, kernels="reference") as engine:
        assert engine.logits([0, 5, 6]).isfinite().all()
        module = "model.layers.2.mlp.experts.3.down_proj"
        with Checkpoint.open(output) as checkpoint:
            assert torch.equal(dequantize(checkpoint.weight(module)), matrices[module].truth())


def test_an_interrupted_conversion_goes_on(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    convert_source(source, "awq")
    quantize(source, tmp_path / "whole", "converted")
    count = 0

    def interrupt(step: object) -> None:
        nonlocal count
        count += 1
        if count == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "output", "converted", progress=interrupt)
    assert quantize(source, tmp_path / "output", "converted").resumed_bytes > 0
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "output" / path.name).read_bytes() == path.read_bytes()


def refused(source: Path, output: Path, error: type[LocalMoeError], match: str) -> None:
    with pytest.raises(error, match=match):
        quantize(source, output, "converted")
    assert not output.exists()


def change_tensor(source: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, source / "model.safetensors")


@pytest.mark.parametrize("packing", ["gptq", "awq", "compressed-tensors"])
def test_what_is_too_asymmetric_is_refused(make_source: MakeSource, tmp_path: Path, packing: str) -> None:
    source = make_source()
    convert_source(source, packing, zeros=(3, 8))
    refused(source, tmp_path / "output", CheckpointError, r"_proj\.\w+ is asymmetric: [0-9,]+ of its [0-9,]+ groups")


@pytest.mark.parametrize(
    ("packing", "changes", "match"),
    [
        ("gptq", {"desc_act": True}, "desc_act is 'True'"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ("gptq", {"bits": 3}, "bits is '3'"),
        ("gptq", {"dynamic": {"+:.*down": {"bits": 8}}}, "dynamic is"),
        ("gptq", {"group_size": 48}, "no group of 32, 64, 128 divides it"),
        ("awq", {"version": "gemv"}, "version is 'gemv'"),
        ("awq", {"bits": 8}, "bits is '8'"),
        ("awq", {"group_size": "x"}, "group_size is 'x'"),
    ],
)
def test_forms_that_are_not_read(
    make_source: MakeSource, tmp_path: Path, packing: str, changes: dict[str, Any], match: str
) -> None:
    source = make_source()
    convert_source(source, packing, changes=changes)
    refused(source, tmp_path / "output", UnsupportedModelError, match)


MODULE = "model.layers.1.mlp.experts.2.up_proj"


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("g_idx", lambda t: t.flip(0), f"{MODULE}.g_idx is act-order"),
        ("scales", lambda t: t * torch.nan, f"{MODULE}.qweight has scales that are NaN"),
        ("scales", lambda t: t[:-1], "has scales of"),
        ("scales", lambda t: t.int(), "should be a matrix of floats"),
        ("qzeros", lambda t: t[:, :-1], "has zero points of"),
        ("scales", lambda t: t * 1.001, r"scales of [0-9,]+ that are no bfloat16 numbers; --round-scales"),
    ],
)
def test_damaged_matrices_are_named(
    make_source: MakeSource, tmp_path: Path, name: str, change: Callable[[Tensor], Tensor], match: str
) -> None:
    source = make_source()
    convert_source(source, "gptq")
    change_tensor(source, f"{MODULE}.{name}", change)
    refused(source, tmp_path / "output", CheckpointError, match)


def test_scales_are_rounded_where_that_is_asked_for(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    matrices = convert_source(source, "gptq")
    change_tensor(source, f"{MODULE}.scales", lambda scales: scales * 1.001)
    manifest = quantize(source, tmp_path / "output", "converted", round_scales=True).manifest
    assert 0 < manifest.tensors[MODULE].relative_error < 2**-8
    assert sum(record.relative_error > 0 for record in manifest.tensors.values()) == 1
    with Checkpoint.open(tmp_path / "output") as output:
        truth = matrices[MODULE].truth() * 1.001
        assert torch.allclose(dequantize(output.weight(MODULE)), truth, rtol=2**-7)
    with pytest.raises(UsageError, match="holds another output"):
        quantize(source, tmp_path / "output", "converted")


def test_quantize_notices_what_it_was_given(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    convert_source(source, "gptq")
    with pytest.raises(
        UsageError, match=r"quantized already \(gptq v1, 4 bits, groups of 32\) and can only be converted"
    ):
        quantize(source, tmp_path / "output", "balanced")
    with pytest.raises(UsageError, match="a conversion takes no method"):
        quantize(source, tmp_path / "output", "converted", method="gptq")
    with pytest.raises(UsageError, match="unknown recipe 'converted'"):
        quantize(make_source("plain"), tmp_path / "output", "converted")
    assert form_of({}) is None
    assert form_of({"quantization_config": {"quant_method": "fp8"}}) is None


def test_what_is_in_our_layout_runs_with_no_quantizing(
    demo: Path, demo_artifacts: Callable[..., Path], tmp_path: Path
) -> None:
    """As Kimi-K2-Thinking ships: compressed-tensors, one int4 group, bf16 scales; rounding with static act-order."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in demo_artifacts("experts-only").iterdir():
        if path.name not in ("localmoe.json", "README.md"):
            (theirs / path.name).write_bytes(path.read_bytes())
    config = json.loads((theirs / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    group["weights"]["actorder"] = "static"
    (theirs / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"in localmoe.s own layout .* run it as it is"):
        quantize(theirs, tmp_path / "output", "converted")
    with localmoe.load(theirs) as engine, localmoe.load(demo_artifacts("experts-only")) as ours:
        assert torch.equal(engine.logits([0, 5, 6]), ours.logits([0, 5, 6]))
