"""Checkpoints that others packed, built here word by word: the same numbers in our layout, or a refusal by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import convert_source, pack_demo
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
    matrices = pack_demo(demo, source, "gptq")
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
        ("qzeros", lambda t: t.unsqueeze(0), f"{MODULE}.qzeros should be a matrix of int32"),
        ("qzeros", lambda t: t.float(), "should be a matrix of int32; it is torch.float32"),
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


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda t: torch.full((8 * len(t), t.shape[1]), -128, dtype=torch.int8),
            "zero points that are no numbers of 4",
        ),
        (lambda t: torch.zeros(7, dtype=torch.int8), r"weight_zero_point has zero points of \[7\], not \["),
        (lambda t: t.unsqueeze(0), "weight_zero_point should be a matrix of int32"),
    ],
)
def test_damaged_zero_points_are_named(
    make_source: MakeSource, tmp_path: Path, change: Callable[[Tensor], Tensor], match: str
) -> None:
    source = make_source()
    convert_source(source, "compressed-tensors")
    change_tensor(source, f"{MODULE}.weight_zero_point", change)
    refused(source, tmp_path / "output", CheckpointError, f"{MODULE}.*{match}")


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
