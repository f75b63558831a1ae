"""Runs a source checkpoint over a text, layer by layer, and hands out what each matrix's inputs were.

    windows of tokens -> embedding -> layer 0 -> layer 1 -> ... -> MTP layer

Memory holds the activations of the text, one layer's attention and the experts at hand, so a model far larger than
memory can be calibrated. A work item (a window's attention, an expert) runs on one thread and sums are taken in the
items' order: the statistics do not depend on the number of cores, so a run that goes on after a kill finds the same.
N = tokens of the text, H = hidden size.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from localmoe.errors import InputError
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.weights import DenseWeight, dequantize
from localmoe.kernels import reference
from localmoe.kernels.dispatch import Kernels, Product
from localmoe.model.config import ModelConfig
from localmoe.model.layers import RMSNorm, embedding_rows
from localmoe.model.mla import Attention, Positions, cheaper_path
from localmoe.model.moe import Router
from localmoe.model.rope import Rope
from localmoe.text import Tokenizer

DEFAULT_TEXT = Path(__file__).parent / "data" / "calibration.txt"
WINDOW = 512
MOST_TOKENS = 128 * WINDOW
"""Tokens of the text that are used; what comes after them is left out."""

_ROWS = 4096  # of an MLP's inputs that are in work at a time
_MLP = ("gate_proj", "up_proj", "down_proj")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Statistics:
    """Inputs x [tokens, in] of one matrix: `hessian` is x^T x, float32 [in, in]."""

    tokens: int
    hessian: Tensor


Consume = Callable[[str, Statistics], object]
"""Told, in any thread, a module's name (without `.weight`) and its inputs' statistics; what it returns is passed on."""


def windows_of(directory: Path, text: str) -> list[list[int]]:
    """The first MOST_TOKENS tokens of `text` in windows that begin with the model's BOS.

    Raises InputError for a text without a whole window, CheckpointError for a checkpoint without a tokenizer.
    """
    tokenizer = Tokenizer.from_directory(directory)
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = tokenizer.encode(text, add_bos=False, control=False)[:MOST_TOKENS]
    length = WINDOW - len(first)
    windows = [[*first, *ids[start : start + length]] for start in range(0, len(ids), length)]
    whole = [window for window in windows if len(window) == WINDOW]
    if not whole:
        raise InputError(f"the calibration text has {len(ids):,} tokens; at least {length:,} are needed")
    return whole


class Calibration:
    """One run over `windows`. `wanted` are the modules whose statistics are asked for."""

    def __init__(
        self, checkpoint: Checkpoint, windows: Sequence[Sequence[int]], wanted: Iterable[str], pool: ThreadPoolExecutor
    ) -> None:
        self._config = ModelConfig.from_dict(checkpoint.config)
        self._source = _Source(checkpoint)
        self._wanted = frozenset(wanted)
        self._pool = pool
        self._windows = windows
        self._rope = Rope(self._config)
        self.expert_tokens: dict[str, int] = {}
        """Tokens that reached each routed expert, by `model.layers.N.mlp.experts.M`."""

    def run(self, consume: Consume) -> Iterator[tuple[str, object]]:
        """(module, what `consume` made of it) for every wanted module that the model runs."""
        config = self._config
        ids = torch.tensor([token for window in self._windows for token in window])
        table = self._source.tensor("model.embed_tokens.weight")
        x = embedding_rows(table, ids)  # [N, H]
        last = max((_layer(module) for module in self._wanted), default=-1)
        for layer in range(min(last + 1, config.num_hidden_layers)):
            yield from self._layer(layer, config.moe_layers[layer], x, consume)
        mtp = f"model.layers.{config.num_hidden_layers}"
        if last >= config.num_hidden_layers and f"{mtp}.eh_proj.weight" in self._source:
            yield from self._layer(config.num_hidden_layers, True, self._mtp_inputs(mtp, x, ids), consume)

    def _mtp_inputs(self, module: str, x: Tensor, ids: Tensor) -> Tensor:
        """[N, H]: eh_proj([enorm(embedding of the next token), hnorm(state after the final norm)]), as
        DeepSeek-V3's section 2.2; a window's last token takes the next window's first for its next."""
        eps = self._config.rms_norm_eps
        state = RMSNorm(self._source, "model.norm", eps)(x)
        next_ids = torch.cat((ids[1:], ids[:1]))
        following = embedding_rows(self._source.tensor("model.embed_tokens.weight"), next_ids)
        joined = torch.cat(
            (
                RMSNorm(self._source, f"{module}.enorm", eps)(following),
                RMSNorm(self._source, f"{module}.hnorm", eps)(state),
            ),
            dim=1,
        )  # [N, 2H]
        return joined @ dequantize(self._source.weight(f"{module}.eh_proj")).T

    def _layer(self, layer: int, is_moe: bool, x: Tensor, consume: Consume) -> Iterator[tuple[str, object]]:
        """Advance `x` [N, H] by one layer, in place."""
        module = f"model.layers.{layer}"
        eps = self._config.rms_norm_eps
        for name, found in self._attend(layer, x).items():
            yield name, consume(name, found)
        y = RMSNorm(self._source, f"{module}.post_attention_layernorm", eps)(x)  # [N, H]
        if is_moe:
            yield from self._experts(f"{module}.mlp", x, y, consume)
        else:
            result, made = self._mlp(f"{module}.mlp", y, consume)
            x += result
            yield from made

    def _attend(self, layer: int, x: Tensor) -> dict[str, Statistics]:
        """Add attention's output to `x`, window by window; statistics of its wanted modules."""
        kernels = _Recording(self._wanted)
        attention = Attention(self._config, self._source, layer, kernels)
        norm = RMSNorm(self._source, f"model.layers.{layer}.input_layernorm", self._config.rms_norm_eps)
        rotations = self._rope.rotations(0, WINDOW)
        future = torch.ones(WINDOW, WINDOW, dtype=torch.bool).triu_(1)
        flat = torch.view_as_real(rotations).flatten(1)
        positions = Positions(rotations, flat, future, cheaper_path(self._config, WINDOW, WINDOW))

        def window(start: int) -> dict[str, Tensor]:
            kernels.begin()
            rows = x[start : start + WINDOW]
            rows += attention(norm(rows), positions, _NoCache())  # type: ignore[arg-type]  # what it uses of one
            return kernels.moments()

        sums: dict[str, Tensor] = {}
        for moments in self._in_order(window, range(0, len(x), WINDOW)):
            for name, moment in moments.items():
                if name in sums:
                    sums[name] += moment
                else:
                    sums[name] = moment.clone()  # q_a and kv_a share theirs
        return {name: Statistics(len(x), total) for name, total in sums.items()}

    def _experts(self, module: str, x: Tensor, y: Tensor, consume: Consume) -> Iterator[tuple[str, object]]:
        expert_ids, weights = Router(self._config, self._source, f"{module}.gate", _Recording(frozenset()))(y)

        def expert(index: int) -> tuple[Tensor, Tensor, list[tuple[str, object]]]:
            rows, place = (expert_ids == index).nonzero(as_tuple=True)
            result, made = self._mlp(f"{module}.experts.{index}", y[rows], consume)
            return rows, result * weights[rows, place].unsqueeze(1), made

        for index, (rows, result, made) in enumerate(self._in_order(expert, range(self._config.n_routed_experts))):
            self.expert_tokens[f"{module}.experts.{index}"] = len(rows)
            x.index_add_(0, rows, result)
            yield from made
        if self._config.n_shared_experts:
            result, made = self._mlp(f"{module}.shared_experts", y, consume)
            x += result
            yield from made

    def _mlp(self, module: str, y: Tensor, consume: Consume) -> tuple[Tensor, list[tuple[str, object]]]:
        """SwiGLU of `y` [n, H]; gate and up share one Hessian."""
        names = [f"{module}.{name}" for name in _MLP]
        gate, up, down = (dequantize(self._source.weight(name)) for name in names)
        outer = torch.zeros(gate.shape[1], gate.shape[1]) if self._wanted.intersection(names[:2]) else None
        inner = torch.zeros(down.shape[1], down.shape[1]) if names[2] in self._wanted else None
        result = torch.empty_like(y)
        for start in range(0, len(y), _ROWS):
            rows = y[start : start + _ROWS]
            between = F.silu(rows @ gate.T) * (rows @ up.T)  # [n, I]
            result[start : start + _ROWS] = between @ down.T
            for moment, inputs in ((outer, rows), (inner, between)):
                if moment is not None:
                    moment.addmm_(inputs.T, inputs)
        made = []
        for name, moment in zip(names, (outer, outer, inner), strict=True):
            if name in self._wanted and moment is not None:
                made.append((name, consume(name, Statistics(len(y), moment))))
        return result, made

    def _in_order(self, work: Callable[[int], _T], items: range) -> Iterator[_T]:
        """Results of `work` in the items' order, a few items ahead of the reader."""
        waiting: deque[object] = deque()
        ahead = 2 * torch.get_num_threads() + 2
        for item in items:
            waiting.append(self._pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()  # type: ignore[attr-defined]
        while waiting:
            yield waiting.popleft().result()  # type: ignore[attr-defined]


def _layer(module: str) -> int:
    parts = module.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else -1


@dataclass(frozen=True)
class _Named(DenseWeight):
    module: str = ""


class _Source:
    """A checkpoint whose matrices are float32 and know their names."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint

    def tensor(self, name: str) -> Tensor:
        return self._checkpoint.tensor(name)

    def weight(self, module: str) -> _Named:
        return _Named(dequantize(self._checkpoint.weight(module)), module)


class _Recording(Kernels):
    """The reference's products, which keep the second moments of what wanted matrices are given, by thread."""

    def __init__(self, wanted: frozenset[str]) -> None:
        super().__init__("reference", None)
        self._wanted = wanted
        self._thread = threading.local()

    def begin(self) -> None:
        """Forget what this thread has seen."""
        self._thread.inputs = {}

    def moments(self) -> dict[str, Tensor]:
        """x^T x of what this thread has seen since `begin`; matrices with one input share one."""
        inputs: dict[str, Tensor] = self._thread.inputs
        made: dict[int, Tensor] = {}
        for x in inputs.values():
            if id(x) not in made:
                made[id(x)] = x.T @ x
        return {name: made[id(x)] for name, x in inputs.items()}

    def product(self, weight: object) -> Product:
        assert isinstance(weight, _Named)
        module = weight.module

        def multiply(x: Tensor) -> Tensor:
            if module in self._wanted:
                self._thread.inputs[module] = x
            return reference.linear(x, weight)

        return multiply  # type: ignore[return-value]  # called like one


class _NoCache:
    """A latent cache of one pass."""

    length = 0

    def append(self, layer: int, rows: Tensor) -> Tensor:
        return rows
