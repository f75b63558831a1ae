"""Sources that are damaged, hostile or changed under way: named, refused, and nothing half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from localmoe.cli.failure import describe
from localmoe.errors import CheckpointError
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.weights import dequantize
from quantize import sources
from quantize.pipeline import quantize
from quantize.progress import Progress

MakeSource = Callable[..., Path]
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
KEPT = "model.layers.1.mlp.gate.weight"


def refused(source: Path, output: Path, *, match: str, recipe: str = "compact", **options: object) -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        quantize(source, output, recipe, **options)  # type: ignore[arg-type]
    assert not output.exists()
    message = describe(caught.value).message
    assert message.isprintable()
    return message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [EXPERT, KEPT])
def test_values_that_are_no_numbers(make_source: MakeSource, tmp_path: Path, name: str, value: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][3, 5] = value

    message = refused(make_source(change=spoil), tmp_path / "output", match="NaN or infinite")
    assert message.startswith(f"model.safetensors: {name} ")


@pytest.mark.parametrize("recipe", ["balanced", "compact"])
def test_weights_whose_scale_or_error_overflows(make_source: MakeSource, tmp_path: Path, recipe: str) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[EXPERT][0, :32] = 3.4e38

    source = make_source(dtype="fp32", change=spoil)
    message = refused(source, tmp_path / "output", match="too large for weights", recipe=recipe)
    assert EXPERT in message


def test_an_fp8_factor_that_overflows_bf16(make_source: MakeSource, tmp_path: Path) -> None:
    """Every value is a float32 number still, and none is infinite: only bf16 cannot hold them."""
    name = "model.layers.0.self_attn.kv_b_proj.weight"  # stays unquantized in `balanced`, and becomes bf16

    def spoil(tensors: dict[str, Tensor]) -> None:
        largest = tensors[name].float().abs().amax()
        tensors[f"{name}_scale_inv"].fill_(3.4e38 / largest)

    source = make_source(dtype="fp8", change=spoil)
    assert name in refused(source, tmp_path / "output", match="too large for bfloat16", recipe="balanced")


def test_a_group_of_zeros_is_stored_exactly_and_named(make_source: MakeSource, tmp_path: Path) -> None:
    """Not refused: zeros are numbers, and pruned models are full of them."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[EXPERT][7, 32:96] = 0

    manifest = quantize(make_source(change=spoil), tmp_path / "output", "balanced").manifest
    module = EXPERT.removesuffix(".weight")
    assert any("1 matrices have groups of nothing but zeros" in note and module in note for note in manifest.notes)
    with Checkpoint.open(tmp_path / "output") as output:
        weight = dequantize(output.weight(module))
        assert not weight[7, 32:96].any()
        assert weight[7, :32].any()
        assert not output.read(f"{module}.weight_scale")[7, 1:3].any()


def header_of(path: Path) -> tuple[str, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length].decode(), data[8 + length :]


def with_header(path: Path, header: str, data: bytes) -> None:
    raw = header.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def test_a_tensor_that_stands_in_a_header_twice(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    header, data = header_of(source / "model.safetensors")
    entry = json.dumps({EXPERT: json.loads(header)[EXPERT]})[1:-1]
    with_header(source / "model.safetensors", header.rstrip()[:-1] + "," + entry + "}", data)
    message = refused(source, tmp_path / "output", match="stands there twice")
    assert message.startswith("model.safetensors: ")
    assert EXPERT in message


@pytest.mark.parametrize(
    "name", ["model..layers.weight", "../../etc/passwd", "a/b.weight", "x\x1b[2Jy.weight", "a\nb", "", "rtl\u202e"]
)
def test_names_that_are_no_names(make_source: MakeSource, tmp_path: Path, name: str) -> None:
    source = make_source()
    header, data = header_of(source / "model.safetensors")
    entries = json.loads(header)
    entries[name] = entries.pop(EXPERT)
    with_header(source / "model.safetensors", json.dumps(entries), data)
    message = refused(source, tmp_path / "output", match="is not a tensor name that localmoe accepts")
    assert message.startswith("model.safetensors: ")


@pytest.mark.parametrize("name", ["../../elsewhere.safetensors", "a\x1b[1m.safetensors", "/etc/x.safetensors", 7])
def test_an_index_that_points_elsewhere(make_source: MakeSource, tmp_path: Path, name: object) -> None:
    source = make_source(shards=2)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][EXPERT] = name
    path.write_text(json.dumps(index))
    refused(source, tmp_path / "output", match="index")


def test_a_name_with_escapes_in_the_index(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source(shards=2)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["x\x1b[2Jy"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    refused(source, tmp_path / "output", match="does not hold it")


def changed_under_way(change: Callable[[], object]) -> Callable[[Progress], None]:
    done = False

    def progress(step: Progress) -> None:
        nonlocal done
        if not done and step.stage == "quantize" and step.done_bytes > 0.2 * step.total_bytes:
            done = True
            change()

    return progress


def test_a_shard_replaced_before_its_turn(make_source: MakeSource, tmp_path: Path) -> None:
    """Same size, same tensors, other numbers: the second shard is not begun yet when it is replaced."""
    source, other = make_source(shards=2), make_source("other", shards=2, seed=5)
    shard = "model-00002-of-00002.safetensors"
    assert (source / shard).stat().st_size == (other / shard).stat().st_size
    swap = changed_under_way(lambda: (other / shard).replace(source / shard))
    message = refused(source, tmp_path / "output", match="was changed while it was being read", progress=swap)
    assert shard in message


@pytest.mark.parametrize("method", ["rtn", "auto"])
def test_a_shard_cut_off_under_way(
    make_source: MakeSource, tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """With calibration too: what is not mapped cannot kill the process."""
    monkeypatch.setattr(sources, "_SLAB_BYTES", 4096)
    source = tmp_path / "demo"
    source.mkdir()
    for path in demo.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    cut = changed_under_way(lambda: os.truncate(source / "model.safetensors", 2_000_000))
    message = refused(source, tmp_path / "output", match="ends inside", progress=cut, method=method)
    assert message.startswith("model.safetensors: ends inside model.layers.")


def test_nothing_is_lost_of_an_output_that_was_there(make_source: MakeSource, tmp_path: Path) -> None:
    quantize(make_source(), tmp_path / "output", "balanced")
    before = {path.name: path.read_bytes() for path in (tmp_path / "output").iterdir()}

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[EXPERT][0, 0] = torch.nan

    with pytest.raises(CheckpointError, match="NaN"):
        quantize(make_source("other", change=spoil), tmp_path / "output", "balanced")
    assert {path.name: path.read_bytes() for path in (tmp_path / "output").iterdir()} == before
