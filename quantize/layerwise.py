"""Runs a checkpoint over windows of tokens, layer by layer, in float32.

    windows of tokens -> embedding -> layer 0 -> layer 1 -> ... -> norm -> head (or the MTP layer)

Memory holds the states of all windows, one layer's attention and the experts at hand, and every weight is read once:
a model far larger than memory can be calibrated and evaluated. A work item (a window's attention, an expert) runs on
one thread and sums are taken in the items' order: the results do not depend on the number of cores, so a run that goes
on after a kill finds the same. N = tokens of all windows, H = hidden size.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
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
from localmoe.model.deepseek import positions
from localmoe.model.layers import RMSNorm
from localmoe.model.mla import Attention, Positions
from localmoe.model.moe import Router
from localmoe.model.rope import Rope
from quantize.gptq import damping, inverse_factor

_ROWS = 4096  # of an MLP's inputs that are in work at a time
_KEPT = 1 << 25  # numbers between an MLP's matrices that are kept rather than computed twice
_TILE = 256  # columns of a second moment that are computed at a time
_MLP = ("gate_proj", "up_proj", "down_proj")
_Item = TypeVar("_Item")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Statistics:
    """Inputs x [tokens, in] of one matrix: `hessian` is x^T x, float32 [in, in]."""

    tokens: int
    hessian: Tensor

    @cached_property
    def ridge(self) -> Tensor:
        """float32 [in]: what is to be added to the Hessian's diagonal."""
        return damping(self.hessian, self.tokens)

    @cached_property
    def factor(self) -> Tensor:
        """What GPTQ needs of the damped Hessian; made once for the matrices that share it."""
        return inverse_factor(self.hessian, self.ridge)


Replaced = Callable[[str], Tensor | None]
"""A module's weight as it is after quantizing, float32 [out, in], or None where the source's is to be used."""

Consume = Callable[[str, Statistics], object]
"""Told, in any thread, a module's name (without `.weight`) and its inputs' statistics; what it returns is passed on."""


class LayerByLayer:
    """One pass over `windows`, each a sequence of its own. `wanted` are the modules whose statistics are asked for.
    What `replaced` has another weight for is run with that, so that what comes after sees the error it will see; the
    embedding's rows are those of the checkpoint `embedding`, if there is one.

    `advance` runs the next layer; after the last, `logits` gives the predictions. `states` are those between two layers
    of an earlier pass, to go on from. The checkpoint's tensors should be
    read and not mapped (`ReadingCheckpoint`): each is used once.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Sequence[Sequence[int]],
        pool: ThreadPoolExecutor,
        wanted: Iterable[str] = (),
        replaced: Replaced = lambda module: None,
        states: Tensor | None = None,
        embedding: Checkpoint | None = None,
    ) -> None:
        self.config = ModelConfig.from_dict(checkpoint.config)
        self.wanted = frozenset(wanted)
        self._source = _Source(checkpoint, replaced)
        self._rows = (embedding or checkpoint).rows
        self._pool = pool
        self._rope = Rope(self.config)
        self._ids = torch.tensor([token for window in windows for token in window])  # [N]
        if len(self._ids) and int(self._ids.max()) >= self.config.vocab_size:
            raise InputError(f"a token id is outside the vocabulary of {self.config.vocab_size}")
        ends = list(accumulate(map(len, windows), initial=0))
        self._spans = [slice(start, stop) for start, stop in pairwise(ends)]
        if states is None:
            states = self._rows("model.embed_tokens", self._ids)
        self.states = states  # float32 [N, H]
        self._positions: dict[int, Positions] = {}
        self.expert_tokens: dict[str, int] = {}
        """Tokens that reached each routed expert, by `model.layers.N.mlp.experts.M`."""

    def advance(self, layer: int, consume: Consume) -> Iterator[tuple[str, object]]:
        """Take all windows through `layer`; (module, what `consume` made of it) for its wanted modules."""
        yield from self._layer(layer, self.config.moe_layers[layer], self.states, consume)

    def mtp(self, consume: Consume) -> Iterator[tuple[str, object]]:
        """After the last layer: as `advance`, for the checkpoint's first MTP layer, if it has one."""
        layer = self.config.num_hidden_layers
        if f"model.layers.{layer}.eh_proj.weight" in self._source:
            yield from self._layer(layer, True, self._mtp_inputs(f"model.layers.{layer}"), consume)

    def logits(self) -> Iterator[Tensor]:
        """After the last layer: float32 logits [T, V] of each window."""
        norm = RMSNorm(self._source, "model.norm", self.config.rms_norm_eps)
        tied = self.config.tie_word_embeddings
        head = self._source.stored("model.embed_tokens" if tied else "lm_head")

        def window(span: slice) -> Tensor:
            return reference.linear(norm(self.states[span]), head)

        yield from self._in_order(window, self._spans, ahead=1)  # a vocabulary-sized result each

    def _mtp_inputs(self, module: str) -> Tensor:
        """[N, H]: eh_proj([enorm(embedding of the next token), hnorm(state after the final norm)]), as
        DeepSeek-V3's section 2.2; a window's last token takes the next window's first for its next."""
        eps = self.config.rms_norm_eps
        state = RMSNorm(self._source, "model.norm", eps)(self.states)
        following = self._rows("model.embed_tokens", torch.cat((self._ids[1:], self._ids[:1])))
        joined = torch.cat(
            (
                RMSNorm(self._source, f"{module}.enorm", eps)(following),
                RMSNorm(self._source, f"{module}.hnorm", eps)(state),
            ),
            dim=1,
        )  # [N, 2H]
        return joined @ self._source.weight(f"{module}.eh_proj").tensor.T

    def _layer(self, layer: int, is_moe: bool, x: Tensor, consume: Consume) -> Iterator[tuple[str, object]]:
        """Advance `x` [N, H] by one layer, in place."""
        module = f"model.layers.{layer}"
        eps = self.config.rms_norm_eps
        if any(name.startswith(f"{module}.self_attn.") for name in self.wanted):
            for name, found in self._attend(layer, x.clone(), self.wanted).items():
                yield name, consume(name, found)
        self._attend(layer, x, frozenset())
        y = RMSNorm(self._source, f"{module}.post_attention_layernorm", eps)(x)  # [N, H]
        if is_moe:
            yield from self._experts(f"{module}.mlp", x, y, consume)
        else:
            result, made = self._mlp(f"{module}.mlp", y, consume)
            x += result
            yield from made

    def _attend(self, layer: int, x: Tensor, wanted: frozenset[str]) -> dict[str, Statistics]:
        """Add attention's output to `x`, window by window; statistics of its `wanted` modules."""
        kernels = _Recording(wanted)
        attention = Attention(self.config, self._source, layer, kernels)
        norm = RMSNorm(self._source, f"model.layers.{layer}.input_layernorm", self.config.rms_norm_eps)
        for length in {span.stop - span.start for span in self._spans}:
            self._positions.setdefault(length, positions(self.config, self._rope, 0, length, "naive"))

        def window(span: slice) -> dict[str, Tensor]:
            kernels.begin()
            rows = x[span]
            places = self._positions[len(rows)]
            rows += attention(norm(rows), places, _NoCache())  # type: ignore[arg-type]  # what it uses of one
            return kernels.moments()

        sums: dict[str, Tensor] = {}
        for moments in self._in_order(window, self._spans):
            for name, moment in moments.items():
                if name in sums:
                    sums[name] += moment
                else:
                    sums[name] = moment.clone()  # q_a and kv_a share theirs
        return {name: Statistics(len(x), total) for name, total in sums.items()}

    def _experts(self, module: str, x: Tensor, y: Tensor, consume: Consume) -> Iterator[tuple[str, object]]:
        expert_ids, weights = Router(self.config, self._source, f"{module}.gate", _Recording(frozenset()))(y)

        def expert(index: int) -> tuple[Tensor, Tensor, list[tuple[str, object]]]:
            rows, place = (expert_ids == index).nonzero(as_tuple=True)
            result, made = self._mlp(f"{module}.experts.{index}", y[rows], consume)
            return rows, result * weights[rows, place].unsqueeze(1), made

        for index, (rows, result, made) in enumerate(self._in_order(expert, range(self.config.n_routed_experts))):
            self.expert_tokens[f"{module}.experts.{index}"] = len(rows)
            x.index_add_(0, rows, result)
            yield from made
        if self.config.n_shared_experts:
            result, made = self._mlp(f"{module}.shared_experts", y, consume)
            x += result
            yield from made

    def _mlp(self, module: str, y: Tensor, consume: Consume) -> tuple[Tensor, list[tuple[str, object]]]:
        """SwiGLU of `y` [n, H]; gate and up share one Hessian, and down's is that of what comes out of them."""
        names = [f"{module}.{name}" for name in _MLP]
        if not len(y) and self.wanted.isdisjoint(names):
            return torch.empty_like(y), []  # an expert that no token reached is not even read
        blocks = torch.split(y, _ROWS)
        made = []
        outer = [name for name in names[:2] if name in self.wanted]
        if outer:
            statistics = Statistics(len(y), second_moment(blocks))
            made += [(name, consume(name, statistics)) for name in outer]
        gate, up = (self._source.weight(name).tensor for name in names[:2])
        inner: Iterable[Tensor] = _Between(blocks, gate, up)
        if names[2] in self.wanted:
            if len(y) * len(gate) <= _KEPT:
                inner = list(inner)
            made.append((names[2], consume(names[2], Statistics(len(y), second_moment(inner)))))
        down = self._source.weight(names[2]).tensor
        return torch.cat([rows @ down.T for rows in inner]), made

    def _in_order(self, work: Callable[[_Item], _T], items: Sequence[_Item], ahead: int | None = None) -> Iterator[_T]:
        """Results of `work` in the items' order, a few items ahead of the reader."""
        waiting: deque[Future[_T]] = deque()
        most = 2 * torch.get_num_threads() + 2 if ahead is None else ahead
        for item in items:
            waiting.append(self._pool.submit(work, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass(frozen=True)
class _Between:
    """[n, I] of each block: what goes into the down projection, computed each time it is gone through."""

    blocks: Sequence[Tensor]
    gate: Tensor
    up: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        for rows in self.blocks:
            yield F.silu(rows @ self.gate.T) * (rows @ self.up.T)


def second_moment(blocks: Iterable[Tensor]) -> Tensor:
    """x^T x of all rows of `blocks`, float32; it is symmetric, so only its upper half is computed."""
    moment: Tensor | None = None
    for rows in blocks:
        width = rows.shape[1]
        if moment is None:
            moment = torch.zeros(width, width)
        for start in range(0, width, _TILE):
            stop = min(width, start + _TILE)
            moment[:stop, start:stop].addmm_(rows[:, :stop].T, rows[:, start:stop])
    assert moment is not None  # `split` gives one block at least
    return moment.triu_() + moment.triu(1).T


def layer_of(module: str) -> int:
    """The number of the layer that `module` is in, -1 outside the layers."""
    parts = module.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else -1


@dataclass(frozen=True)
class _Named(DenseWeight):
    module: str = ""


class _Source:
    """A checkpoint whose matrices are float32 and know their names; `replaced` ones are the others."""

    def __init__(self, checkpoint: Checkpoint, replaced: Replaced) -> None:
        self._checkpoint = checkpoint
        self._replaced = replaced
        self.tensor = checkpoint.tensor
        self.stored = checkpoint.weight

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint

    def weight(self, module: str) -> _Named:
        other = self._replaced(module)
        return _Named(dequantize(self._checkpoint.weight(module)) if other is None else other, module)


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
