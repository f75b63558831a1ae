"""What every test needs of its surroundings."""

import base64
import dataclasses
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Triton reads this once, when it is first imported, as other conftest files do through torch: without a GPU its kernels
# run in its interpreter
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Beside other workers (pytest-xdist) each has a processor of its own: teams of threads that wait for each other by
# spinning must not share one with another team
_worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if _worker.startswith("gw"):
    _mine = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_mine[int(_worker[2:]) % len(_mine)]})


def pytest_configure() -> None:
    # A shell starts its background jobs with SIGINT ignored, and programs inherit that: CI may run the tests so.
    # The tests of Ctrl-C start programs which must not.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: beside other workers it should not be what all of them wait for."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Imports a script without an ending, by its name in scripts/."""

    def load(name: str) -> ModuleType:
        loader = SourceFileLoader(name, str(Path(__file__).resolve().parent.parent / "scripts" / name))
        spec = spec_from_loader(name, loader)
        assert spec is not None
        module = module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look there
        loader.exec_module(module)
        return module

    return load


@pytest.fixture
def refused_model(monkeypatch: pytest.MonkeyPatch) -> str:
    """A name of models.toml that has, in this test, a reason there why localmoe cannot run it."""
    from localmoe.hub import names

    known = names.registry()
    refused = dataclasses.replace(known["kimi-k2-instruct"], refused="its weights are a secret")
    monkeypatch.setattr(names, "registry", lambda: {**known, refused.name: refused})
    return refused.name


CHINESE = "人工智能正在改变世界。使用Python调用API接口，世界世界，人工智能，我们的中文，中文的世界。"
MOONSHOT = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 10: "<|im_system|>"}
MOONSHOT |= {17: "<|im_middle|>", 22: "<think>", 23: "</think>", 254: "[UNK]", 255: "[PAD]"}
MOONSHOT_CHAT = (
    "{%- for message in messages -%}{%- if loop.first and message.role != 'system' -%}"
    "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>{%- endif -%}"
    "<|im_{{ message.role }}|>{{ message.role }}<|im_middle|>{{ message.content }}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)


@pytest.fixture(scope="session")
def tiktoken_ranks() -> dict[bytes, int]:
    """A vocabulary as of a tiktoken.model: the bytes in an order of its own, then 500 merges learnt from the README."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    rust = tokenizers.Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=756, initial_alphabet=alphabet, show_progress=False)
    readme = Path(__file__).resolve().parent.parent / "README.md"
    rust.train_from_iterator([readme.read_text(encoding="utf-8"), *[CHINESE] * 20], trainer)
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # GPT-2's spelling of bytes
    others = [byte for byte in range(256) if byte not in plain]
    byte_of = {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
    ranked = sorted(rust.get_vocab(), key=rust.get_vocab().__getitem__)
    tokens = [bytes(byte_of[letter] for letter in token) for token in ranked]
    first = [token for token in tokens if len(token) == 1]
    random.Random(3).shuffle(first)
    return {token: rank for rank, token in enumerate([*first, *(token for token in tokens if len(token) > 1)])}


@pytest.fixture(scope="session")
def write_tiktoken(tiktoken_ranks: dict[bytes, int]) -> Callable[..., Path]:
    """Gives a directory Moonlight's kind of tokenizer, in place of any other: tiktoken.model, tokenizer_config.json."""

    def write(directory: Path, **config: Any) -> Path:
        lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in tiktoken_ranks.items()]
        (directory / "tiktoken.model").write_bytes(b"".join(lines))
        (directory / "tokenizer.json").unlink(missing_ok=True)
        named = {len(lines) + place: text for place, text in MOONSHOT.items()}
        added = {str(id_): {"content": text, "special": "think" not in text} for id_, text in named.items()}
        whole = {"added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "[EOS]"}
        whole |= {"auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]}}
        whole |= {"tokenizer_class": "TikTokenTokenizer", "chat_template": MOONSHOT_CHAT, **config}
        (directory / "tokenizer_config.json").write_text(json.dumps(whole), encoding="utf-8")
        return directory

    return write
