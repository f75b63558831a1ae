"""The engine with a card, from `load` to the answer: on Triton's interpreter where there is no GPU."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from localmoe.cli.speed import text
from localmoe.errors import DeviceError, UsageError
from localmoe.explain import PartTimer, explain_engine
from localmoe.load import Engine, load
from localmoe.model.card.replay import Replay
from localmoe.offload.card import CardExperts
from localmoe.offload.device import CardMemory, choose_card, hold_to
from localmoe.offload.plan import CUDA_CONTEXT, STAGING, card_workspace

MIB = 1 << 20


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Engine]:
    """Opens the demo with `room` bytes for weights and cache on the card."""
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def opened(room: int, **options: object) -> Engine:
        with load("demo:source", device="cpu") as plain:
            vram = CUDA_CONTEXT + STAGING + card_workspace(plain.config, 512) + room
        monkeypatch.setattr("localmoe.load.choose_card", lambda *_: CardMemory(device, vram))
        return load("demo:source", ctx=64, **options)  # type: ignore[arg-type]

    return opened


@pytest.mark.parametrize("what", ["localmoe.load.MtpLayer", "localmoe.model.card.model.CardModel"])
def test_what_cannot_be_opened_leaves_nothing_on_the_card(
    on_card: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError

    closed: list[CardExperts] = []
    monkeypatch.setattr(CardExperts, "close", lambda experts: closed.append(experts))
    monkeypatch.setattr(what, fails)
    with pytest.raises((DeviceError, torch.OutOfMemoryError)):
        on_card(14 * MIB, mtp=1)
    assert len(closed) == 1


def test_half_the_experts_on_the_card(on_card: Callable[..., Engine], tmp_path: Path) -> None:
    with on_card(14 * MIB) as engine:
        assert engine.placement is not None
        experts = {share.tier: share.nbytes for share in engine.placement.shares if share.part == "routed experts"}
        assert 0.2 < experts["gpu"] / sum(experts.values()) < 0.9
        ids = [5]  # a row takes seconds on the interpreter
        steps = list(engine.generate(ids, max_tokens=2))
        assert len(steps) == 2
        counts = engine.expert_hits()
        assert counts is not None
        tokens, k = len(ids) + 1, engine.config.num_experts_per_tok  # the last token drawn is not computed
        assert counts[:, 1].tolist() == [0, *[tokens * k] * 4]
        measured = engine.hit_rates()
        assert measured == [hits / (tokens * k) for hits in counts[1:, 0].tolist()]
        assert 0 < sum(measured) < 4
        assert engine.hit_rates(counts) == [layer.gpu_hits for layer in engine.placement.layers[1:]]  # nothing since
        with load("demo:source", device="cpu", kernels="reference") as reference:
            assert [s.token_id for s in steps] == [s.token_id for s in reference.generate(ids, max_tokens=2)]
        gc.collect()
        gc.disable()  # the command line leaves out what was there when the first model was
        model, arena = weakref.ref(engine.model), weakref.ref(engine.model._latents._arena)
    try:
        assert (model(), arena()) == (None, None)  # its memory on the card is free for the next one
    finally:
        gc.enable()
    (heat,) = (tmp_path / "heat").iterdir()
    counts = torch.tensor(json.loads(heat.read_text())["counts"])
    tokens = len(ids) + 1  # the last one drawn is not computed
    assert counts.sum(1).tolist() == [0.0, *[tokens * engine.config.num_experts_per_tok] * 4]


def test_the_mtp_layer_guesses_from_what_the_card_computed(on_card: Callable[..., Engine]) -> None:
    """Beside the same layer on the CPU's engine: as many guesses, the same ones right, and the tokens of neither."""
    prompt, count = [310], 3  # a row takes seconds on the interpreter

    def generated(engine: Engine) -> tuple[list[int], tuple[str, int, int]]:
        *_, last = steps = list(engine.generate(prompt, max_tokens=count, temperature=0))
        assert last.stats is not None
        guessed = last.stats.speculation
        assert guessed is not None
        return [step.token_id for step in steps], (guessed.drafter, guessed.drafted_tokens, guessed.accepted_tokens)

    with on_card(64 * MIB, mtp=1, kernels="reference") as engine:
        found = generated(engine)
    with load("demo:source", device="cpu", kernels="reference", mtp=1) as reference:
        assert found == generated(reference)
    with load("demo:source", device="cpu", kernels="reference") as plain:
        assert found[0] == [step.token_id for step in plain.generate(prompt, max_tokens=count, temperature=0)]
    drafter, _, right = found[1]
    assert drafter == "mtp"
    assert right > 0


def test_one_generation_at_a_time_and_nothing_is_learned(on_card: Callable[..., Engine], tmp_path: Path) -> None:
    with on_card(64 * MIB, deterministic=True, kernels="reference") as engine:
        first = engine.generate([5], max_tokens=3)
        next(first)
        next(engine.generate([7], max_tokens=1))
        with pytest.raises(UsageError, match="another generation has begun"):
            next(first)
        next(engine.generate([7], max_tokens=1, reuse_prefix=True))
        engine.logits([8])  # takes the card's cache too
        next(engine.generate([7], max_tokens=1, reuse_prefix=True))
    assert not (tmp_path / "heat").exists()
    assert engine.expert_uses() is None  # nothing of it holds what was on the card


def test_a_tokens_time_is_split_up_beside_a_conversation(
    on_card: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conversation goes on as if nobody had looked, and its answer's time is all in the parts."""
    monkeypatch.setattr("localmoe.engine._SPLIT_TOKENS", 1)  # a row takes seconds on the interpreter

    with on_card(64 * MIB, deterministic=True, kernels="reference") as engine:
        timer, ids = PartTimer(engine.kernels.profile, engine.expert_hits, engine.hit_rates), [5]
        for step in engine.generate([5], max_tokens=2, reuse_prefix=True):
            timer.first_token()
            ids.append(step.token_id)
        assert step.stats is not None
        sample = timer.sample(1, step.stats.decode_seconds, step.stats.sampling_seconds, 2, False)
        uses = engine.expert_uses()
        assert sample is not None
        assert uses is not None
        found = explain_engine(engine, sample, Path("nowhere"), {})
        parts = found.milliseconds_per_token
        assert {"attention", "router", "shared expert", "experts on GPU", "dense", "head", "copies"} < set(parts)
        assert "card" not in parts
        assert sum(parts.values()) == pytest.approx(1e3 * step.stats.decode_seconds)
        assert found.troubles == []
        monkeypatch.setattr(engine.model._replay, "failure", "no such\x1b graph")
        troubled = explain_engine(engine, sample, Path("nowhere"), {})
        assert "slower than it need be: decode runs without CUDA graphs: no such graph" in text(troubled)
        assert found.bytes_per_token["attention"] > 0
        assert torch.equal(uses, engine.expert_uses())
        (last,) = engine.generate([*ids, 6], max_tokens=1, reuse_prefix=True)
    with load("demo:source", device="cpu", kernels="reference") as reference:
        (wanted,) = reference.generate([*ids, 6], max_tokens=1)
    assert last.token_id == wanted.token_id
    assert last.stats is not None
    assert last.stats.reused_tokens == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_card() -> None:
    assert choose_card("auto", None) is None
    assert choose_card("cpu", None) is None
    with pytest.raises(DeviceError, match=r"--device cuda: .*(without CUDA|no NVIDIA GPU).*; --device cpu"):
        choose_card("cuda", None)
    with pytest.raises(DeviceError, match="--vram: "):
        choose_card("auto", 8 << 30)


@pytest.mark.parametrize(
    ("capability", "free", "vram", "said"),
    [
        ((7, 5), 8 << 30, None, "compute capability 7.5 and 8.0"),
        ((8, 6), 8 << 30, 10 << 30, r"--vram 10.00 GiB: the card has 8.00 of 12.00 GiB free"),
    ],
)
def test_cards_that_will_not_do(
    capability: tuple[int, int], free: int, vram: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_card(monkeypatch, capability, free)
    with pytest.raises(DeviceError, match=said):
        choose_card("cuda", vram)


def test_what_is_free_less_a_twentieth(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_card(monkeypatch, (8, 9), 10 << 30)
    found = choose_card("auto", None)
    assert found == CardMemory(torch.device("cuda", 0), int(0.95 * (10 << 30)) + CUDA_CONTEXT, "RTX")
    assert choose_card("auto", 6 << 30) == CardMemory(torch.device("cuda", 0), 6 << 30, "RTX")


def test_another_model_on_the_card_is_no_part_of_the_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_card(monkeypatch, (8, 9), 6 << 30)
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, device: limits.append(part))
    hold_to(CardMemory(torch.device("cuda", 0), (3 << 30) + CUDA_CONTEXT))
    assert limits == [0.5]


def test_a_cards_cache_is_not_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmoe.load.choose_card", lambda *_: CardMemory(torch.device("cuda", 0), 8 << 30))
    with pytest.raises(UsageError, match="a card's latent cache is bf16 or int8"):
        load("demo:source", cache_dtype="float32")


def test_the_reference_is_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def choose(wanted: str, vram: int | None) -> CardMemory | None:
        asked.append(wanted)
        return None

    monkeypatch.setattr("localmoe.load.choose_card", choose)
    load("demo:source", kernels="reference").close()
    load("demo:source").close()
    assert asked == ["cpu", "auto"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_pass_that_cannot_be_captured_is_run_as_it_is(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Graph:
        def replay(self) -> None:
            done.append("replayed")

    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        yield
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(synchronize=lambda: None))
    left = []
    monkeypatch.setattr(torch.cuda, "set_stream", left.append)
    replay = Replay(torch.device("cuda", 0))
    for _ in range(3):
        replay(1, lambda: done.append("run"))
    # run, seen by the capture, and then one of the two
    assert done == (["run", "run", "run", "run"] if fails else ["run", "run", "replayed", "replayed"])
    assert replay.failure == ("operation not permitted when stream is capturing" if fails else None)
    assert len(left) == 1  # the stream from before
    replay.forget()
    replay(1, lambda: done.append("again"))
    replay(1, lambda: done.append("again"))
    assert done[4:] == (["again", "again"] if fails else ["again", "again", "replayed"])


def test_ctrl_c_in_a_capture_is_no_driver_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ending a broken capture raises over it, as torch does."""

    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    def interrupted() -> None:
        if interrupts:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    replay, interrupts = Replay(torch.device("cuda", 0)), False
    replay(1, interrupted)
    interrupts = True
    with pytest.raises(KeyboardInterrupt):
        replay(1, interrupted)
    assert replay.failure is None


def fake_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], free: int) -> None:
    answers = {
        "is_available": True, "get_device_capability": capability, "get_device_name": "RTX", "current_device": 0,
        "mem_get_info": (free, 12 << 30),
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
