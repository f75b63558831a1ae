"""A session comes back as it was, or not at all."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import localmoe
from localmoe import session_file
from localmoe.errors import ContextOverflowError, SessionError, StorageError
from localmoe.load import Engine, load
from localmoe.model.card.cache import CardCache, CardLatents
from localmoe.model.config import ModelConfig
from localmoe.model.kv_cache import LatentCache, row_bytes
from localmoe.session import CachedTokens
from localmoe.session_file import restore, write
from localmoe.sessions import Facts
from localmoe.speculative import MtpDrafter

DEMO = Path(localmoe.__file__).parent / "data" / "demo"
HASH = "ab" * 32
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def shape(rank: int, rope: int, layers: int) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": "deepseek_v3",
            **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 8),
            **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 4),
            **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_shared_experts", "n_group"), 1),
            **dict.fromkeys(("num_experts_per_tok", "routed_scaling_factor", "topk_group"), 1),
            "kv_lora_rank": rank,
            "qk_rope_head_dim": rope,
            "num_hidden_layers": layers,
            "first_k_dense_replace": 0,
            "n_routed_experts": 4,
            "q_lora_rank": None,
            "vocab_size": 50,
            "max_position_embeddings": 32768,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        }
    )


SMALL = shape(8, 4, 2)


def filled(count: int, dtype: str = "bf16", config: ModelConfig = SMALL, capacity: int = 64) -> CachedTokens:
    cache = LatentCache(config, capacity, DTYPES[dtype])
    torch.manual_seed(count)
    for layer in cache.layers:
        cache.append(layer, torch.randn(count, config.latent_width))
    cached = CachedTokens(cache)
    cached.adopt(range(count))
    return cached


def rows(cached: CachedTokens) -> list[Tensor]:
    return [cached.cache.reserve(layer, 0).clone() for layer in cached.cache.layers]


def facts(dtype: str = "bf16") -> Facts:
    return Facts([{"role": "user", "content": "Hi"}], model="m", model_hash=HASH, cache_dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 40])
def test_every_bit_comes_back(tmp_path: Path, dtype: str, count: int) -> None:
    path, cached = tmp_path / "x.safetensors", filled(count, dtype)
    heat = torch.rand(2, 4)
    written = write(path, facts(dtype), cached, heat)
    fresh = CachedTokens(LatentCache(SMALL, 64, DTYPES[dtype]))
    restored = restore(path, fresh, HASH, dtype)
    assert restored.facts == written
    assert restored.expert_heat is not None
    assert torch.equal(restored.expert_heat, heat)
    assert fresh.token_ids == cached.token_ids == tuple(range(count))
    for found, wanted in zip(rows(fresh), rows(cached), strict=True):
        assert torch.equal(found, wanted)
    assert path.stat().st_mode & 0o077 == 0
    read = load_file(path)  # the library's own reader
    assert read["token_ids"].tolist() == list(range(count))
    assert torch.equal(read["latents.1"], rows(cached)[1])


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_file_is_as_large_as_its_latents(tmp_path: Path, dtype: str) -> None:
    config = shape(512, 64, 27)  # V2-Lite's
    path, count = tmp_path / "x.safetensors", 1024
    write(path, facts(dtype), filled(count, dtype, config, count))
    assert path.stat().st_size == pytest.approx(count * 27 * row_bytes(config, DTYPES[dtype]), rel=0.02)


def test_damage_anywhere_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, facts(), filled(3))
    good = path.read_bytes()

    def refused(data: bytes) -> None:
        path.write_bytes(data)
        with pytest.raises(SessionError, match="session x") as caught:
            restore(path, CachedTokens(LatentCache(SMALL, 64, torch.bfloat16)), HASH, "bf16")
        assert "\n" not in str(caught.value)

    for place in range(0, len(good), 5):
        flipped = bytearray(good)
        flipped[place] ^= 1 << place % 8
        refused(bytes(flipped))
    for length in (0, 7, 8, 100, len(good) // 2, len(good) - 33, len(good) - 1):
        refused(good[:length])
    refused(good + b"\0")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, facts(), filled(10))

    def open_with(config: ModelConfig = SMALL, capacity: int = 64, model: str = HASH, dtype: str = "bf16") -> None:
        restore(path, CachedTokens(LatentCache(config, capacity, DTYPES[dtype])), model, dtype, "y:compact")

    open_with(capacity=11)
    with pytest.raises(SessionError, match="session x is m's, and its latents mean nothing to y:compact"):
        open_with(model="cd" * 32)
    with pytest.raises(SessionError, match="in bf16, not int8: --cache-dtype bf16"):
        open_with(dtype="int8")
    with pytest.raises(ContextOverflowError, match="holds 10 tokens and the context 10"):
        open_with(capacity=10)
    with pytest.raises(SessionError, match="damaged"):  # a header that lies about the model
        open_with(config=shape(8, 4, 3))
    with pytest.raises(SessionError, match="there is no session nothing"):
        restore(tmp_path / "nothing.safetensors", filled(0), HASH, "bf16")


def test_a_state_without_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(cached: CachedTokens) -> dict[str, Tensor]:
        return plain(cached) | {"mtp.latents": torch.zeros(2, 12), "mtp.state": torch.tensor(0.0)}

    plain = session_file._tensors
    monkeypatch.setattr(session_file, "_tensors", written)
    path = tmp_path / "x.safetensors"
    write(path, facts(), filled(3))
    drafter = MtpDrafter(SimpleNamespace(width=8), LatentCache(SMALL, 64))
    with pytest.raises(SessionError, match="session x: its file is cut short or damaged"):
        restore(path, CachedTokens(LatentCache(SMALL, 64, torch.bfloat16), drafter), HASH, "bf16")


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_cache_whose_layers_lie_in_two_places(tmp_path: Path, dtype: str) -> None:
    """As on a card, whose memory is taken at once; the file is the same one, and opens on either."""
    path, cached = tmp_path / "x.safetensors", filled(20, dtype)
    write(path, facts(dtype), cached)
    latents = CardLatents(SMALL, 64, DTYPES[dtype], [0], torch.device("cpu"))
    on_card = CachedTokens(CardCache(SMALL, DTYPES[dtype], latents, 64))
    restore(path, on_card, HASH, dtype)
    assert all(torch.equal(*pair) for pair in zip(rows(on_card), rows(cached), strict=True))
    other = tmp_path / "y.safetensors"
    write(other, facts(dtype), on_card)
    assert other.read_bytes() == path.read_bytes()


class TestFailures:
    """The file that was there and the conversation in memory are whole after any of them."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Iterator[Path]:
        path = tmp_path / "x.safetensors"
        write(path, facts(), filled(5))
        yield path
        fresh = CachedTokens(LatentCache(SMALL, 64, torch.bfloat16))
        assert restore(path, fresh, HASH, "bf16").facts.tokens == 5
        assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]

    def test_a_full_disk(self, path: Path) -> None:
        cached = filled(60)
        before = rows(cached)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
            with pytest.raises(StorageError, match=r"session cannot be written \([0-9,]+ bytes\): File too large"):
                write(path, facts(), cached)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert all(torch.equal(*pair) for pair in zip(before, rows(cached), strict=True))
        assert cached.token_ids == tuple(range(60))

    @pytest.mark.parametrize("call", ["posix_fallocate", "write", "fsync", "replace"])
    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
    def test_at_every_step(self, path: Path, call: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Path if call == "replace" else os, call, fail)
            with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
                write(path, facts(), filled(6))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from quantize.pipeline import quantize

    directory = tmp_path_factory.mktemp("session") / "compact"
    quantize(DEMO, directory, "compact", grid="absmax")
    return directory


class TestWithAModel:
    def answer(self, engine: Engine, prompt: list[int]) -> tuple[list[int], int, float | None]:
        steps = list(engine.generate(prompt, max_tokens=24, temperature=0.8, seed=3, reuse_prefix=True))
        stats = steps[-1].stats
        assert stats is not None
        rate = None if stats.speculation is None else stats.speculation.acceptance_rate
        return [step.token_id for step in steps], stats.prompt_tokens - stats.reused_tokens, rate

    @pytest.mark.parametrize(("mtp", "cache_dtype"), [(0, "auto"), (0, "int8"), (2, "auto")])
    def test_a_conversation_goes_on_as_if_it_had_not_stopped(
        self, artifact: Path, tmp_path: Path, mtp: int, cache_dtype: str
    ) -> None:
        path = tmp_path / "x.safetensors"
        options = {"ctx": 256, "threads": 1, "mtp": mtp, "cache_dtype": cache_dtype}
        with load(artifact, **options) as engine:
            ids = engine.prompt_ids("Once upon a time")
            first, _, _ = self.answer(engine, ids)
            written = engine.save_session(path, Facts([]))
            assert written.tokens == len(ids) + len(first) - 1
            assert written.draft_tokens == (written.tokens - 1 if mtp else 0)
            prompt = [*ids, *first, 9, 8]
            stayed = self.answer(engine, prompt)
        with load(artifact, **options) as engine:
            assert engine.open_session(path) == written
            assert self.answer(engine, prompt) == stayed
            assert stayed[1] == 3  # the answer's last token and the two new ones

    def test_guessing_begins_and_ends_with_any_session(self, artifact: Path, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        answers = []
        for mtp in (0, 1, 0):
            with load(artifact, ctx=256, threads=1, mtp=mtp) as engine:
                ids = engine.prompt_ids("Once upon a time")
                if path.exists():
                    engine.open_session(path)
                tokens, computed, _ = self.answer(engine, ids)
                answers.append(tokens)
                assert computed == (len(ids) if len(answers) == 1 else 1)
                engine.save_session(path, Facts([]))
        assert answers[0] == answers[1] == answers[2]

    def test_another_model_is_refused_and_the_engine_goes_on(self, artifact: Path, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        with load(DEMO, cache_dtype="bf16", threads=1) as engine:
            self.answer(engine, [1, 2, 3])
            engine.save_session(path, Facts([]))
        with load(artifact, ctx=256, threads=1) as engine:
            engine.expert_uses = lambda: torch.ones(5, 16)  # counted on a card only
            self.answer(engine, [1, 2, 3])
            with pytest.raises(SessionError, match="another model's, and its latents mean nothing to this model"):
                engine.open_session(path)
            assert self.answer(engine, [1, 2, 3])[1] == 1
            engine.save_session(tmp_path / "y.safetensors", Facts([]))
            assert load_file(tmp_path / "y.safetensors")["expert_heat"].sum() == 80

    def test_the_heat_of_a_session_is_used_and_added_to(self, artifact: Path, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        heat = torch.arange(5 * 16.0).view(5, 16)
        with load(artifact, ctx=256, threads=1) as engine:
            engine.expert_uses = lambda: heat  # counted on a card only
            self.answer(engine, [1, 2, 3])
            engine.save_session(path, Facts([]))
        expected: list[Tensor] = []
        with load(artifact, ctx=256, threads=1) as engine:
            engine._card = SimpleNamespace(expect=expected.append, uses=lambda: None, close=lambda: None)
            engine.open_session(path)
            assert torch.equal(expected[0], heat)
            engine.save_session(path, Facts([]))  # where nothing is counted it stays
            assert torch.equal(load_file(path)["expert_heat"], heat)
            engine.expert_uses = lambda: torch.ones(5, 16, dtype=torch.int64)
            engine.save_session(path, Facts([]))
            assert torch.equal(load_file(path)["expert_heat"], heat + 1)
            engine.expert_uses = lambda: torch.ones(2, 3)
            engine._session_heat = None
            engine.save_session(path, Facts([]))
            engine.open_session(path)  # not of this model's shape: a hint, and left alone
            assert len(expected) == 1

    def test_an_mtp_layer_takes_up_a_session_that_it_knows_nothing_of(self, artifact: Path, tmp_path: Path) -> None:
        """It attends to what comes from there on, and so do its rows when they are kept."""
        path, more = tmp_path / "x.safetensors", [9, 8, 7]
        with load(artifact, ctx=512, threads=1) as engine:
            ids = engine.prompt_ids("Once upon a time a fox and a boat went down the river, and the drum said nothing")
            tokens = self.answer(engine, ids)[0]
            before = engine.save_session(path, Facts([]))
            assert before.draft_tokens == 0
            prompt = [*ids, *tokens, *more]
            wanted, computed, _ = self.answer(engine, prompt)
        for _ in range(2):  # from a file without rows, and then from one with some
            with load(artifact, ctx=512, threads=1, mtp=1) as engine:
                engine.open_session(path)
                found = self.answer(engine, prompt)
                assert found[:2] == (wanted, computed)
                assert found[2] is not None
                after = engine.save_session(path, Facts([]))
                prompt = [*prompt, *wanted, *more]
            with load(artifact, ctx=512, threads=1) as engine:
                engine.open_session(path)
                wanted, computed, _ = self.answer(engine, prompt)
        assert 0 < after.draft_tokens < after.tokens - before.tokens + 8
