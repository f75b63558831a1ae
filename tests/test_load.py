from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import localmoe
from localmoe.errors import (
    CheckpointError,
    ContextOverflowError,
    DeviceError,
    InputError,
    ModelNotFoundError,
    TemplateError,
    UnsupportedModelError,
    UsageError,
)
from localmoe.formats.checkpoint import Checkpoint
from localmoe.generate import Settings, generate
from localmoe.kernels.dispatch import Kernels
from localmoe.load import Engine, _refuse_unquantized, load
from localmoe.memory import USABLE, MemoryNeeds
from localmoe.model.kv_cache import LatentCache
from localmoe.session import CachedTokens
from localmoe.store import ModelRef, Resolved

DEMO = Path(localmoe.__file__).parent / "data" / "demo"
WRITTEN = json.loads((DEMO / "generation_config.json").read_text())
ADVISED = {name: WRITTEN[name] for name in ("temperature", "top_p", "repetition_penalty")}
CHAT = [{"role": "user", "content": "Tell me a story about a dragon and a boat"}]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The demo's matrices are too small to share out, and waiting threads disturb whatever else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load("demo:source", kernels="reference") as opened:
        yield opened


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    """The demo in a directory of its own, to be damaged."""
    directory = tmp_path / "model"
    shutil.copytree(DEMO, directory)
    return directory


def edit_json(path: Path, **changes: object) -> None:
    """Set fields of a JSON file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def tokens(steps: Iterator[localmoe.Step]) -> list[int]:
    return [step.token_id for step in steps]


class TestPackage:
    def test_importing_it_imports_no_torch(self) -> None:
        code = (
            "import sys, localmoe; assert localmoe.__version__; assert 'load' in dir(localmoe); "
            "assert 'torch' not in sys.modules; localmoe.load; localmoe.Engine; localmoe.Step; "
            "assert callable(localmoe.load)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_load_is_a_function_whatever_was_imported_before(self) -> None:
        """This module has imported `localmoe.load` as a module, which Python then puts in the attribute's place."""
        with localmoe.load(DEMO, kernels="reference") as engine:
            assert isinstance(engine, localmoe.Engine)

    def test_unknown_names_are_attribute_errors(self) -> None:
        with pytest.raises(AttributeError, match="'lod'"):
            localmoe.lod  # noqa: B018


class TestOpening:
    def test_the_demo(self, engine: Engine) -> None:
        assert engine.config.model_type == "deepseek_v3"
        assert engine.path == DEMO
        assert engine.max_context == engine.config.max_position_embeddings >= 512
        assert engine.kernels.tier == "reference"
        assert engine.tokenizer.eos_ids == {1}
        assert engine.chat_template is not None
        assert engine.generation_defaults == ADVISED

    def test_touches_no_expert_and_copies_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        used: list[str] = []
        weight = Checkpoint.weight
        monkeypatch.setattr(Checkpoint, "weight", lambda self, module: used.append(module) or weight(self, module))
        monkeypatch.setattr(Checkpoint, "read", lambda self, name: pytest.fail(f"{name} was copied"))
        with load(DEMO, kernels="reference") as engine:
            assert used
            assert not [module for module in used if ".experts." in module]
            engine.logits([0, 5])
            assert [module for module in used if ".experts." in module]

    def test_a_bare_name_that_is_here_only_as_source(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path))
        with pytest.raises(ModelNotFoundError, match=r"`localmoe quantize demo`.*demo:source"):
            load("demo")

    def test_a_bare_name_of_a_checkpoint_that_is_already_int4(self) -> None:
        bare = Resolved(ModelRef("x/y", None, None), "x/y", DEMO, "source", None)
        _refuse_unquantized(bare, SimpleNamespace(quantization="int4"))  # type: ignore[arg-type]
        with pytest.raises(ModelNotFoundError):
            _refuse_unquantized(bare, SimpleNamespace(quantization=None))  # type: ignore[arg-type]

    def test_context(self) -> None:
        with load(DEMO, ctx=40) as engine:
            assert engine.max_context == 40
            with pytest.raises(ContextOverflowError, match="41 tokens do not fit the context of 40"):
                engine.logits(range(41))
            with pytest.raises(ContextOverflowError, match="prompt has 40 tokens"):
                engine.generate(range(40))
            assert len(list(engine.generate(list(range(7, 30))))) <= 17
            most = engine.config.max_position_embeddings
        with pytest.raises(UsageError, match=f"--ctx {most + 1}: the model was made for at most {most}"):
            load(DEMO, ctx=most + 1)
        with pytest.raises(DeviceError, match=r"need 0\.01 GiB of memory and there are 0\.00"):
            load(DEMO, ram=1 << 20)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"device": "cuda"}, DeviceError, "--device cuda: .*; --device cpu computes without a card"),
            ({"vram": 1 << 30}, DeviceError, "--vram: .*; --device cpu"),
            ({"device": "cpu", "vram": 1 << 30}, UsageError, "leave out one of them"),
            ({"device": "tpu"}, UsageError, "'tpu' is unknown"),
            ({"kernels": "sse9"}, UsageError, "sse9"),
            ({"threads": 0}, UsageError, "threads"),
        ],
    )
    def test_options_that_cannot_be_met(self, options: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            load(DEMO, **options)

    def test_what_cannot_be_opened_is_closed_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its files were being brought into memory already."""
        closed: list[Path] = []
        monkeypatch.setattr(Checkpoint, "close", lambda checkpoint: closed.append(checkpoint.directory))
        with pytest.raises(UsageError, match="ctx"):
            load("demo:source", ctx=1 << 40)
        assert closed == [DEMO]

        def fails(*_: object) -> None:
            raise MemoryError

        monkeypatch.setattr("localmoe.load.MtpLayer", fails)
        with pytest.raises(MemoryError):
            load("demo:source", mtp=1)
        assert closed[1:] == [DEMO] * 2  # the engine's, and what is there without one

    def test_threads_are_torchs_too(self) -> None:
        try:
            with load(DEMO, threads=2, device="cpu"):
                assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(1)

    def test_a_closed_engine_says_so(self) -> None:
        engine = load(DEMO, kernels="reference")
        engine.close()
        engine.close()
        for call in (lambda: engine.logits([1]), lambda: engine.generate("x")):
            with pytest.raises(UsageError, match="closed"):
                call()


class TestBrokenDirectories:
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"model_type": "llama"}, UnsupportedModelError, "llama"),
            ({"hidden_size": 512}, CheckpointError, r"\[4096, 512\]"),
            ({"n_routed_experts": 20}, CheckpointError, r"experts\.16|mlp\.gate"),
            ({"quantization_config": None}, CheckpointError, "FP8"),
            ({"eos_token_id": "x"}, CheckpointError, r"config\.json: eos_token_id"),
        ],
    )
    def test_configs(self, model_copy: Path, changes: dict, error: type[Exception], message: str) -> None:
        edit_json(model_copy / "config.json", **changes)
        with pytest.raises(error, match=message) as caught, load(model_copy) as engine:
            engine.generate("x")
        assert "\n" not in str(caught.value)

    def test_no_directory_and_no_config(self, tmp_path: Path) -> None:
        for directory in (tmp_path, tmp_path / "none"):
            with pytest.raises(ModelNotFoundError, match=str(directory)):
                load(directory)

    def test_a_config_that_is_no_json(self, model_copy: Path) -> None:
        (model_copy / "config.json").write_text("{,", encoding="utf-8")
        with pytest.raises(CheckpointError, match="not valid JSON"):
            load(model_copy)

    def test_a_shard_cut_short(self, model_copy: Path) -> None:
        shard = model_copy / "model.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load(model_copy)

    def test_without_a_tokenizer_ids_work_and_text_does_not(self, model_copy: Path, engine: Engine) -> None:
        (model_copy / "tokenizer.json").unlink()
        ids = engine.prompt_ids("Once upon a time")
        wanted = tokens(engine.generate(ids, max_tokens=6))
        with load(model_copy, kernels="reference") as bare:
            steps = list(bare.generate(ids, max_tokens=6))
            assert tokens(iter(steps)) == wanted
            assert {step.text for step in steps} == {""}
            for prompt in ("Once upon a time", CHAT):
                with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
                    bare.generate(prompt)
            with pytest.raises(UsageError, match="tokenizer"):
                bare.generate(ids, stop=["x"])

    def test_a_damaged_tokenizer_is_named(self, model_copy: Path) -> None:
        (model_copy / "tokenizer.json").write_text('{"model": 1}', encoding="utf-8")
        with load(model_copy) as engine, pytest.raises(CheckpointError, match="not a usable tokenizer"):
            engine.generate("x")

    def test_without_a_chat_template(self, model_copy: Path) -> None:
        edit_json(model_copy / "tokenizer_config.json", chat_template=None)
        with load(model_copy) as engine:
            assert engine.chat_template is None
            with pytest.raises(TemplateError, match="no chat template; `--raw`"):
                engine.generate(CHAT)

    @pytest.mark.parametrize(
        ("written", "wanted"),
        [
            ({"do_sample": False}, {}),
            ({"temperature": None}, {name: value for name, value in ADVISED.items() if name != "temperature"}),
            ({"top_k": 20, "max_new_tokens": 5}, ADVISED | {"top_k": 20}),
            ({"temperature": -1}, "temperature must be 0 or more"),
            ({"top_p": "0.9"}, "top_p"),
        ],
    )
    def test_generation_defaults_are_checked(self, model_copy: Path, written: dict, wanted: dict | str) -> None:
        edit_json(model_copy / "generation_config.json", **written)
        with load(model_copy) as engine:
            if isinstance(wanted, dict):
                assert engine.generation_defaults == wanted
            else:
                with pytest.raises(CheckpointError, match=rf"generation_config\.json: {wanted}"):
                    _ = engine.generation_defaults


class TestGenerating:
    def test_greedy_is_the_argmax_of_the_logits_and_repeats(self, engine: Engine) -> None:
        ids = engine.prompt_ids("Once upon a time")
        steps = list(engine.generate("Once upon a time", max_tokens=24))
        answer = tokens(iter(steps))
        assert answer == tokens(engine.generate(ids, max_tokens=24))
        logits = engine.logits([*ids, *answer])
        assert logits.shape == (len(ids) + 24, 4096)
        assert logits.dtype == torch.float32
        assert not logits.is_inference()
        predicted = logits[len(ids) - 1 : -1]
        assert predicted.argmax(dim=1).tolist() == answer
        wanted = predicted.log_softmax(dim=1)[range(24), answer]
        assert [step.logprob for step in steps] == pytest.approx(wanted.tolist(), abs=1e-3)
        assert "".join(step.text for step in steps) == engine.tokenizer.decode(answer)

    @pytest.mark.parametrize("chunk", [1, 3, 7, 16])
    def test_uneven_prefill_chunks_give_the_same_tokens(self, engine: Engine, chunk: int) -> None:
        ids = engine.prompt_ids(CHAT)
        cached = CachedTokens(LatentCache(engine.config, engine.max_context))
        model = engine.model
        chunked = tokens(generate(model, cached, ids, Settings(max_tokens=20), prefill_chunk=chunk))
        assert chunked == tokens(engine.generate(CHAT, max_tokens=20))

    def test_a_seed_fixes_a_sampled_story(self, engine: Engine) -> None:
        def story(seed: int) -> list[int]:
            return tokens(engine.generate(CHAT, max_tokens=16, temperature=1.0, top_p=0.95, seed=seed))

        assert story(3) == story(3)
        assert len({tuple(story(seed)) for seed in (1, 2, 3)}) > 1

    def test_a_stop_string_cuts_the_text(self, engine: Engine) -> None:
        whole = "".join(step.text for step in engine.generate("Once upon a time", max_tokens=24))
        stop = whole[10:14]
        steps = list(engine.generate("Once upon a time", max_tokens=24, stop=stop))
        assert "".join(step.text for step in steps) == whole[: whole.index(stop)]
        assert steps[-1].finish_reason == "stop"

    @pytest.mark.parametrize("mtp", [0, 2])
    def test_control_tokens_are_no_text_and_one_that_begins_a_turn_ends_a_chats_answer(self, mtp: int) -> None:
        with load("demo:source", kernels="portable", threads=1, mtp=mtp) as engine:
            user, pad = (engine.tokenizer.control_tokens[token] for token in ("<｜User｜>", "<｜▁pad▁｜>"))
            for prompt, token, ends in ((CHAT, user, True), ("Once", user, False), (CHAT, pad, False)):
                steps = list(engine.generate(prompt, max_tokens=4, logit_bias={token: 100.0}))
                assert [step.token_id for step in steps] == [token] * (1 if ends else 4)
                assert "".join(step.text for step in steps) == ""
                assert steps[-1].finish_reason == ("stop" if ends else "length")
                assert steps[-1].stats is not None
                assert steps[-1].stats.completion_tokens == len(steps)
            # a word of the answer, were it one: guessed tokens after it do not count
            whole = list(engine.generate(CHAT, max_tokens=24))
            drawn = tokens(iter(whole))
            end = next(i for i in range(8, 24) if drawn[i] not in drawn[:i])
            engine.__dict__["_turn_ids"] = frozenset({drawn[end]})
            steps = list(engine.generate(CHAT, max_tokens=24))
            assert tokens(iter(steps)) == drawn[: end + 1]
            assert "".join(step.text for step in steps) == engine.tokenizer.decode(drawn[:end])
            assert steps[-1].finish_reason == "stop"

    def test_reuse_across_turns_gives_the_same_answer(self, engine: Engine) -> None:
        first = list(engine.generate(CHAT, max_tokens=8, reuse_prefix=True))
        reply = {"role": "assistant", "content": "".join(step.text for step in first)}
        chat = [*CHAT, reply, {"role": "user", "content": "And then?"}]
        second = list(engine.generate(chat, max_tokens=8, reuse_prefix=True))
        fresh = list(engine.generate(chat, max_tokens=8))
        assert tokens(iter(second)) == tokens(iter(fresh))
        assert second[-1].stats is not None
        assert fresh[-1].stats is not None
        assert second[-1].stats.reused_tokens >= len(engine.prompt_ids(CHAT))
        assert fresh[-1].stats.reused_tokens == 0

    @pytest.mark.parametrize("tier", ["portable", "auto"])
    def test_other_kernel_tiers_agree_on_the_unquantized_demo(self, engine: Engine, tier: str) -> None:
        ids = engine.prompt_ids("Once upon a time there was")
        with load(DEMO, kernels=tier) as other:
            assert other.kernels.tier == (tier if tier != "auto" else Kernels.choose("auto").tier)
            # Only the latent cache is narrower: FP8 weights have no kernel but the reference
            found, wanted = (each.logits(ids).double().log_softmax(-1) for each in (other, engine))
            assert float((wanted.exp() * (wanted - found)).sum(-1).mean()) < 1e-3


class TestPrompts:
    def test_text_ids_and_messages(self, engine: Engine) -> None:
        tokenizer = engine.tokenizer
        assert engine.prompt_ids("Hi <｜User｜>") == [0, *tokenizer.encode("Hi ", add_bos=False), 3]
        assert engine.prompt_ids("Hi", add_bos=False) == tokenizer.encode("Hi", add_bos=False)
        assert engine.prompt_ids([3, 1, 4]) == [3, 1, 4]
        assert engine.prompt_ids([{"role": "user", "content": "Hi"}]) == [
            0,
            3,
            *tokenizer.encode("Hi", add_bos=False),
            4,
            6,
        ]

    def test_an_empty_one(self, engine: Engine) -> None:
        for prompt in ([], ()):
            with pytest.raises(InputError, match="empty"):
                engine.generate(prompt)
        with pytest.raises(InputError, match="empty"):
            engine.generate("", add_bos=False)
        assert len(list(engine.generate("", max_tokens=1))) == 1  # from the beginning token

    @pytest.mark.parametrize("prompt", [[1, "x"], [1.5], [CHAT[0], 3], b"x".split()])
    def test_something_else(self, engine: Engine, prompt: list) -> None:
        with pytest.raises(UsageError, match="a prompt is"):
            engine.prompt_ids(prompt)

    def test_ids_outside_the_vocabulary(self, engine: Engine) -> None:
        for bad in (4096, -1):
            with pytest.raises(InputError, match="vocabulary"):
                list(engine.generate([1, bad]))
        with pytest.raises(InputError):
            engine.logits([])

    def test_thinking_is_refused_where_nothing_switches_it(self, engine: Engine, model_copy: Path) -> None:
        edit_json(model_copy / "tokenizer_config.json", chat_template="{{ messages[0].content }}")
        with load(model_copy) as fixed, pytest.raises(UsageError, match="cannot switch thinking"):
            fixed.prompt_ids(CHAT, thinking=False)
        with pytest.raises(UsageError, match="without messages"):
            engine.prompt_ids("Hi", thinking=True)

    def test_thinking_reaches_a_template_that_knows_it(self, model_copy: Path) -> None:
        template = "{{ '<think>' if thinking else '</think>' }}"
        edit_json(model_copy / "tokenizer_config.json", chat_template=template)
        with load(model_copy) as engine:
            assert [engine.prompt_ids(CHAT, thinking=choice) for choice in (True, False, None)] == [[5], [6], [6]]


def test_a_model_larger_than_memory_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantize.pipeline import quantize

    path, ids = tmp_path / "artifact", list(range(40, 90))
    quantize(DEMO, path, "compact", grid="absmax")
    with load(path, threads=2, ctx=128) as whole:
        assert not whole.reads_the_disk
        wanted = whole.logits(ids)
        needs = MemoryNeeds.of(whole.config, whole.tensors, 2 * whole.config.latent_width)
    budget = int((needs.always + needs.experts // 2 + 128 * needs.cache_per_token) / USABLE)
    for tells in (True, False):
        monkeypatch.setattr(Checkpoint, "tells_what_is_in_memory", lambda self, tells=tells: tells)
        with load(path, threads=2, ctx=128, ram=budget) as part:
            assert part.reads_the_disk
            assert torch.equal(part.logits(ids), wanted)
            assert part.kernels.bytes_asked > 0 or tells  # the files are in memory: only who is not told asks for them
