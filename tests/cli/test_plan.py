"""`localmoe plan`: which config it takes, what it prints, and how it refuses. No weights, no network, no engine."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from localmoe.hub.verify import demo_directory
from localmoe.offload.machine import Figure
from localmoe.offload.probe import Card, look
from localmoe.offload.record import Record, save

CONFIGS = Path(__file__).parents[1] / "configs"
LONGEST = json.loads((demo_directory() / "config.json").read_text())["max_position_embeddings"]
SECTIONS = ("CPU memory", "disk", "context", "latent cache", "decode", "prefill", "reckoned by", "note")


@pytest.fixture
def v3(tmp_path: Path) -> str:
    directory = tmp_path / "v3"
    directory.mkdir()
    shutil.copy(CONFIGS / "deepseek-v3.json", directory / "config.json")
    return str(directory)


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmoe.offload.probe.cards", lambda run=None: ())


def test_the_demo_without_a_card(invoke) -> None:
    result = invoke("plan", "demo:compact", "--ram", "1GiB")
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("demo:compact on the CPU, ")
    for name in SECTIONS:
        assert re.search(rf"^{name} ", result.out, re.MULTILINE), name
    assert "GPU" not in result.out
    assert "forecast" not in result.out
    assert "the speeds are assumed, since nothing is measured yet: `localmoe doctor` measures them" in result.out


def test_json_adds_up(invoke) -> None:
    result = invoke("plan", "demo:source", "--ram", "1GiB", "--ctx", "100", "--json")
    plan = result.json
    assert (plan["model"], plan["recipe"], plan["device"], plan["forecast"]) == ("demo:source", None, "cpu", False)
    assert plan["budgets"] == {"ram": 1 << 30, "vram": None}
    assert (plan["context"], plan["longest_context"]) == (100, LONGEST)
    for tier, size in plan["tiers"].items():
        assert size == sum(part["size_bytes"] for part in plan["parts"] if part["tier"] == tier)
    shipped = (demo_directory() / "model.safetensors").stat().st_size
    cache = 100 * plan["latent_cache"]["bytes_per_token"]
    assert sum(plan["tiers"].values()) - cache == pytest.approx(shipped, rel=0.01)  # all but the file's header
    for key in ("decode", "decode_full", "prefill"):
        speed = plan[key]
        tokens = plan["prompt_tokens"] if key == "prefill" else 1
        assert speed["tokens_per_second"] == pytest.approx(tokens / sum(speed["seconds"].values()))
        assert speed["bound"] in speed["seconds"]
    assert {figure["origin"] for figure in plan["figures"].values()} == {"assumed"}


def test_a_card_is_a_forecast(invoke, v3: str) -> None:
    result = invoke("plan", v3, "--recipe", "balanced", "--vram", "12GiB", "--ram", "256GiB")
    assert result.status == 0
    assert result.out.startswith(f"{v3}:balanced on a card that is not here, beside the CPU, ")
    assert len(re.findall(r"the card's part is a forecast: no GPU has confirmed", result.out)) == 1
    for said in ("GPU           12 GiB of 12 GiB", "68.6 KiB a token; plain keys and values would take 4.77 MiB",
                 "layers are on the CPU; with all on the card", "1 GiB more of --vram: ", "wait for the disk",
                 "GiB of CPU memory, which holds every expert"):  # fmt: skip
        assert said in result.out
    record = invoke("plan", v3, "--recipe", "balanced", "--vram", "12GiB", "--ram", "256GiB", "--json").json
    assert (record["device"], record["forecast"], record["recipe"]) == ("cuda", True, "balanced")
    assert 0 < record["tiers"]["gpu"] <= 12 << 30
    assert "gpu.pcie" in record["figures"]
    plain = record["latent_cache"]["plain_bytes_per_token"] / record["latent_cache"]["bytes_per_token"]
    assert plain == pytest.approx(4_997_120 / 70_272)
    assert invoke("plan", v3, "--ram", "900GiB", "--device", "cpu", "--vram", "12GiB", "--json").json["device"] == "cpu"


def test_the_int8_cache_and_recipes_change_the_sizes(invoke, v3: str) -> None:
    def plan(*options: str) -> dict:
        return invoke("plan", v3, "--ram", "1TiB", "--ctx", "4096", "--json", *options).json

    source, balanced = plan(), plan("--recipe", "balanced")
    assert (source["recipe"], balanced["recipe"]) == (None, "balanced")
    assert 1.6 < source["tiers"]["ram"] / balanced["tiers"]["ram"] < 2  # FP8 to int4 with its scales
    int8 = plan("--cache-dtype", "int8")["latent_cache"]["bytes_per_token"]
    assert int8 / balanced["latent_cache"]["bytes_per_token"] == pytest.approx(644 / 1152)


def test_the_cards_here_lend_their_free_memory(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card("RTX 4060", 8 << 30, 6 << 30, "565", "8.9", (4, 8))
    monkeypatch.setattr("localmoe.offload.probe.cards", lambda run=None: (card,))
    plan = invoke("plan", "demo:source", "--device", "cuda", "--json").json
    assert plan["budgets"]["vram"] == int((6 << 30) * 0.95)
    assert plan["figures"]["gpu.pcie"]["note"] == "80% of PCIe 4 x8"
    told = invoke("plan", "demo:source", "--vram", "12GiB").out
    assert told.startswith("demo:source on RTX 4060, beside the CPU")
    assert "the card here, RTX 4060, has 8 GiB, less than --vram says" in told


def test_what_doctor_measured_is_used(invoke, home: Path) -> None:
    facts = look(ask_cards=False)
    save(home, Record(facts.cpu, facts.cores, facts.tiers[-1], "2026-01-31", {"read": Figure(77e9, "measured")}))
    result = invoke("plan", "demo:source", "--json").json
    assert result["figures"]["read"] == {"value": 77e9, "origin": "cached", "note": "", "unit": "bytes/s"}
    assert result["figures"]["disk"]["origin"] == "assumed"
    assert "memory 77 GB/s (cached)" in invoke("plan", "demo:source").out
    assert (
        invoke("plan", "demo:source", "--threads", str(facts.cores + 1), "--json").json["figures"]["read"]["origin"]
        == "assumed"
    )


def test_a_bare_name_plans_the_artifact_that_is_here(invoke, home: Path) -> None:
    artifact = home / "models" / "demo" / "nf4"
    artifact.mkdir()
    (artifact / "localmoe.json").write_text(json.dumps({"format": 1, "recipe": "nf4", "files": {}}))
    source = json.loads((demo_directory() / "config.json").read_text())
    from quantize.recipes import recipe_named

    source["quantization_config"] = recipe_named("nf4").quantization_config(64).to_dict()
    (artifact / "config.json").write_text(json.dumps(source))
    shutil.rmtree(home / "models" / "demo" / "balanced")
    assert invoke("plan", "demo", "--json").json["model"] == "demo:nf4"
    other = invoke("plan", "demo", "--recipe", "compact", "--json").json
    assert (other["model"], other["recipe"]) == ("demo:compact", "compact")
    refused = invoke("plan", str(artifact), "--recipe", "compact")
    assert (refused.status, refused.out) == (2, "")
    assert "is quantized already, by nf4" in refused.err


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("demo", "--recipe", "best"), 2, "--recipe: 'best' is not one of balanced"),
        (("demo:nf4", "--recipe", "compact"), 2, "--recipe compact contradicts the ending of demo:nf4"),
        (("demo:source", "--vram", "12"), 2, "--vram: '12' is not a size"),
        (("demo:source", "--ctx", str(LONGEST + 1)), 2, f"made for at most {LONGEST} tokens"),
        (("demo:source", "--vram", "200MiB"), 1, "cannot hold one layer"),
        (("demo:source", "--ram", "4MiB"), 1, "need 0.0"),
        (("demo:source", "--device", "cuda"), 1, "no NVIDIA card here; --vram 12GiB plans for one"),
        (("kimi-k2-instruct",), 1, "kimi-k2-instruct is not supported"),
        (("nothing-like-it",), 1, "no model is called 'nothing-like-it'"),
        (("/nowhere/at/all",), 1, "/nowhere/at/all is not a directory"),
    ],
)
def test_refusals(invoke, refused_model: str, arguments: tuple[str, ...], status: int, said: str) -> None:
    assert refused_model == "kimi-k2-instruct"
    result = invoke("plan", *arguments)
    assert (result.status, result.out) == (status, "")
    assert result.err.startswith("localmoe: ")
    assert said in result.err
    assert result.err.count("\n") == 1
    as_json = invoke("plan", *arguments, "--json")
    assert as_json.status == status
    assert said in as_json.json["error"]["message"]


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "missing or empty"), ("[1", "not valid JSON"), ('{"model_type": "llama"}', "llama")],
)
def test_configs_that_cannot_be_planned(invoke, tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "config.json").write_text(content)
    result = invoke("plan", str(tmp_path), "--json")
    assert result.status == 1
    assert said in result.json["error"]["message"]


def test_a_name_that_is_not_here_offline(invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    result = invoke("plan", "deepseek-v3")
    assert result.status == 1
    assert "the config.json of deepseek-ai/DeepSeek-V3 is not here" in result.err
    snapshot = tmp_path / "hub" / "models--deepseek-ai--DeepSeek-V3" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    shutil.copy(CONFIGS / "deepseek-v3.json", snapshot / "config.json")
    found = invoke("plan", "deepseek-v3", "--ram", "512GiB", "--json").json
    assert (found["model"], found["recipe"]) == ("deepseek-v3:balanced", "balanced")
    experts = sum(part["size_bytes"] for part in found["parts"] if part["part"] == "routed experts")
    # 4 bits, a bf16 scale for every 32, the shape in two int64
    assert experts == 58 * 256 * 3 * (2048 * 7168 * 9 // 16 + 16)
