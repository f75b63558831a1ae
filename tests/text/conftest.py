"""Small tokenizers of the kinds that checkpoints ship."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import localmoe.errors
from localmoe.text import Tokenizer

DEMO = Path(localmoe.errors.__file__).parent / "data" / "demo"


@pytest.fixture(scope="session")
def demo() -> Tokenizer:
    return Tokenizer.from_directory(DEMO)


@pytest.fixture(scope="session")
def sentencepiece_like() -> Tokenizer:
    """Spaces as U+2581, a decoder that drops the first one, and bytes as fallback tokens."""
    vocabulary = {"<s>": 0, "</s>": 1}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for piece in ("▁", "▁the", "▁cat", "cat", "s", "é", "."):
        vocabulary[piece] = len(vocabulary)
    rust = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    rust.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(rust.to_str(), special_tokens={"bos_token": "<s>"}, add_bos=True, eos_ids=[1])


@pytest.fixture(scope="session")
def v3_like() -> Tokenizer:
    """As DeepSeek-V3's: byte-level BPE, turn markers that are added tokens but not "special", padded vocabulary."""
    rust = tokenizers.Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = ["the quick brown fox thinks about the lazy dog"] * 3
    rust.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    rust.add_special_tokens(["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"])
    rust.add_tokens(
        [tokenizers.AddedToken(t, normalized=False) for t in ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")]
    )
    special = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    return Tokenizer(rust.to_str(), special_tokens=special, add_bos=True, eos_ids=[])


@pytest.fixture
def write_tokenizer(tmp_path: Path):
    """A directory with the demo's tokenizer.json and the given other files."""

    def write(**files: object) -> Path:
        (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
        return tmp_path

    return write
