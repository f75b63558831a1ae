import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from localmoe.errors import CheckpointError, StorageError, UsageError
from localmoe.formats import writer
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.manifest import Manifest
from localmoe.formats.scheme import Scheme
from localmoe.formats.weights import DenseWeight, Int4Weight, Int8Weight, Nf4Weight, dequantize
from localmoe.model.config import ModelConfig
from localmoe.model.shapes import check_checkpoint
from quantize import stream
from quantize.pipeline import quantize
from quantize.progress import Progress
from quantize.quantizers import quantize_rows
from quantize.recipes import RECIPES

MakeSource = Callable[..., Path]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def relative_error(truth: torch.Tensor, found: torch.Tensor) -> float:
    return float((truth.double() - found.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_demo_in_every_recipe(recipe: str, demo: Path, demo_artifacts: Callable[..., Path]) -> None:
    directory = demo_artifacts(recipe)
    manifest = Manifest.read(directory)
    limits = {"int4": (0.05, 0.095), "int8": (0.002, 0.008), "nf4": (0.07, 0.10)}
    forms = {"int4": Int4Weight, "int8": Int8Weight, "nf4": Nf4Weight}
    with Checkpoint.open(demo) as source, Checkpoint.open(directory) as output:
        check_checkpoint(ModelConfig.from_dict(output.config), output)
        for module, record in manifest.tensors.items():
            kind = record.scheme.split("-")[0]
            low, high = limits[kind]
            assert low < record.relative_error < high, module
            weight = output.weight(module)
            assert isinstance(weight, forms[kind])
            found = relative_error(dequantize(source.weight(module)), dequantize(weight))
            assert found == pytest.approx(record.relative_error, rel=1e-4)
        dense = [module for module in output.modules() if module not in manifest.tensors]
        for module in dense:
            truth = source.read(f"{module}.weight")
            found_weight = output.read(f"{module}.weight")
            if truth.dtype == torch.float8_e4m3fn:
                assert torch.equal(found_weight, dequantize(source.weight(module)).bfloat16())
            else:
                assert torch.equal(found_weight, truth)
        bias = "model.layers.5.mlp.gate.e_score_correction_bias"
        assert output.read(bias).dtype == torch.float32
        assert torch.equal(output.read(bias), source.read(bias))
        assert "model.layers.5.eh_proj.weight" in output
        assert "model.layers.5.embed_tokens.weight" not in output
    sizes = {
        "balanced": 7.51,
        "experts-only": 8.73,
        "local": 6.07,
        "compact": 5.42,
        "smallest": 4.75,
        "int8": 8.60,
        "nf4": 7.51,
    }
    assert manifest.totals.bits_per_weight == pytest.approx(sizes[recipe], abs=0.01)
    assert manifest.totals.parameters == 12_428_880
    assert (directory / "tokenizer.json").read_bytes() == (demo / "tokenizer.json").read_bytes()


def test_mse_beats_absmax_on_every_matrix(demo_artifacts: Callable[..., Path]) -> None:
    mse = Manifest.read(demo_artifacts("balanced")).tensors
    absmax = Manifest.read(demo_artifacts("balanced", "absmax")).tensors
    assert all(mse[name].relative_error < absmax[name].relative_error for name in mse)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8"])
def test_slabs_make_no_difference(make_source: MakeSource, tmp_path: Path, dtype: str) -> None:
    source = make_source(dtype=dtype)
    quantize(source, tmp_path / "output", "compact")
    name = "model.layers.1.mlp.experts.0.up_proj"
    with Checkpoint.open(source) as before, Checkpoint.open(tmp_path / "output") as after:
        parts = quantize_rows(dequantize(before.weight(name)), Scheme("int4", 32), "mse").parts
        assert torch.equal(after.read(f"{name}.weight_packed"), parts["weight_packed"])
        assert torch.equal(after.read(f"{name}.weight_scale"), parts["weight_scale"])
        assert after.read(f"{name}.weight_shape").tolist() == [96, 160]
        assert after.read("model.norm.weight").dtype == torch.bfloat16


def test_same_input_same_bytes(make_source: MakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(dtype="fp8", shards=3)
    torch.set_num_threads(2)
    report = quantize(source, tmp_path / "one", "balanced")
    assert not report.already_there
    torch.set_num_threads(1)
    monkeypatch.setattr(stream, "_MOST_WORKERS", 1)
    os.utime(source / "config.json", (1, 1))
    quantize(source, tmp_path / "elsewhere" / "two", "balanced")
    assert contents(tmp_path / "one") == contents(tmp_path / "elsewhere" / "two")
    assert str(tmp_path).encode() not in (tmp_path / "one" / "localmoe.json").read_bytes()


def test_manifest_and_files(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source(shards=2)
    manifest = quantize(source, tmp_path / "output", "balanced", group_size=64, grid="absmax").manifest
    assert manifest == Manifest.read(tmp_path / "output")
    assert manifest.settings.recipe == "balanced"
    assert set(manifest.source.files) == {
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    }
    assert set(manifest.files) | {"localmoe.json"} == set(contents(tmp_path / "output"))
    for directory, files in ((source, manifest.source.files), (tmp_path / "output", manifest.files)):
        for name, record in files.items():
            data = (directory / name).read_bytes()
            assert (hashlib.sha256(data).hexdigest(), len(data)) == (record.sha256, record.bytes)
    assert "modeling_deepseek.py" not in manifest.files
    assert manifest.tensors["model.layers.1.self_attn.q_b_proj"].scheme == "int8-g64"
    assert any("o_proj" not in note and "down_proj" in note for note in manifest.notes)
    with Checkpoint.open(tmp_path / "output") as output:
        assert sum(info.nbytes for info in output.tensors.values()) == manifest.totals.bytes


def test_hub_caches_say_name_and_revision(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    snapshot = tmp_path / "models--org--some-model" / "snapshots" / ("1a" * 20)
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    manifest = quantize(snapshot, tmp_path / "output", "balanced").manifest
    assert (manifest.source.name, manifest.source.revision) == ("org/some-model", "1a" * 20)


def test_a_second_call_does_nothing(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    first = quantize(source, tmp_path / "output", "balanced")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "output").iterdir()}
    second = quantize(source, tmp_path / "output", "balanced")
    assert second.already_there
    assert second.manifest == first.manifest
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "output").iterdir()} == before


@pytest.mark.parametrize("change", [{"recipe": "compact"}, {"group_size": 64}, {"grid": "absmax"}])
def test_another_output_is_not_overwritten(make_source: MakeSource, tmp_path: Path, change: dict[str, Any]) -> None:
    source = make_source()
    quantize(source, tmp_path / "output", "balanced")
    before = contents(tmp_path / "output")
    with pytest.raises(UsageError, match="holds another output"):
        quantize(source, tmp_path / "output", **({"recipe": "balanced"} | change))
    with pytest.raises(UsageError, match="localmoe did not write it"):
        quantize(source, source, "balanced")
    assert contents(tmp_path / "output") == before


def test_a_changed_source_is_quantized_again(make_source: MakeSource, tmp_path: Path) -> None:
    quantize(make_source("one"), tmp_path / "output", "balanced")
    other = make_source("two", seed=1)
    assert not quantize(other, tmp_path / "output", "balanced").already_there
    quantize(other, tmp_path / "fresh", "balanced")
    assert contents(tmp_path / "output") == contents(tmp_path / "fresh")


def test_a_damaged_output_is_made_again(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    quantize(source, tmp_path / "output", "balanced")
    before = contents(tmp_path / "output")
    (tmp_path / "output" / "model.safetensors").unlink()
    assert not quantize(source, tmp_path / "output", "balanced").already_there
    assert contents(tmp_path / "output") == before


def test_usage_errors_come_before_any_work(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    with pytest.raises(UsageError, match="unknown recipe 'q4'"):
        quantize(source, tmp_path / "output", "q4")
    with pytest.raises(UsageError, match="group size 48"):
        quantize(source, tmp_path / "output", "balanced", group_size=48)
    with pytest.raises(UsageError, match="unknown grid"):
        quantize(source, tmp_path / "output", "balanced", grid="gptq")  # type: ignore[arg-type]
    assert not (tmp_path / "output").exists()


def test_progress_reaches_the_total(make_source: MakeSource, tmp_path: Path) -> None:
    seen: list[Progress] = []
    report = quantize(make_source(dtype="fp8"), tmp_path / "output", "balanced", progress=seen.append)
    for stage, total in (("quantize", report.source_bytes), ("hash", report.manifest.totals.bytes)):
        steps = [step for step in seen if step.stage == stage]
        done = [step.done_bytes for step in steps]
        assert done == sorted(done)
        assert {step.total_bytes for step in steps} == {total}
        assert done[-1] == pytest.approx(total, rel=0.3 if stage == "hash" else 0)


def test_an_interruption_is_resumed_to_the_same_bytes(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source(dtype="fp8")
    quantize(source, tmp_path / "whole", "balanced")
    for stop in (5, 40, 60):
        count = 0

        def interrupt(step: Progress, stop: int = stop) -> None:
            nonlocal count
            count += 1
            if count == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "output", "balanced", progress=interrupt)
        assert not (tmp_path / "output" / "localmoe.json").exists()
        assert not (tmp_path / "output" / "config.json").exists()
    report = quantize(source, tmp_path / "output", "balanced")
    assert report.resumed_bytes > 0
    assert contents(tmp_path / "output") == contents(tmp_path / "whole")


def test_a_source_changed_under_way_is_an_error(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()

    def touch(step: Progress) -> None:
        os.utime(source / "model.safetensors", (1, 1))

    with pytest.raises(CheckpointError, match="was changed while it was being read"):
        quantize(source, tmp_path / "output", "balanced", progress=touch)
    assert not (tmp_path / "output").exists()


def test_a_full_disk_says_how_much_is_needed(
    make_source: MakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(StorageError, match=r"[0-9,]{6,} bytes are needed"):
        quantize(make_source(), tmp_path / "output", "balanced")
    assert not (tmp_path / "output").exists()


# One interpreter imports torch, then forks a child for every run: a kill costs milliseconds. The child dies by SIGKILL
# at the given step of those that touch the disk, or meets a limit on file sizes.
KILLER = """
import json, os, pathlib, resource, signal, sys, threading
import localmoe.formats.writer as writer
from localmoe.errors import LocalMoeError
from quantize import stream
from quantize.pipeline import quantize
writer._SYNC_BYTES = 20_000
source, output = map(pathlib.Path, sys.argv[1:3])

def run(step, limit):
    count, lock = 0, threading.Lock()
    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            with lock:
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for owner, names in ((os, ("pwrite", "write", "fdatasync", "fsync", "posix_fallocate", "ftruncate")),
                         (pathlib.Path, ("rename", "unlink"))):
        for name in names:
            setattr(owner, name, counted(getattr(owner, name)))
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    message, resumed = "done", None
    try:
        report = quantize(source, output, "balanced")
        resumed = 1 if report.already_there else report.resumed_bytes / report.source_bytes
    except LocalMoeError as error:
        message = str(error)
    sys.stdout.write(json.dumps([message, count, resumed]) + "\\n")
    sys.stdout.flush()
    os._exit(0)

for line in sys.stdin:
    step, limit = json.loads(line)
    child = os.fork()
    if not child:
        run(step, limit)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        print(json.dumps(["killed", os.WTERMSIG(status)]), flush=True)
"""


def test_kills_at_any_step_end_in_the_same_bytes(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source(dtype="fp8")
    whole = tmp_path / "whole"
    quantize(source, whole, "balanced")
    output = tmp_path / "output"
    with subprocess.Popen(
        [sys.executable, "-c", KILLER, source, output], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as killer:
        assert killer.stdin is not None
        assert killer.stdout is not None

        def run(step: int, limit: int = 0) -> list[Any]:
            print(json.dumps([step, limit]), file=killer.stdin, flush=True)
            answer: list[Any] = json.loads(killer.stdout.readline())  # type: ignore[union-attr]
            return answer

        message, _, _ = run(0, limit=100_000)
        assert "bytes are needed" in message
        assert not output.exists()
        message, steps, resumed = run(0)
        assert (message, resumed) == ("done", 0)
        assert contents(output) == contents(whole)
        # Every step of the beginning and of the end, and some between; each followed by a run to the end.
        for step in sorted({*range(1, 9), *range(9, steps - 30, steps // 12), *range(steps - 30, steps + 1)}):
            for path in output.iterdir():
                path.unlink()
            output.rmdir()
            assert run(step) == ["killed", 9], step
            if (output / "localmoe.json").exists():  # complete, or not there
                assert contents(output).items() >= contents(whole).items()
            message, _, resumed = run(0)
            assert message == "done", step
            assert contents(output) == contents(whole), step
            if step > steps - 20:  # while the files get their names, nothing is left to quantize
                assert resumed == 1, step
        # Killed again and again, each time after a little more.
        for path in output.iterdir():
            path.unlink()
        output.rmdir()
        for _ in range(4):
            assert run(steps // 3) == ["killed", 9] or (output / "localmoe.json").exists()
        assert run(0)[0] == "done"
        assert contents(output) == contents(whole)
        killer.stdin.close()


def test_what_is_not_quantized_keeps_its_dtype_and_bits(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source(dtype="fp32")
    quantize(source, tmp_path / "output", "experts-only")
    with Checkpoint.open(source) as before, Checkpoint.open(tmp_path / "output") as after:
        for module in ("model.layers.0.mlp.gate_proj", "lm_head", "model.layers.1.self_attn.kv_b_proj"):
            weight = after.weight(module)
            assert isinstance(weight, DenseWeight)
            assert torch.equal(weight.tensor, before.read(f"{module}.weight"))
