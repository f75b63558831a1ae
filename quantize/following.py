"""The source's own run over the held-out text, a layer at a time while its shards go by.

    embedding -> layer 0 -> layer 1 -> ... -> (norm and head, at the end)

So `--discard-source` can measure the divergence from a source that is never here whole: it holds the shards of one
layer until that layer has been run. What is between two layers is kept in a file, so that a run that goes on after a
kill pulls no layer again that was run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors.torch import save
from torch import Tensor

from localmoe.errors import CheckpointError, InputError, UnsupportedModelError
from localmoe.formats.checkpoint import Checkpoint, ReadingCheckpoint
from localmoe.formats.files import write_atomically
from localmoe.formats.journal import storage_errors
from localmoe.formats.safetensors import read_header
from localmoe.model.config import ModelConfig
from localmoe.model.shapes import check_checkpoint
from localmoe.text import Tokenizer
from quantize.evaluate import DEFAULT_WINDOW, LayerwiseModel, windows_of
from quantize.layerwise import LayerByLayer
from quantize.stream import one_thread_each, workers

STATES_NAME = "states.safetensors"


class Following:
    """Runs `checkpoint` over `windows` in steps: 0 is the embedding, n the layer n - 1. `done` steps are done, by an
    earlier run that wrote to `place` with the same `fingerprint` too."""

    def __init__(self, checkpoint: Checkpoint, windows: Sequence[Sequence[int]], place: Path, fingerprint: str) -> None:
        self.windows = [list(window) for window in windows]
        self._checkpoint = ReadingCheckpoint(checkpoint.directory, checkpoint.config, checkpoint.tensors)
        self._config = ModelConfig.from_dict(checkpoint.config)
        self._place, self._fingerprint = place, fingerprint
        self.done, self._states = self._saved()
        self._model: LayerByLayer | None = None
        self._pool = ThreadPoolExecutor(workers())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def steps(self) -> range:
        """Those that are left."""
        return range(self.done, self._config.num_hidden_layers + 1)

    @property
    def states_bytes(self) -> int:
        """The size of the file, but for its header."""
        return 4 * sum(map(len, self.windows)) * self._config.hidden_size

    def files(self, step: int) -> tuple[str, ...]:
        """Names of the shards that a step reads."""
        prefix = "model.embed_tokens." if step == 0 else f"model.layers.{step - 1}."
        return self._files_of(prefix)

    def last_files(self) -> tuple[str, ...]:
        """Names of the shards that `logits` reads."""
        head = "model.embed_tokens." if self._config.tie_word_embeddings else "lm_head."
        return tuple(dict.fromkeys((*self._files_of("model.norm."), *self._files_of(head))))

    def run(self, step: int) -> None:
        """Do the next step, whose shards are here, and write down what came out. Raises StorageError."""
        if step != self.done:
            raise ValueError(f"step {step} is not the next one, {self.done}")
        with one_thread_each():
            model = self._opened()
            if step > 0:
                for _ in model.advance(step - 1, lambda module, statistics: None):
                    raise AssertionError("no statistics were asked for")
        self.done, self._states = step + 1, model.states
        metadata = {"localmoe": json.dumps([self._fingerprint, self.done])}
        with storage_errors(self._place):
            write_atomically(self._place, save({"states": self._states}, metadata))

    def logits(self) -> Iterator[Tensor]:
        """After the last step: float32 [T, V] of each window."""
        yield from self._opened().logits()

    def _opened(self) -> LayerByLayer:
        if self._model is None:
            self._model = LayerByLayer(self._checkpoint, self.windows, self._pool, states=self._states)
        return self._model

    def _files_of(self, prefix: str) -> tuple[str, ...]:
        infos = self._checkpoint.tensors.values()
        return tuple(dict.fromkeys(info.file.name for info in infos if info.name.startswith(prefix)))

    def _saved(self) -> tuple[int, Tensor | None]:
        """What an earlier run wrote down; a file that is not from it is no more than not there."""
        shape = (sum(map(len, self.windows)), self._config.hidden_size)
        try:
            (info,), metadata = read_header(self._place)
            fingerprint, done = json.loads(metadata.get("localmoe", "[0, 0]"))
            data = bytearray(self._place.read_bytes()[info.offset :])
        except (CheckpointError, OSError, ValueError, TypeError):
            return 0, None
        known = (fingerprint, info.dtype, info.shape) == (self._fingerprint, torch.float32, shape)
        if not known or type(done) is not int or done not in range(1, self._config.num_hidden_layers + 2):
            return 0, None
        return done, torch.frombuffer(data, dtype=torch.float32).view(shape)


@dataclass(frozen=True)
class FollowedModel(LayerwiseModel):
    """A source that has been followed to its end, as `evaluate` takes it."""

    following: Following = field(kw_only=True)

    def predictions(self, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """float32 logits [T, V] of the windows that were followed."""
        if self.following.windows != [list(window) for window in windows]:
            raise ValueError("these are not the windows that the source was run on")
        return self.following.logits()


def follow(checkpoint: Checkpoint, tokens_from: Path, text: str, place: Path, fingerprint: str) -> Following | None:
    """Begin, or go on; None where localmoe cannot run the model on `text` (the output's measure says why)."""
    try:
        tokenizer = Tokenizer.from_directory(tokens_from)
        config = ModelConfig.from_dict(checkpoint.config)
        check_checkpoint(config, checkpoint)
    except (CheckpointError, UnsupportedModelError):
        return None
    try:
        windows = windows_of(tokenizer, text, min(DEFAULT_WINDOW, config.max_position_embeddings))
    except InputError:
        return None
    if any(token >= config.vocab_size for window in windows for token in window):
        return None
    return Following(checkpoint, windows, place, fingerprint)
