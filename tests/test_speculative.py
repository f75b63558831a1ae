"""Guessing changes how many tokens a pass gives and never which."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import localmoe
from localmoe.formats.weights import Int8Weight
from localmoe.load import Engine, load
from localmoe.model.kv_cache import LatentCache
from localmoe.model.layers import embedding_rows
from localmoe.speculative import LookupDrafter

DEMO = Path(localmoe.__file__).parent / "data" / "demo"
PROMPTS = ("Once upon a time", "The fox said to the drum", "In the morning the children", "It was a dark night and")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from quantize.pipeline import quantize

    directory = tmp_path_factory.mktemp("mtp") / "compact"
    quantize(DEMO, directory, "compact", grid="absmax")
    return directory


@pytest.fixture(scope="module")
def plain(artifact: Path) -> Iterator[Engine]:
    with load(artifact, ctx=256, threads=1) as engine:
        yield engine


def tokens(engine: Engine, prompt: object, **settings: object) -> list[int]:
    return [step.token_id for step in engine.generate(prompt, max_tokens=48, **settings)]


@pytest.mark.parametrize("mtp", [1, 7, None])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_mtp_layer_changes_no_token(artifact: Path, plain: Engine, mtp: int | None, temperature: float) -> None:
    accepted = 0
    with load(artifact, ctx=256, threads=1, mtp=mtp) as engine:
        for seed, prompt in enumerate(PROMPTS):
            settings = {"temperature": temperature, "top_p": 0.95, "seed": seed, "frequency_penalty": 0.1}
            steps = list(engine.generate(prompt, max_tokens=48, **settings))
            assert [step.token_id for step in steps] == tokens(plain, prompt, **settings)
            assert steps[-1].stats is not None
            stats = steps[-1].stats.speculation
            assert stats is not None
            assert stats.drafter == "mtp"
            assert len(steps) <= 1 + stats.passes + stats.accepted_tokens
            accepted += stats.accepted_tokens
    assert accepted > 0 or mtp is None


def test_turns_that_go_back_and_on_change_no_token(artifact: Path, plain: Engine) -> None:
    """The MTP layer's cache follows every truncation of the main one."""
    with load(artifact, ctx=256, threads=1, mtp=2) as engine:
        first = engine.prompt_ids(PROMPTS[0])
        for prompt in (first, [*first, 9, 9], first[:3], [*first, 9, 8, 7], [5, 6, 7], [5, 6, 7, 8]):
            steps = list(engine.generate(prompt, max_tokens=20, reuse_prefix=True))
            assert [step.token_id for step in steps] == tokens(plain, prompt)[: len(steps)]
            assert len(steps) == 20 or steps[-1].finish_reason == "stop"
            stats = steps[-1].stats
            assert stats is not None
            if prompt == [*first, 9, 9]:
                assert stats.reused_tokens >= len(first) - 1


def test_acceptance_is_an_independent_count_over_the_same_text(artifact: Path) -> None:
    """One guess a pass: the layer run over the whole text at once, from the model's states, is right as often."""
    with load(artifact, ctx=256, threads=1, mtp=1) as engine:
        counted = agreed = drafted = accepted = 0
        for prompt in PROMPTS:
            ids = engine.prompt_ids(prompt)
            steps = list(engine.generate(ids, max_tokens=100))
            assert steps[-1].stats is not None
            assert steps[-1].stats.speculation is not None
            drafted += steps[-1].stats.speculation.drafted_tokens
            accepted += steps[-1].stats.speculation.accepted_tokens
            text = [*ids, *(step.token_id for step in steps)]
            layer = engine._mtp
            assert layer is not None
            main, own = LatentCache(engine.config, 256), layer.cache(256, torch.float32)
            with torch.inference_mode():
                states = engine.model.states(torch.tensor(text[:-1]), main)
                right = [
                    int(layer.logits(layer.step(states[i : i + 1], [text[i + 1]], own))[0].argmax()) == text[i + 2]
                    for i in range(len(text) - 2)
                ]
            # a guess is made where a pass begins: after a wrong one, or after two tokens
            place = len(ids) - 1
            while place < len(right):
                counted += 1
                agreed += right[place]
                place += 2 if right[place] else 1
        assert accepted > 10
        assert abs(accepted / drafted - agreed / counted) < 0.02


def test_an_embedding_of_its_own_is_read_packed_too(tmp_path: Path) -> None:
    """Checkpoints hold the MTP layer's copy of the embedding; one that differs is kept, in int8 like the first."""
    from quantize.pipeline import quantize

    source, artifact = tmp_path / "source", tmp_path / "artifact"
    shutil.copytree(DEMO, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.5.embed_tokens.weight"][7] *= 2
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantize(source, artifact, "local", grid="absmax", gate=None)
    with load(artifact, ctx=256, threads=1) as engine:
        wanted = tokens(engine, PROMPTS[0])
    with load(artifact, ctx=256, threads=1, mtp=1) as engine:
        assert engine._mtp is not None
        own, ids = engine._mtp._embedding, torch.tensor([6, 7])
        assert isinstance(own, Int8Weight)
        ratio = embedding_rows(own, ids).norm(dim=1) / engine.model.embed(ids).norm(dim=1)
        torch.testing.assert_close(ratio, torch.tensor([1.0, 2.0]), rtol=1e-3, atol=0)
        steps = list(engine.generate(PROMPTS[0], max_tokens=48))
        assert [step.token_id for step in steps] == wanted
        stats = steps[-1].stats
        assert stats is not None
        assert stats.speculation is not None
        assert stats.speculation.accepted_tokens > 0


def test_what_a_text_repeats_is_guessed_and_changes_no_token(artifact: Path, plain: Engine) -> None:
    with load(artifact, ctx=256, threads=1, mtp=4) as engine:
        engine.speculate(None, 4)
        ids = engine.prompt_ids("the fox and the drum " * 12)
        steps = list(engine.generate(ids, max_tokens=48))
        assert [step.token_id for step in steps] == tokens(plain, ids)
        assert steps[-1].stats is not None
        assert steps[-1].stats.speculation is not None
        assert steps[-1].stats.speculation.drafter == "lookup"


def test_lookup_takes_the_last_place_of_the_longest_match() -> None:
    drafter = LookupDrafter()
    ids = [1, 2, 3, 4, 9, 2, 3, 5, 1, 2]
    drafter.observe(ids, None)
    choose = lambda logits, ahead: 0  # noqa: E731
    assert drafter.draft(ids, 3, 2, choose) == [4, 9]  # 1 2 3 counts for more than the later 2 3
    assert drafter.draft(ids, 7, 2, choose) == []
    kept = ids[:8]
    assert drafter.keep(8) == 8
    drafter.observe(kept, None)
    assert drafter.draft(kept, 2, 3, choose) == []
