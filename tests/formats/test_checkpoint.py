"""Reading model directories: the numbers of a good one, and one clear line for each way to be broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from localmoe.errors import CheckpointError, LocalMoeError, ModelNotFoundError, UnsupportedModelError
from localmoe.formats import int4
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.safetensors import read_header
from localmoe.formats.scheme import QuantizationConfig, Scheme, SchemeGroup
from localmoe.formats.weights import DenseWeight, Fp8Weight, Int4Weight, dequantize, rows_of
from localmoe.model.layers import embedding_rows
from quantize.quantizers import quantize_rows

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
INT4 = QuantizationConfig((SchemeGroup(Scheme("int4", 32), ("Linear",)),), ("lm_head",)).to_dict()


def write(directory: Path, tensors: dict[str, torch.Tensor], quantization: Any = None) -> Path:
    directory.mkdir(exist_ok=True)
    config = {"model_type": "deepseek_v3"} | ({"quantization_config": quantization} if quantization else {})
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def raw_header(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def one_line(error: LocalMoeError) -> bool:
    return "\n" not in str(error) and len(str(error)) < 300


def test_read_and_mapped_tensors_are_the_saved_ones(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.randn(5, 7).bfloat16(),
        "b.weight": torch.randn(3, 3),
        "c": torch.tensor([1, 2], dtype=torch.int64),
        "empty": torch.empty(0, 4),
    }
    checkpoint = Checkpoint.open(write(tmp_path / "m", tensors))
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert torch.equal(checkpoint.tensor(name), tensor)
    assert list(checkpoint.modules()) == ["a", "b"]
    assert isinstance(checkpoint.weight("a"), DenseWeight)


def test_misaligned_tensors_are_read_all_the_same(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", {"x": torch.zeros(1)})
    wanted = torch.randn(4)
    header = {
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F32", "shape": [4], "data_offsets": [1, 17]},
    }
    raw_header(directory / "model.safetensors", header, b"\7" + wanted.numpy().tobytes())
    checkpoint = Checkpoint.open(directory)
    assert torch.equal(checkpoint.tensor("x"), wanted)
    assert torch.equal(checkpoint.read("x"), wanted)


def test_quantized_and_fp8_weights_take_the_form_the_config_names(tmp_path: Path) -> None:
    q = torch.randint(-8, 8, (6, 64), dtype=torch.int8)
    packed = {
        "x.weight_packed": int4.pack(q),
        "x.weight_scale": torch.rand(6, 2).bfloat16(),
        "x.weight_shape": torch.tensor([6, 64]),
        "lm_head.weight": torch.randn(4, 64).half(),
    }
    checkpoint = Checkpoint.open(write(tmp_path / "int4", packed, INT4))
    weight = checkpoint.weight("x")
    assert isinstance(weight, Int4Weight)
    assert torch.equal(dequantize(weight), int4.dequantize(packed["x.weight_packed"], packed["x.weight_scale"], 32))
    assert isinstance(checkpoint.weight("lm_head"), DenseWeight)

    fp8 = {"x.weight": torch.randn(130, 64).to(torch.float8_e4m3fn), "x.weight_scale_inv": torch.rand(2, 1)}
    assert isinstance(Checkpoint.open(write(tmp_path / "fp8", fp8, FP8)).weight("x"), Fp8Weight)


def test_several_shards_through_the_index(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", {"a": torch.ones(2)})
    (directory / "model.safetensors").rename(directory / "one.safetensors")
    save_file({"b": torch.zeros(3)}, directory / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sorted(Checkpoint.open(directory).tensors) == ["a", "b"]

    for wrong, told in [
        ({"a": "one.safetensors", "b": "three.safetensors"}, "three.safetensors"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "c should be in two.safetensors"),
        ({"a": "../one.safetensors"}, "not the name"),
        ({"a": 3}, "not the name"),
        ({"a": ["one.safetensors"]}, r"index\.json: weight_map has .* for 'a', which is not the name"),
        ({"a": {}}, "not the name"),
        ({}, "weight_map"),
    ]:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(CheckpointError, match=told):
            Checkpoint.open(directory)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "m", {"x": torch.arange(40.0), "y": torch.ones(3)}) / "model.safetensors"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
            read_header(path)
        assert one_line(caught.value)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="damaged"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b"[1, 2]", "not an object"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 50_000, "not valid JSON"),
        (b'{"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "x": {}}', "twice"),
        ({"x": 3}, "not an object"),
        ({"x": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 1]}}, "unknown dtype"),
        ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "no valid shape"),
        ({"x": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "no valid shape"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "needs 8"),
        ({"x": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, "does not start"),
        ({"../x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, "not a tensor name"),
        ({"a..b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, "not a tensor name"),
        ({"\x1b[31mx": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, "not a tensor name"),
        ({"__metadata__": 3}, "__metadata__"),
    ],
)
def test_broken_headers(tmp_path: Path, header: object, told: str) -> None:
    path = tmp_path / "model.safetensors"
    raw_header(path, header, b"\0")
    with pytest.raises(CheckpointError, match=told) as caught:
        read_header(path)
    assert one_line(caught.value)
    assert "\x1b" not in str(caught.value)


def test_directories_that_are_not_models(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        Checkpoint.open(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="neither"):
        Checkpoint.open(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            Checkpoint.open(tmp_path)


def test_companions_that_are_missing_or_contradict(tmp_path: Path) -> None:
    good = {
        "x.weight_packed": torch.zeros(6, 8, dtype=torch.int32),
        "x.weight_scale": torch.zeros(6, 2, dtype=torch.bfloat16),
        "x.weight_shape": torch.tensor([6, 64]),
    }
    for name, value in [
        ("x.weight_scale", None),
        ("x.weight_packed", None),
        ("x.weight_shape", None),
        ("x.weight_scale", torch.zeros(6, 4, dtype=torch.bfloat16)),
        ("x.weight_scale", torch.zeros(6, 2)),
        ("x.weight_packed", torch.zeros(6, 9, dtype=torch.int32)),
        ("x.weight_packed", torch.zeros(48, dtype=torch.int32)),
        ("x.weight_shape", torch.tensor([64, 6])),
    ]:
        tensors = {key: tensor for key, tensor in (good | {name: value}).items() if tensor is not None}
        with pytest.raises(CheckpointError, match=r"x\.weight_"):
            Checkpoint.open(write(tmp_path / "m", tensors, INT4)).weight("x")


def test_fp8_without_its_scale_is_an_error_that_names_it(tmp_path: Path) -> None:
    values = torch.zeros(130, 64).to(torch.float8_e4m3fn)
    for tensors, quantization, told in [
        ({"x.weight": values}, FP8, "x.weight_scale_inv is missing"),
        ({"x.weight": values, "x.weight_scale_inv": torch.ones(1, 1)}, FP8, r"\[2, 1\]"),
        ({"x.weight": values, "x.weight_scale_inv": torch.ones(2, 1)}, None, "no fp8 quantization_config"),
    ]:
        with pytest.raises(CheckpointError, match=told):
            Checkpoint.open(write(tmp_path / "m", tensors, quantization)).weight("x")
    with pytest.raises(UnsupportedModelError, match="weight_block_size"):
        Checkpoint.open(write(tmp_path / "m", {"x": torch.ones(1)}, {"quant_method": "fp8"}))


def test_integers_that_no_scheme_explains_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path / "m", {"x.weight": torch.zeros(2, 2, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match="no scheme"):
        checkpoint.weight("x")
    with pytest.raises(CheckpointError, match=r"y\.weight is missing"):
        checkpoint.weight("y")


def embedding_of(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """(tensors of a random [50, 128] embedding, what config.json says of it)."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(50, 128, generator=generator)
    if kind not in ("int8", "int4", "nf4"):
        return {"model.embed_tokens.weight": values.to(getattr(torch, kind))}, None
    scheme = Scheme(kind, 64)  # type: ignore[arg-type]
    target = SchemeGroup(scheme, (r"re:.*embed_tokens$",))
    method = "localmoe-nf4" if kind == "nf4" else "compressed-tensors"
    parts = quantize_rows(values, scheme, "absmax").parts
    tensors = {f"model.embed_tokens.{suffix}": data for suffix, data in parts.items()}
    if kind != "nf4":
        tensors["model.embed_tokens.weight_shape"] = torch.tensor([50, 128])
    return tensors, QuantizationConfig((target,), (), method).to_dict()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("ids", [[0], [49], [7, 0, 49, 7, 7, 12], []])
def test_rows_are_those_of_the_dequantized_matrix(tmp_path: Path, kind: str, ids: list[int]) -> None:
    """To the bit: from the mapped file, as a model reads them, and read from it, as a run of layers does."""
    tensors, quantization = embedding_of(kind)
    checkpoint = Checkpoint.open(write(tmp_path / "m", tensors, quantization))
    weight, indices = checkpoint.weight("model.embed_tokens"), torch.tensor(ids, dtype=torch.int64)
    wanted = dequantize(weight)[indices]
    assert wanted.shape == (len(ids), 128)
    for found in (embedding_rows(weight, indices), checkpoint.rows("model.embed_tokens", indices)):
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "bfloat16"])
@pytest.mark.parametrize("row", [50, -51])
def test_rows_beyond_the_last_are_refused(tmp_path: Path, kind: str, row: int) -> None:
    tensors, quantization = embedding_of(kind)
    checkpoint = Checkpoint.open(write(tmp_path / "m", tensors, quantization))
    with pytest.raises(IndexError):
        embedding_rows(checkpoint.weight("model.embed_tokens"), torch.tensor([3, row]))


def test_rows_of_fp8_blocks() -> None:
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(300, 200, generator=generator).to(torch.float8_e4m3fn)
    weight = Fp8Weight(values, torch.rand(3, 2, generator=generator))
    indices = torch.tensor([299, 0, 127, 128, 255, 256])
    assert torch.equal(dequantize(rows_of(weight, indices)), dequantize(weight)[indices])


def test_rows_of_a_broken_embedding_are_refused(tmp_path: Path) -> None:
    tensors, quantization = embedding_of("int8")
    tensors["model.embed_tokens.weight_scale"] = tensors["model.embed_tokens.weight_scale"][:, :1].contiguous()
    checkpoint = Checkpoint.open(write(tmp_path / "m", tensors, quantization))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight_scale is torch\.bfloat16 \[50, 1\]; int8"):
        checkpoint.rows("model.embed_tokens", torch.tensor([1]))
