"""The whole model with its first layers on the card, all of them if there is room; the others are the CPU's blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localmoe.errors import DeviceError, UsageError
from localmoe.kernels.dispatch import Kernels
from localmoe.kernels.marks import COPIES, UNMARKED, Mark, Marks
from localmoe.kernels.triton.launch import Launch, launch_for
from localmoe.kernels.triton.matvec import new_output
from localmoe.kernels.triton.norm import rms_norm
from localmoe.kernels.triton.weights import octets
from localmoe.model.card.arena import Arena
from localmoe.model.card.attention import CardAttention, CardLinear
from localmoe.model.card.cache import CardCache, CardLatents
from localmoe.model.card.mlp import CardMlp, CardMoE, RoutedExperts
from localmoe.model.card.replay import Replay
from localmoe.model.card.rows import MOST_ROWS, RowBuffers, Vectors
from localmoe.model.config import ModelConfig
from localmoe.model.deepseek import Block, Blocks, check_tokens, positions
from localmoe.model.kv_cache import LatentCache
from localmoe.model.layers import Linear, RMSNorm, WeightSource, embedding_rows, expert_weights
from localmoe.model.mla import Positions
from localmoe.model.moe import Experts
from localmoe.model.rope import Rope
from localmoe.model.sizes import HEAD_ROWS

_LEAST_PASS = 64
"""Tokens of a prompt that are worth a pass where the card's memory turns out to be short."""


_STATES = 256
"""States of a pass that a drafter gets."""

_SLEEP = 200_000_000
"""Cycles, a tenth of a second: longer than the host takes to start a pass's kernels one by one."""


@dataclass(frozen=True)
class Split:
    """Seconds of a token by part: `parts` follow each other and add up, `beside` is what runs at the same time on
    another stream (the CPU's experts and the copies for them). What of it the card waits for is `parts`' waiting."""

    parts: dict[str, float]
    beside: dict[str, float]


@dataclass(frozen=True)
class CardLayout:
    """What goes to the card: the first `layers` layers with `context` tokens of their cache, and the head or not.
    `chunk` is how many tokens of a prompt there is room for at a time. Of `arena` the cache takes what the
    context needs as it grows; without one, memory of its own for the whole."""

    device: torch.device
    layers: int
    head: bool
    context: int
    chunk: int = 512
    arena: Arena | None = None


class CardLayer:
    """One layer on the card."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        layer: int,
        experts: Callable[[int], RoutedExperts],
        device: torch.device,
        launch: Launch,
    ) -> None:
        module = f"model.layers.{layer}"
        self.index = layer
        self._launch = launch
        self._epsilon = config.rms_norm_eps
        self._input_norm = source.tensor(f"{module}.input_layernorm.weight").float().to(device)
        self._attention = CardAttention(config, source, layer, device, launch)
        self._mlp_norm = source.tensor(f"{module}.post_attention_layernorm.weight").float().to(device)
        self._mlp: CardMlp | CardMoE
        if config.moe_layers[layer]:
            self._mlp = CardMoE(config, source, f"{module}.mlp", experts(layer), device)
        else:
            self._mlp = CardMlp(expert_weights(source, f"{module}.mlp"), device)

    @property
    def uses(self) -> Tensor | None:
        """The router's counts, int32 [E] on the card; None for a dense layer."""
        return self._mlp.uses if isinstance(self._mlp, CardMoE) else None

    @property
    def captures(self) -> bool:
        """Whether a CUDA graph can hold `few`."""
        return not isinstance(self._mlp, CardMoE) or self._mlp.captures

    @property
    def both_sides(self) -> bool:
        """Whether the CPU takes part, since some of its experts are not on the card."""
        return isinstance(self._mlp, CardMoE) and self._mlp.both_sides

    def few(
        self, rows: RowBuffers, count: int, cache: Tensor, rotations: Tensor, *, first: bool, mark: Mark = UNMARKED
    ) -> None:
        """Goes on from `rows.stream` plus, unless it is the `first` layer, `rows.delta`, and leaves them so."""
        stream, delta, normed = rows.stream[:count], rows.delta[:count], rows.normed.first(count)
        rms_norm(stream, self._input_norm, self._epsilon, *_both(normed), delta=None if first else delta)
        mark("norms")
        self._attention.few(rows, count, cache, rotations)
        mark("attention")
        rms_norm(stream, self._mlp_norm, self._epsilon, *_both(normed), delta=delta)
        mark("norms")
        if isinstance(self._mlp, CardMoE):
            self._mlp.few(rows, count, self._launch, mark)
        else:
            self._mlp.few(rows, count, self._launch)
            mark("dense")

    def many(self, x: Tensor, cache: Tensor, start: int, place: Tensor, rotations: Tensor) -> Tensor:
        """x float32 [T, H] -> [T, H], in place."""
        normed = rms_norm(x, self._input_norm, self._epsilon, torch.empty_like(x))
        x += self._attention.many(normed, cache, start, place, rotations)
        rms_norm(x, self._mlp_norm, self._epsilon, normed)
        x += self._mlp.many(normed, self._launch)
        return x


def _both(vectors: Vectors) -> tuple[Tensor, Tensor]:
    return vectors.natural, vectors.octets


class CardModel:
    """What generation needs, as `localmoe.model.deepseek.Model` has it: token ids in, float32 logits in CPU memory out.

    `experts` supplies the routed experts of the card's layers and `cpu_experts` those of the others; `between_passes`
    is called when nothing runs.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        kernels: Kernels,
        layout: CardLayout,
        experts: Callable[[int], RoutedExperts],
        cpu_experts: Callable[[int], Experts],
        between_passes: Callable[[], None] = lambda: None,
    ) -> None:
        device = layout.device
        self._between_passes = between_passes
        self.config = config
        self.prefill_chunk = layout.chunk
        self._kernels = kernels
        self._device = device
        self._launch = launch_for(device)
        self._embedding = source.weight("model.embed_tokens")  # [V, H], stays in CPU memory
        self._rope = Rope(config)
        rotations = self._rope.rotations(0, layout.context)
        self._rotations = torch.view_as_real(rotations).flatten(1).to(device)  # [context, p]
        self._layers = [
            CardLayer(config, source, layer, experts, device, self._launch) for layer in range(layout.layers)
        ]
        rest = range(layout.layers, config.num_hidden_layers)
        self._blocks = Blocks([Block(config, source, layer, kernels, cpu_experts) for layer in rest], kernels)
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        self._norm = RMSNorm(source, "model.norm", config.rms_norm_eps)
        self._head = CardLinear.of(source, head, device) if layout.head else Linear(source, head, kernels)
        self._card_norm = self._norm.weight.to(device)
        self._both_sides = [layer.both_sides for layer in self._layers]
        self._latents = CardLatents(
            config, layout.context, kernels.cache_dtype, range(layout.layers), device, layout.arena
        )
        self._rows = RowBuffers(config, device, self._launch)
        layers = self._layers  # knowing the model, it would keep the card's memory after the model
        self._replay = Replay(device, captures=lambda: all(layer.captures for layer in layers))
        pinned = device.type == "cuda"
        self._done = torch.cuda.Event(blocking=True) if pinned else None  # type: ignore[no-untyped-call]
        self._staged = torch.empty(MOST_ROWS, config.hidden_size, pin_memory=pinned)
        self._staged_start = torch.empty(1, dtype=torch.int32, pin_memory=pinned)
        self._logits = torch.empty(MOST_ROWS if self._whole else 0, config.vocab_size, pin_memory=pinned)
        self._card_time, self._head_time = kernels.profile.part("card"), kernels.profile.part("head")

    @property
    def device(self) -> torch.device:
        """Where the first layers are."""
        return self._device

    def new_cache(self, capacity: int) -> CardCache:
        """An empty cache; the one before can no longer be used."""
        return CardCache(self.config, self._kernels.cache_dtype, self._latents, capacity)

    def forward(self, token_ids: Tensor, cache: LatentCache, *, last_only: bool = False) -> Tensor:
        """As `Model.forward`; `cache` is from `new_cache`."""
        return self._forward(token_ids, cache, last_only)[0]

    def forward_with_states(
        self, token_ids: Tensor, cache: LatentCache, *, last_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As `Model.forward_with_states`, in CPU memory both; of a long pass the last states alone, since whoever wants
        them works on the CPU, which a prompt would keep busy for longer than the card."""
        logits, states = self._forward(token_ids, cache, last_only)
        return logits, states[-_STATES:].to("cpu", copy=True)

    def embed(self, token_ids: Tensor) -> Tensor:
        """As `Model.embed`."""
        return embedding_rows(self._embedding, token_ids)

    def positions(self, start: int, count: int) -> Positions:
        """As `Model.positions`: for a block on the CPU."""
        return positions(self.config, self._rope, start, count)

    def _forward(self, token_ids: Tensor, cache: LatentCache, last_only: bool) -> tuple[Tensor, Tensor]:
        """Logits in CPU memory, and states where they are."""
        states = self._states(token_ids, cache)
        if not self._whole or len(token_ids) > MOST_ROWS:
            return self.logits(states[-1:] if last_only else states), states
        with self._card_time:
            self._wait()
        logits = self._logits[: len(token_ids)]
        return (logits[-1:] if last_only else logits).clone(), states

    def logits(self, states: Tensor) -> Tensor:
        """The head: states [T, H], anywhere -> float32 logits [T, V] in CPU memory."""
        with self._head_time:
            if isinstance(self._head, Linear):
                return self._head(states.cpu())
            logits = torch.empty(len(states), self.config.vocab_size)
            for start in range(0, len(states), HEAD_ROWS):
                part = states[start : start + HEAD_ROWS].to(self._device)
                logits[start : start + len(part)] = self._head_rows(self._head, part)
            return logits

    def _head_rows(self, head: CardLinear, states: Tensor) -> Tensor:
        if len(states) > MOST_ROWS:
            return head.many(states, self._launch)
        x = Vectors(states, octets(states) if head.matrix.octets else states)
        return head.few(x, new_output(states, head.matrix), self._launch)

    @property
    def _whole(self) -> bool:
        """Whether the card has all that decode needs."""
        return not self._blocks and isinstance(self._head, CardLinear)

    def _states(self, token_ids: Tensor, cache: LatentCache) -> Tensor:
        """After the final norm, [T, H], where the last layer is, until the next pass; `cache` has the tokens then."""
        count = len(token_ids)
        if count <= MOST_ROWS:
            self._few(token_ids, cache)
            x = self._rows.stream[:count]
        else:
            x = self._many(token_ids, cache)
        if self._blocks:
            with self._card_time:
                self._wait()
                x = x.cpu()
            self._kernels.share_cores(count)
            places = self.positions(cache.length, count)
            x = self._blocks(x, places, cache)
            cache.advance(count)
            return self._norm(x)
        cache.advance(count)
        if count <= MOST_ROWS and self._whole:
            return self._rows.states.natural[:count]
        return rms_norm(x, self._card_norm, self.config.rms_norm_eps, torch.empty_like(x))

    def _few(self, token_ids: Tensor, cache: LatentCache) -> None:
        """The card's part of a pass of up to 8 rows. Nothing waits for it yet."""
        self._check(token_ids, cache)
        count, rows = len(token_ids), self._rows
        self._latents.leave_room(cache.length + count)
        self._kernels.share_cores(count)
        self._staged[:count] = self.embed(token_ids)
        self._staged_start[0] = cache.length
        with self._card_time:
            rows.stream[:count].copy_(self._staged[:count], non_blocking=True)
            rows.start.copy_(self._staged_start, non_blocking=True)
            self._replay(count, lambda: self._body(count))

    def _body(self, count: int, mark: Mark = UNMARKED) -> None:
        """What a CUDA graph replays: it reads `rows.stream` and `rows.start`, and leaves the logits in CPU memory."""
        rows, epsilon = self._rows, self.config.rms_norm_eps
        for layer in self._layers:
            latents, first = self._latents.rows[layer.index], layer is self._layers[0]
            layer.few(rows, count, latents, self._rotations, first=first, mark=mark)
        stream, delta = rows.stream[:count], rows.delta[:count]
        if not self._whole:
            stream += delta
            return
        states = rows.states.first(count)
        rms_norm(stream, self._card_norm, epsilon, states.natural, states.octets, delta=delta)
        mark("norms")
        assert isinstance(self._head, CardLinear)
        self._head.few(states, rows.logits[:count], self._launch)
        mark("head")
        self._logits[:count].copy_(rows.logits[:count], non_blocking=True)
        mark(COPIES)

    @property
    def not_captured(self) -> str | None:
        """Why decode runs without CUDA graphs, where this driver could not capture one."""
        return self._replay.failure

    def split(self, token_ids: Sequence[int], cache: LatentCache) -> Split:
        """Seconds by part of what the card does for a decoded token, from a pass for each of `token_ids`, each as if it
        came next. Layers and a head in CPU memory have a profile of their own.

        They run outside the CUDA graph, whose kernels cannot be told apart, and change nothing: the row that they write
        is behind the cache's tokens, and the router's counts are put back. Raises as `forward` for a cache without
        room.
        """
        if not isinstance(cache, CardCache):
            raise UsageError("a model on a card needs a cache of its own, from new_cache")
        cache.check_room(1)
        uses = [layer.uses for layer in self._layers if layer.uses is not None]
        counted = [each.clone() for each in uses]
        self._kernels.share_cores(1)
        with torch.inference_mode():
            self._timed(token_ids[0], cache, Marks(self._device))  # kernels are compiled and threads wake up
            marks = Marks(self._device)
            for token_id in token_ids:
                self._timed(token_id, cache, marks)
            parts, beside = marks.seconds()
            for each, before in zip(uses, counted, strict=True):
                each.copy_(before)
        count = len(token_ids)
        return Split(
            {part: spent / count for part, spent in parts.items()},
            {part: spent / count for part, spent in beside.items()},
        )

    def _timed(self, token_id: int, cache: LatentCache, mark: Marks) -> None:
        """The card's part of a pass of one token, with marks."""
        rows, ids = self._rows, torch.tensor([token_id])
        self._staged[:1] = self.embed(ids)
        self._staged_start[0] = cache.length
        if self._device.type == "cuda":  # asleep, so that all of the pass is in its queue before it begins
            torch.cuda._sleep(_SLEEP)  # type: ignore[no-untyped-call]
        mark.begin()
        rows.stream[:1].copy_(self._staged[:1], non_blocking=True)
        rows.start.copy_(self._staged_start, non_blocking=True)
        mark(COPIES)
        self._body(1, mark)
        if not self._whole:
            rows.stream[:1].to("cpu", copy=True)
            mark(COPIES)
        self._wait()  # for the token: the next one is put where it is read from

    def _many(self, token_ids: Tensor, cache: LatentCache) -> Tensor:
        """The card's part of a longer pass: [T, H] on the card."""
        self._check(token_ids, cache)
        self._kernels.share_cores(len(token_ids))
        return self._whole_or_halves(token_ids, cache.length)

    def _whole_or_halves(self, token_ids: Tensor, start: int) -> Tensor:
        """Somebody else may have taken what was free, or torch's memory be in pieces: then shorter passes do. Nothing
        is lost, for what a pass had put into the cache, the next puts there again."""
        try:
            return self._many_rows(token_ids, start)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        half = len(token_ids) // 2
        if half < _LEAST_PASS:
            raise DeviceError(
                f"the card's memory does not hold {len(token_ids)} tokens of a prompt: other programs use it too; "
                "a smaller --vram or --ctx leaves more free"
            )
        self.prefill_chunk = half
        parts = self._whole_or_halves(token_ids[:half], start), self._whole_or_halves(token_ids[half:], start + half)
        return torch.cat(parts)

    def _many_rows(self, token_ids: Tensor, start: int) -> Tensor:
        """Places from `start` on."""
        with self._card_time:
            x = self.embed(token_ids).to(self._device)
            place = torch.tensor([start], dtype=torch.int32, device=self._device)
            for layer in self._layers:
                x = layer.many(x, self._latents.rows[layer.index], start, place, self._rotations)
        return x

    def _wait(self) -> None:
        """Until the card is done, asleep: a thread that asks again and again would take a core from the experts'."""
        if self._done is not None:
            self._done.record()
            self._done.synchronize()

    def _check(self, token_ids: Tensor, cache: LatentCache) -> None:
        self._between_passes()
        check_tokens(token_ids, self.config.vocab_size)
        if not isinstance(cache, CardCache):
            raise UsageError("a model on a card needs a cache of its own, from new_cache")
        cache.check_room(len(token_ids))
        # Nothing has moved that a graph knows; but one of a layer that is whole on the card leaves the CPU out
        if self._both_sides != (both_sides := [layer.both_sides for layer in self._layers]):
            self._both_sides = both_sides
            self._replay.forget()
