"""What the demo model reads: stories, a tokenizer made from them, and its chat template."""

from __future__ import annotations

import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BEGIN, END, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, THINK_END = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
SPECIAL = (BEGIN, END, PAD, USER, ASSISTANT, THINK, THINK_END)
CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜></think>' + message['content'].split('</think>')[-1].lstrip() + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' + ('<think>\\n' if thinking else '</think>') }}{% endif %}"
)
HELD_OUT = 40  # one story in so many is never trained on
PAGE = 160  # characters: pages of a picture book with fewer are read as one paragraph


@dataclass(frozen=True)
class Story:
    kind: str  # simple, fairy or fiction
    title: str
    text: str

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.title.encode()) % HELD_OUT == 0

    @property
    def paragraphs(self) -> list[str]:
        parts = [part.strip() for part in self.text.split("\n\n") if part.strip()]
        return pages_joined(parts) if self.kind == "simple" else parts


def pages_joined(pages: Sequence[str]) -> list[str]:
    """Paragraphs of whole sentences where a page has one; lines of a verse stay as they are."""
    joined = list(pages[:1])
    for page in pages[1:]:
        if len(joined[-1]) < PAGE and joined[-1].endswith((".", "!", "?", '."', '!"', '?"')):
            joined[-1] += f" {page}"
        else:
            joined.append(page)
    return joined


def read_stories(path: Path) -> list[Story]:
    """JSON lines, xz-compressed, with `kind`, `title` and `text`."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [Story(row["kind"], row["title"], row["text"].strip()) for row in rows]


def train_tokenizer(stories: Sequence[Story], size: int) -> Tokenizer:
    """Byte-level BPE with single digits, as DeepSeek's; children's words count for more than their share of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for story in stories:
            if not story.held_out:
                yield from [story.text] * {"simple": 6, "fairy": 4, "fiction": 1}[story.kind]

    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer
