"""The scripts' modules, a few made stories, and a tokenizer for them."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from demo_sizes import SCRIPTS, SMALL, WORDS


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path() -> Iterator[None]:
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def train(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("train_demo")


def module(name: str) -> Any:
    """A fixture: one of the scripts' modules."""
    return pytest.fixture(lambda: importlib.import_module(name), scope="module", name=name.removeprefix("demo_"))


team, text, talk, sequences, model = map(
    module, ("demo_team", "demo_text", "demo_talk", "demo_sequences", "demo_model")
)


@pytest.fixture(scope="module")
def stories(text: ModuleType) -> list[Any]:
    dice = random.Random(0)

    def one(number: int) -> Any:
        first, second = dice.sample(WORDS, 2)
        parts = [
            f"Once there was a {first} and a {second}. The {first} was old.",
            f"The {second} said to the {first}: come to the {dice.choice(WORDS)}, number {number}.",
            f"A {first} went home. The {second} was glad of it.",
        ]
        return text.Story(("simple", "fairy", "fiction")[number % 3], f"Story {number}", "\n\n".join(parts * 2))

    return [one(number) for number in range(90)]


@pytest.fixture(scope="module")
def tokenizer(text: ModuleType, stories: list[Any]) -> Any:
    return text.train_tokenizer(stories, SMALL["vocab_size"])
