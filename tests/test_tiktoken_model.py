"""A model that comes with Moonlight's kind of tokenizer: opened, asked in every way, quantized and opened again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import localmoe
from localmoe.cli.show import serving_text
from localmoe.errors import CheckpointError
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.fingerprint import fingerprint
from localmoe.load import load
from localmoe.serving import TIKTOKEN
from localmoe.store import resolve
from quantize.pipeline import quantize
from quantize.stream import one_thread_each

DEMO = Path(localmoe.__file__).parent / "data" / "demo"
CHAT = [{"role": "user", "content": "Don't say <|im_end|>, say 世界"}]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with one_thread_each():
        yield


@pytest.fixture
def source(tmp_path: Path, write_tiktoken: Callable[..., Path]) -> Path:
    """The demo's weights under another vocabulary, which is no better to them than random ones would be."""
    shutil.copytree(DEMO, tmp_path / "source")
    (tmp_path / "source" / "tokenization_moonshot.py").write_text("raise SystemExit('remote code ran')\n")
    return write_tiktoken(tmp_path / "source")


def test_it_is_asked_and_quantized_as_any_model(source: Path, tmp_path: Path) -> None:
    with load(source) as engine:
        control = engine.tokenizer.control_tokens
        ids = engine.prompt_ids(CHAT)
        assert [ids.count(control[f"<|im_{name}|>"]) for name in ("system", "user", "assistant", "end")] == [1, 1, 1, 2]
        steps = list(engine.generate(CHAT, max_tokens=12))
        said = [step.token_id for step in steps]
        assert "".join(step.text for step in steps) == engine.tokenizer.decode(
            [id_ for id_ in said if id_ not in engine.tokenizer.unspoken_ids and id_ < engine.tokenizer.vocab_size]
        )
        chosen = list(engine.generate("x", max_tokens=12, choice=["世界", "don't"]))
        assert "".join(step.text for step in chosen) in ("世界", "don't")
    quantize(source, tmp_path / "output", "balanced")
    assert (tmp_path / "output" / "tiktoken.model").read_bytes() == (source / "tiktoken.model").read_bytes()
    assert not list((tmp_path / "output").glob("*.py"))
    with load(tmp_path / "output") as engine:
        assert engine.prompt_ids(CHAT) == ids
    assert TIKTOKEN in serving_text(resolve(str(tmp_path / "output")))


def test_sessions_are_of_one_vocabulary(source: Path) -> None:
    before = fingerprint(source, Checkpoint.open(source).tensors.values())
    path = source / "tiktoken.model"
    path.write_bytes(path.read_bytes().replace(b" 0\n", b" X\n").replace(b" 1\n", b" 0\n").replace(b" X\n", b" 1\n"))
    assert fingerprint(source, Checkpoint.open(source).tensors.values()) != before


def test_an_unknown_class_is_named_where_text_is_asked_for(source: Path, write_tiktoken: Callable[..., Path]) -> None:
    write_tiktoken(source, auto_map={"AutoTokenizer": ["tokenization_other.TikTokenTokenizer", None]})
    with load(source) as engine, pytest.raises(CheckpointError, match="names 'tokenization_other"):
        engine.generate("x")
