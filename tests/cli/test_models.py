"""The commands about models, on the demo as it ships: quantize, list, show, verify, rm, eval, run."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from localmoe import store
from localmoe.cli import units
from localmoe.hub.verify import demo_directory


@pytest.fixture
def empty_home(home: Path) -> Path:
    """The store without the fake artifact."""
    store.remove(store.parse_ref("demo"), all=True)
    return home


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, quantized once by the program itself into a directory."""
    output = tmp_path_factory.mktemp("quantized") / "demo-4bit"
    command = [sys.executable, "-m", "localmoe", "quantize", "demo", "-o", str(output), "--group-size", "64", "--json"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    record = json.loads(outcome.stdout)
    assert outcome.stderr == ""
    assert record["model"] == record["path"] == str(output)
    assert (record["recipe"], record["group_size"], record["grid"]) == ("balanced", 64, "mse")
    assert record["already_there"] is False
    assert record["source_bytes"] == (demo_directory() / "model.safetensors").stat().st_size
    assert record["size_bytes"] < 0.6 * record["source_bytes"]
    return output


def test_quantize_says_what_it_did_and_what_to_type_next(invoke, empty_home):
    outcome = invoke("quantize", "demo", "--grid", "absmax")
    assert outcome.status == 0
    assert outcome.err == ""
    assert outcome.out.startswith("demo:balanced\n  recipe   balanced, groups of 32, absmax grid\n")
    assert "bits each" in outcome.out
    assert outcome.out.count("  worst    0.") == 3
    assert outcome.out.endswith("next: localmoe run demo:balanced 'Tell me a story about a dragon'\n")
    again = invoke("quantize", "demo:balanced", "--grid", "absmax", "--json").json
    assert again["already_there"] is True
    other = invoke("quantize", "demo", "--group-size", "64")
    assert other.status == 2
    assert str(store.artifact_dir("demo", "balanced")) in other.err


def test_quantize_gate(invoke, empty_home):
    failed = invoke("quantize", "demo", "--gate", "0.001", "--json")
    assert failed.status == 1
    assert failed.json["error"]["kind"] == "gate"
    assert "above --gate 0.001" in failed.err
    assert not (store.artifact_dir("demo", "balanced") / "localmoe.json").exists()
    passed = invoke("quantize", "demo", "--gate", "0.05")
    assert passed.status == 0
    assert re.search(r"\n  lost     mean KLD 0\.0\d+ \+- 0\.00\d+, p99 0\.\d+, same top-1 [89]\d\.\d%", passed.out)
    measured = invoke("show", "demo", "--json").json["measured"]
    assert 0.001 < measured["kld_mean"] < measured["kld_p90"] < measured["kld_p99"] < measured["kld_max"]
    both = invoke("quantize", "demo", "--gate", "0.05", "--no-gate")
    assert (both.status, "give one of them" in both.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["demo", "--recipe", "fast"],
            "'fast' is not one of balanced, experts-only, local, compact, smallest, int8, nf4",
        ),
        (["demo:compact", "--recipe", "nf4"], "contradicts"),
        (["demo", "--group-size", "48"], "--group-size"),
        (["demo", "--grid", "fine"], "--grid"),
        (["demo", "--method", "awq"], "--method: 'awq' is not one of rtn, gptq, auto"),
    ],
)
def test_quantize_refuses_what_it_does_not_know(invoke, arguments, message):
    outcome = invoke("quantize", *arguments)
    assert outcome.status == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_quantize_says_that_int8_is_not_calibrated(invoke, empty_home):
    outcome = invoke("quantize", "demo:int8", "--method", "auto", "--grid", "absmax", "--no-gate", "--json")
    assert outcome.status == 0
    assert outcome.err == ("int8 has no int4 matrices, and others are not calibrated: all are rounded to the nearest\n")
    assert outcome.json["recipe"] == "int8"
    plain = invoke("quantize", "demo", "--recipe", "int8", "--grid", "absmax", "--no-gate", "--json")
    assert (plain.err, plain.json["already_there"]) == ("", True)
    assert invoke("verify", "demo:int8").status == 0
    assert "int8" in [entry["recipe"] for entry in invoke("list", "--json").json["models"]]
    served = invoke("show", "demo:int8", "--serving").out
    assert served.count("  does not load it: model.embed_tokens is quantized") == 2
    assert "transformers (5.23) does not load it either" in served


def test_quantize_names_a_calibration_text_that_is_not_there(invoke, tmp_path):
    outcome = invoke("quantize", "demo", "-o", str(tmp_path / "output"), "--calibrate", "/nowhere/text.txt")
    assert outcome.status == 1
    assert "/nowhere/text.txt: cannot be read" in outcome.err
    assert not (tmp_path / "output").exists()


def test_quantize_of_what_is_not_here_names_pull(invoke):
    outcome = invoke("quantize", "deepseek-v3")
    assert outcome.status == 1
    assert "`localmoe pull deepseek-v3`" in outcome.err


def test_show_an_artifact(invoke, quantized):
    record = invoke("show", str(quantized), "--json").json
    assert record["kind"] == "artifact"
    assert (record["recipe"], record["group_size"]) == ("balanced", 64)
    written = json.loads((demo_directory() / "generation_config.json").read_text())
    advised = {name: written[name] for name in ("temperature", "top_p", "repetition_penalty")}
    off = {"top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert record["sampling"] == advised | off
    assert record["calibration"] is None
    assert record["config"]["model_type"] == "deepseek_v3"
    parts = {(error["part"], error["scheme"]): error for error in record["errors"]}
    experts = parts["routed experts", "int4-g64"]
    config = record["config"]
    moe_layers = config["num_hidden_layers"] - config["first_k_dense_replace"] + 1  # the MTP layer has experts, too
    assert experts["matrices"] == moe_layers * config["n_routed_experts"] * 3
    assert 0.05 < experts["mean_relative_error"] <= experts["max_relative_error"] < 0.15
    assert parts["attention", "int8-g64"]["max_relative_error"] < 0.01
    assert len(record["worst"]) == 5
    assert record["worst"][0]["relative_error"] == max(error["max_relative_error"] for error in record["errors"])
    sizes = {file["name"]: file["size_bytes"] for file in record["files"]}
    assert sizes == {path.name: path.stat().st_size for path in quantized.iterdir()}
    assert record["size_bytes"] == sum(sizes.values())
    text = invoke("show", str(quantized)).out
    assert f"routed experts  int4-g64       {experts['matrices']}" in text
    assert f"temperature {advised['temperature']}, top_p {advised['top_p']}" in text


def test_show_a_source(invoke):
    record = invoke("show", "demo:source", "--json").json
    assert record["kind"] == "source"
    assert record["errors"] == []
    assert record["recipe"] is None
    assert 8 < record["bits_per_weight"] < 16  # FP8, with embeddings and head in bf16


def test_verify(invoke, quantized, tmp_path):
    assert invoke("verify", "demo:source").out.endswith("every hash right\n")
    assert invoke("verify", str(quantized), "--json").json["checked"] > 3
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in quantized.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    shard = next(copy.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    outcome = invoke("verify", str(copy))
    assert outcome.status == 1
    assert outcome.out == ""
    assert shard.name in outcome.err
    assert outcome.err.count("\n") == 1


def test_list_and_rm(invoke, home):
    before = invoke("list", "--json").json
    assert before["home"] == str(home)
    assert {(model["name"], model["recipe"]) for model in before["models"]} == {
        ("demo", "balanced"),
        ("demo", "source"),
    }
    assert "deepseek-v2-lite-chat" in {known["name"] for known in before["known"]}
    lines = invoke("list").out.splitlines()
    assert re.match(r"demo:balanced +\d", lines[1])
    assert not any(line.endswith(" ") for line in lines)
    removed = invoke("rm", "demo:balanced", "--json").json
    assert removed == {"removed": [str(home / "models" / "demo" / "balanced")]}
    assert invoke("rm", "demo").status == 1
    assert invoke("run", "demo:balancd", "Hi").status == 2


def test_pull_checks_what_ships_with_the_package(invoke):
    record = invoke("pull", "demo", "--json").json
    assert record["received_bytes"] == 0
    assert Path(record["path"]) == demo_directory()
    assert {file["state"] for file in record["files"]} == {"present"}
    assert "every hash right, nothing to fetch" in invoke("pull", "demo").out


def test_eval(invoke, quantized, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl who lived by the sea with her mother. " * 6)
    record = invoke("eval", str(quantized), "--text", str(text), "--reference", "demo:source", "--json").json
    figures = ["tokens", "perplexity", "perplexity_error", "reference_perplexity", "reference_perplexity_error"]
    figures += ["kld_mean", "kld_error", "kld_median", "kld_p90", "kld_p99", "kld_max", "same_top1"]
    assert list(record) == [*figures, "layerwise", "classes"]
    assert record["tokens"] > 80
    assert math.isclose(record["perplexity"], record["reference_perplexity"], rel_tol=0.2)
    assert 0 < record["kld_median"] <= record["kld_p99"] <= record["kld_max"]
    assert 0.5 < record["same_top1"] <= 1
    alone = invoke("eval", str(quantized), "--text", str(text), "--json").json
    assert math.isclose(alone["perplexity"], record["perplexity"], rel_tol=1e-9)
    assert [alone[key] for key in figures[3:]] == [None] * 9
    assert alone["perplexity_error"] > 0
    assert (alone["layerwise"], alone["classes"]) == (False, None)
    assert "same top-1" in invoke("eval", "demo:source", "--text", str(text), "--reference", str(quantized)).out


def test_eval_layer_by_layer(invoke, quantized, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl who lived by the sea with her mother. " * 6)
    common = ("eval", str(quantized), "--text", str(text), "--reference", "demo:source")
    plot = tmp_path / "kld.png"
    found = invoke(*common, "--layerwise", "--by-class", "--plot", str(plot), "--json").json
    wanted = invoke(*common, "--kernels", "reference", "--cache-dtype", "float32", "--json").json
    assert found["layerwise"] is True
    assert math.isclose(found["kld_mean"], wanted["kld_mean"], rel_tol=1e-3)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sum(entry["tokens"] for entry in found["classes"] if entry["by"] == "token") == found["tokens"]
    small = invoke(*common, "--ram", "1MB", "--by-class")
    assert "do not fit into 0.0 GB of memory: running layer by layer\n" in small.err
    assert "token letters" in small.out
    assert "+-" in small.out
    refused = invoke(*common, "--layerwise", "--kernels", "avx2")
    assert (refused.status, "leave out --kernels" in refused.err) == (2, True)
    alone = invoke("eval", str(quantized), "--text", str(text), "--plot", str(plot))
    assert (alone.status, "--reference" in alone.err) == (2, True)


def test_eval_of_a_text_that_is_not_there(invoke):
    outcome = invoke("eval", "demo:source", "--text", "/nowhere.txt")
    assert outcome.status == 1
    assert "/nowhere.txt: cannot be read" in outcome.err


def test_run_on_the_real_engine(invoke, quantized):
    longest = json.loads((quantized / "config.json").read_text())["max_position_embeddings"]
    arguments = ("run", str(quantized), "Tell me a story about a dragon", "-n", "24", "--seed", "1")
    first, second = invoke(*arguments), invoke(*arguments, "--json").json
    assert first.status == 0
    assert first.out == second["text"] + "\n"
    assert second["completion_tokens"] == 24
    assert second["finish_reason"] == "length"
    assert len(second["text"].split()) > 8
    too_long = invoke("run", str(quantized), "word " * (longest + 100))
    assert too_long.status == 1
    assert f"{longest:,}" in too_long.err


def test_run_as_people_pipe_it(quantized):
    line = 'echo "a dragon and a boat" | "$PY" -m localmoe run "$MODEL" "Tell me a story about" -n 60 | head -c 20'
    outcome = subprocess.run(
        ["bash", "-c", f"{line}; status=${{PIPESTATUS[1]}}; echo; echo $status"],
        env=dict(os.environ) | {"PY": sys.executable, "MODEL": str(quantized)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    text, status = outcome.stdout.rstrip("\n").rsplit("\n", 1)
    assert len(text.encode()) == 20
    assert status in ("0", "141")
    assert outcome.stderr == ""


def test_quantize_interrupted_says_that_it_goes_on(program, empty_home):
    program.command = (sys.executable, "-m", "localmoe")
    process = program.start("quantize", "demo", stdin=subprocess.DEVNULL, stdout=-1, stderr=-1)
    directory = empty_home / "models" / "demo" / "balanced"
    while not directory.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    if process.returncode != 0:  # else it was quicker than we are
        assert process.returncode == 130
        assert output == b""
        assert errors == b"localmoe: interrupted; the same command goes on where it stopped\n"
        assert program.run("show", "demo:balanced").returncode == 1
    assert program.run("quantize", "demo").returncode == 0
    assert program.run("verify", "demo:balanced").returncode == 0


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (9_500_000_000, "8.85 GiB"), (2**40, "1 TiB")]
)
def test_sizes_for_people(count, text):
    assert units.size(count) == text


@pytest.mark.parametrize(("count", "text"), [(999, "999"), (13_565_632, "13.6 M"), (15_700_000_000, "15.7 B")])
def test_quantities_for_people(count, text):
    assert units.quantity(count) == text


def test_show_serving(invoke, quantized):
    """The demo's q_lora_rank of 96 and experts' hidden size fit no Marlin kernel of SGLang's: it says which and why."""
    shown = invoke("show", str(quantized), "--serving")
    assert shown.status == 0
    assert re.search(r"\nSGLang\n  does not load it: .* not a multiple of .*marlin_utils\.py", shown.out)
    record = invoke("show", str(quantized), "--serving", "--json").json
    assert [entry["engine"] for entry in record["engines"]] == ["vLLM", "SGLang"]
    assert "transformers" not in shown.out
    source = invoke("show", "demo:source", "--serving").out
    assert "vllm serve" in source
    assert "sglang.launch_server" in source


def test_quantize_converts_a_gptq_checkpoint_and_says_so(invoke, tmp_path):
    """Only noticed here: tests/quantize/test_foreign.py builds real ones."""
    for path in demo_directory().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    outcome = invoke("quantize", str(tmp_path), "-o", str(tmp_path / "output"))
    assert outcome.status == 1
    assert "desc_act is 'True'" in outcome.err
    config["quantization_config"]["desc_act"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "no tensor is named *.qweight" in invoke("quantize", str(tmp_path), "-o", str(tmp_path / "output")).err
    assert not (tmp_path / "output").exists()
