"""What --explain-speed reckons, by hand; and that a run's parts add up to its time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from localmoe.card_parts import bytes_by_card_part, split_up
from localmoe.cli.app import app
from localmoe.cli.speed import text
from localmoe.explain import Limit, PartTimer, Sample, bytes_by_part, explain, explain_card
from localmoe.kernels.profile import Profile
from localmoe.model.card.model import Split
from localmoe.model.config import ModelConfig
from localmoe.model.sizes import Storage, model_sizes
from localmoe.offload.machine import Machine, assumed_cpu, assumed_disk, assumed_gpu
from localmoe.offload.plan import Budgets, place
from localmoe.offload.predict import Subject, decode
from quantize.recipes import recipe_named

CONFIG: dict[str, Any] = json.loads((Path(__file__).parent / "configs" / "deepseek-v2-lite.json").read_text())
HELD = 1000


def subject(recipe: str = "balanced") -> Subject:
    config = ModelConfig.from_dict(CONFIG)
    quantization = recipe_named(recipe).quantization_config(group_size=32)
    return Subject(config, model_sizes(config, Storage(quantization)), cache_row=2 * config.latent_width)


def test_bytes_are_those_a_token_reads() -> None:
    model = subject()
    config, sizes = model.config, model.sizes
    read = bytes_by_part(model, HELD)
    assert set(read) == {"attention", "router", "experts", "dense", "head"}
    assert read["router"] == 26 * 64 * 2048 * 2  # bf16, in 26 MoE layers
    assert read["head"] == sizes.head.nbytes
    moe = [layer for layer in sizes.layers if layer.experts]
    cache = HELD * 27 * 576 * 2
    used = 26 * config.num_experts_per_tok * sizes.expert
    assert len(moe) == 26
    assert sum(read.values()) == sizes.always + cache + used
    assert read["attention"] == cache + sum(layer.attention.nbytes for layer in sizes.layers)
    assert read["dense"] == sizes.layers[0].mlp.nbytes


def sample(**parts: float) -> Sample:
    """Ten tokens, 100 ms each; parts in seconds a token."""
    return Sample(10, 1.0, {part: 10 * seconds for part, seconds in parts.items()}, HELD)


def test_times_add_up_and_faster_memory_shortens_only_the_waiting() -> None:
    model = subject()
    read = bytes_by_part(model, HELD)
    rate = read["experts"] / 0.030  # experts could be read in 30 of their 50 ms, the head in more than it took
    found = explain(sample(experts=0.050, head=0.001, copies=0.0), model, Limit(rate, "measured now"), {})
    assert found.milliseconds_per_token == pytest.approx({"experts": 50, "head": 1, "other": 49})
    assert "copies" not in found.milliseconds_per_token  # what took no time is left out
    assert found.tokens_per_second == pytest.approx(10)
    assert set(found.bytes_per_token) == {"experts", "head"}
    assert found.limit_share == pytest.approx((read["experts"] + read["head"]) / 0.1 / rate)
    assert [change.change for change in found.changes] == ["memory twice as fast (a second channel, say)"]
    assert 1 / found.changes[0].tokens_per_second == pytest.approx(0.1 - (0.030 + 0.001) / 2)
    assert found.changes[0].gain == pytest.approx(0.1 * found.changes[0].tokens_per_second - 1)


def test_the_change_that_helps_most_depends_on_where_the_time_is() -> None:
    model = subject()
    read = bytes_by_part(model, HELD)
    slow = Limit(sum(read.values()) / 0.09, "doctor", all_threads=1.5 * sum(read.values()) / 0.09)
    parts = {part: 0.09 * count / sum(read.values()) for part, count in read.items()}
    others = {"balanced": model, "compact": subject("compact")}
    by_memory = explain(sample(**parts), model, slow, others, int8_row=644, idle_cores=(2, 4)).changes
    assert by_memory[0].change.startswith("memory twice as fast")
    assert "--threads 4" in [change.change for change in by_memory]
    assert "the recipe balanced" not in [change.change for change in by_memory]  # it is that already
    compact = next(change for change in by_memory if change.change == "the recipe compact")
    less = 1 - sum(bytes_by_part(others["compact"], HELD).values()) / sum(read.values())
    assert 1 / compact.tokens_per_second == pytest.approx(0.1 - 0.09 * less)

    fast = Limit(1e15, "measured now", "the CPU's cache")  # all the time is arithmetic over the context
    by_context = explain(sample(attention=0.099), model, fast, others, int8_row=644).changes
    assert [change.change for change in by_context] == ["--cache-dtype int8"]
    cached = HELD * 27 * (2 * 576 - 644) / read["attention"]
    assert 1 / by_context[0].tokens_per_second == pytest.approx(0.1 - 0.099 * cached)

    assert explain(sample(sampling=0.1), model, fast, others, int8_row=644).changes == []


def test_what_would_help_a_card_is_reckoned_as_plan_does() -> None:
    model = subject()
    machine = Machine(assumed_cpu(8), assumed_disk(), assumed_gpu())
    timed = Sample(10, 1.0, {"card": 0.9}, HELD)

    def explained(vram: int, int8_row: int | None = None):
        placement = place(model, Budgets(vram=vram, context=4096))
        return explain_card(timed, model, machine, placement, int8_row), placement

    small, placement = explained(5 << 30, 644)
    hits = small.hit_rate_by_layer
    assert hits is not None
    assert len(hits) == 26
    assert 0 < sum(hits) / 26 < 1
    more = next(change for change in small.changes if change.change == "2 GiB more of --vram")
    assert small.changes == sorted(small.changes, key=lambda change: -change.gain)

    def predicted(vram: int) -> float:
        placed = place(model, Budgets(vram=vram, context=4096), held=HELD)
        return decode(model, machine, placed.layers, placed.head_on_gpu, HELD).tokens_per_second

    vram = placement.vram
    assert more.gain == pytest.approx(predicted(vram + (2 << 30)) / predicted(vram) - 1)
    assert more.tokens_per_second == pytest.approx(10 * (1 + more.gain))
    assert (small.limit_share, small.bytes_per_token) == (None, {})  # one part, of which nothing more is known
    large, _ = explained(40 << 30)  # it holds everything: neither more of it nor faster CPU memory helps
    assert large.changes == []
    assert large.hit_rate_by_layer == pytest.approx([1.0] * 26)
    measured = explain_card(replace(timed, hit_rates=[0.5] * 26), model, machine, placement, None)
    assert measured.hit_rate_by_layer == [0.5] * 26


def test_a_cards_time_is_split_as_its_marks_say() -> None:
    split = Split({"attention": 0.002, "experts on GPU": 0.001, "waiting": 0.001}, {"experts on CPU": 0.003})
    parts = {"card": 0.8, "sampling": 0.1, "head": 0.05, "attention": 0.02, "experts": 0.03}
    found = split_up(parts, split)
    assert found == pytest.approx(
        {"attention": 0.4, "experts on GPU": 0.2, "waiting": 0.2, "sampling": 0.1, "head": 0.05, "layers on CPU": 0.05}
    )
    assert split_up(parts, None) == parts  # no room for one token more
    assert split_up({"head": 1.0}, split) == {"head": 1.0}


@pytest.mark.parametrize("vram", [5 << 30, 2 << 30, 40 << 30])
def test_a_cards_bytes_are_those_a_token_reads_wherever_they_are(vram: int) -> None:
    model = subject()
    placement = place(model, Budgets(vram=vram, context=4096))
    rates = [home.gpu_hits for home in placement.layers[1:]]
    read = bytes_by_card_part(model, placement, rates, HELD)
    copies = read.pop("copies")
    assert sum(read.values()) == pytest.approx(sum(bytes_by_part(model, HELD).values()), abs=2)  # two are rounded
    used = 26 * model.config.num_experts_per_tok * model.sizes.expert
    if placement.cpu_layers:
        assert read["layers on CPU"] > placement.cpu_layers * used / 26
    else:
        assert read["experts on GPU"] == pytest.approx(sum(rates) / 26 * used)
    if vram == 40 << 30:
        assert "experts on CPU" not in read
        assert copies == 4 * (2048 + model.config.vocab_size)  # an embedding there, the logits back


def test_the_cards_parts_have_bytes_and_what_ran_beside_them() -> None:
    model = subject()
    placement = place(model, Budgets(vram=5 << 30, context=4096))
    machine = Machine(assumed_cpu(8), assumed_disk(), assumed_gpu())
    parts = {"attention": 0.3, "waiting": 0.2, "copies": 0.1}
    timed = Sample(10, 1.0, parts, HELD, beside={"experts on CPU": 0.04})
    found = explain_card(timed, model, machine, placement, None)
    assert found.milliseconds_per_token == pytest.approx({"attention": 30, "waiting": 20, "copies": 10, "other": 40})
    assert found.beside_milliseconds_per_token == {"experts on CPU": 40}
    assert set(found.bytes_per_token) == {"attention", "copies", "experts on CPU"}
    shown = text(found)
    assert "beside them: experts on CPU 40.000 ms" in shown
    assert "GB/s" in shown
    guessed = explain_card(replace(timed, several=True), model, machine, placement, None)
    assert guessed.bytes_per_token == {}


def test_guesses_and_the_reference_leave_bytes_out() -> None:
    model = subject()
    guessed = Sample(10, 1.0, {"experts": 0.5}, HELD, several=True)
    found = explain(guessed, model, Limit(1e10, "measured now"), {})
    assert (found.bytes_per_token, found.limit_share, found.changes) == ({}, None, [])
    assert explain(sample(experts=0.05), model, None, {}).limit_share is None


def test_the_prompt_is_not_timed() -> None:
    profile = Profile()
    profile.part("head").seconds = 5.0
    timer = PartTimer(profile)
    assert timer.sample(3, 1.0, 0.0, HELD, False) is None  # no token came
    timer.first_token()
    profile.part("head").seconds = 5.25
    timer.first_token()
    assert timer.sample(0, 1.0, 0.0, HELD, False) is None
    found = timer.sample(3, 1.0, 0.125, HELD, False)
    assert found is not None
    assert found.parts == {"head": 0.25, "sampling": 0.125}


def test_run_and_bench_on_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path))
    asked = ["run", "demo:source", "Tell me a story", "-n", "12", "--temp", "0", "--mtp", "0", "--explain-speed"]
    outcome = CliRunner().invoke(app, [*asked, "--json"])
    assert outcome.exit_code == 0, outcome.output
    record = json.loads(outcome.stdout)
    speed = record["speed"]
    parts = speed["milliseconds_per_token"]
    assert speed["tokens"] == 11
    assert sum(parts.values()) == pytest.approx(1e3 * record["decode_seconds"] / 11)
    assert {"attention", "router", "experts", "dense", "head", "sampling", "other"} == set(parts)
    assert set(speed["bytes_per_token"]) == {"attention", "router", "experts", "dense", "head"}
    assert 0 < speed["limit_share"] < 1
    assert speed["hit_rate_by_layer"] is None
    shown = CliRunner().invoke(app, asked)
    assert "TOKENS/S" in shown.stderr
    assert "TOKENS/S" not in shown.stdout
    assert "GB/s" in shown.stderr
    alone = CliRunner().invoke(app, [*asked, "-n", "1"])
    assert "fewer than two tokens came" in alone.stderr
    benched = CliRunner().invoke(app, ["bench", "demo:source", "-p", "8", "-n", "4", "--explain-speed", "--json"])
    found = json.loads(benched.stdout)
    total = sum(found["speed"]["milliseconds_per_token"].values())
    assert total == pytest.approx(sum(found["breakdown"].values()))
