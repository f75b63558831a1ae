"""Routed experts of the card's layers: some in slots there, the others computed on the CPU where they are mapped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from localmoe.kernels.dispatch import Kernels
from localmoe.kernels.experts import ExpertProducts, ExpertWeights
from localmoe.kernels.handoff import Handoff
from localmoe.kernels.marks import Mark
from localmoe.kernels.triton.experts import ExpertStack, add_experts
from localmoe.kernels.triton.grouped import Blocks, grouped_experts, sort_pairs
from localmoe.kernels.triton.launch import Launch, launch_for
from localmoe.kernels.triton.weights import SLOT_UNIT, slot_bytes, slot_stacks
from localmoe.model.card.arena import Arena
from localmoe.model.card.rows import RowBuffers
from localmoe.model.config import ModelConfig
from localmoe.model.layers import WeightSource, expert_weights
from localmoe.offload.giving_back import what_to_give_back
from localmoe.offload.hits import HitCounts
from localmoe.offload.plan import STAGING
from localmoe.offload.refresh import REMEMBERED, Refresh
from localmoe.offload.slots import SlotTable
from localmoe.offload.streaming import Streamer, used_experts


@dataclass(frozen=True)
class Prompts:
    """How long passes get the experts that have no slot: carried to the card from `stream_from` tokens on."""

    streamer: Streamer
    stream_from: float


class Coming:
    """Tensors on their way to CPU memory, which is pinned, so that the host need not wait before it wants them."""

    def __init__(self, *tensors: Tensor) -> None:
        on_card = tensors[0].is_cuda
        room = [torch.empty(each.shape, dtype=each.dtype, pin_memory=on_card) for each in tensors]
        self._tensors = [to.copy_(each, non_blocking=True) for to, each in zip(room, tensors, strict=True)]
        self._event = torch.cuda.Event() if on_card else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record()

    def arrived(self) -> list[Tensor]:
        """Them, when they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


class LayerExperts:
    """One layer's. `on_card` are its experts with a slot each, by the slots' numbers, and `memory` uint8
    [slots, bytes] all layers' slots."""

    def __init__(
        self,
        look_up: Callable[[int], ExpertWeights],
        uses: Tensor,
        on_card: Mapping[int, int],
        memory: Tensor,
        kernels: Kernels,
        handoff: Handoff,
        prompts: Prompts,
    ) -> None:
        device, count = handoff.device, len(uses)
        self._look_up = look_up
        self._prompts = prompts
        self._launch = launch_for(device)
        self._handoff = handoff
        self.uses = uses
        self._kernels = kernels
        self.table = SlotTable(count, list(on_card.values()), list(on_card))
        self._stack: ExpertStack | None = None
        if on_card:
            gate, up, down = slot_stacks(look_up(next(iter(on_card.values()))), memory)
            self._stack = ExpertStack(gate, up, down, self.table.of_expert.to(device))
            for slot, expert in on_card.items():
                _put(self._stack, slot, look_up(expert))
        self._products: ExpertProducts | None = None  # made once: the handoff's jobs know it
        self._cpu: ExpertProducts | None = None
        self._share_with_the_cpu()

    @property
    def both_sides(self) -> bool:
        """See `localmoe.model.card.mlp.RoutedExperts`."""
        return self._cpu is not None

    @property
    def captures(self) -> bool:
        """See `localmoe.model.card.mlp.RoutedExperts`."""
        return self._cpu is None or self._handoff.captures(self._cpu)

    def _share_with_the_cpu(self) -> None:
        """A layer that is whole on the card knows no CPU: a pass saves the way there and back."""
        if self._cpu is None and len(self.table.held) < len(self.uses):
            if self._products is None:
                self._handoff.prepare()
                self._products = self._kernels.experts(len(self.uses), self._look_up)
            self._cpu = self._products

    def publish(self) -> None:
        """See `localmoe.offload.refresh.Slots`."""
        assert self._stack is not None
        self._share_with_the_cpu()
        self._stack.slots.copy_(self.table.of_expert)

    def filled(self) -> None:
        """See `localmoe.offload.refresh.Slots`. All layers at once: each time, passes are captured anew."""
        if len(self.table.held) == len(self.uses):
            self._cpu = None

    def load(self, slot: int, expert: int) -> None:
        """See `localmoe.offload.refresh.Slots`."""
        assert self._stack is not None
        self._prompts.streamer.send(self._look_up(expert), partial(_put, self._stack, slot))

    def submit(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor, mark: Mark) -> None:
        """Start the CPU's experts; see `localmoe.model.card.mlp.RoutedExperts`."""
        if self._cpu is not None:
            self._handoff.submit(self._cpu, self.table.of_expert, hidden, expert_ids, weights, mark)

    def add_own(self, rows: RowBuffers, count: int, launch: Launch) -> None:
        """Add the card's experts."""
        stack = self._stack
        if stack is None:
            return
        ids = rows.expert_ids[:count]
        inner = rows.inner_rows(count * ids.shape[1], stack.gate.out_features)
        x = rows.normed.of(stack.gate)[:count]
        add_experts(x, stack, ids, rows.expert_weights[:count], inner, rows.delta[:count], launch)

    def collect(self, delta: Tensor) -> None:
        """Add what the CPU computed."""
        if self._cpu is not None:
            self._handoff.collect(delta)

    def many(self, x: Tensor, expert_ids: Tensor, weights: Tensor, shared: Callable[[], Tensor]) -> Tensor:
        """All experts of a long pass: the card's by groups of tokens, the others carried there too if the pass is long
        enough, or else by the CPU's own kernels for many rows, meanwhile. See
        `localmoe.model.card.mlp.RoutedExperts`."""
        tokens, k = expert_ids.shape
        carried = tokens >= self._prompts.stream_from
        if self._cpu is not None:
            coming = Coming(expert_ids) if carried else Coming(expert_ids, x, weights)
        out = shared()
        blocks = sort_pairs(expert_ids, len(self.uses), self._launch)
        products = torch.zeros(tokens * k, x.shape[1], device=x.device)
        if self._stack is not None:
            self._grouped(self._stack, x, blocks, weights, products)
        if self._cpu is not None:
            away = self.table.of_expert < 0
            known_ids, *known = coming.arrived()
            known_ids = known_ids.long()
            if carried:
                experts = used_experts(known_ids, away)
                for stack in self._prompts.streamer.groups(self._look_up, experts, len(self.uses)):
                    self._grouped(stack, x, blocks, weights, products)
            else:
                ids = torch.where(away[known_ids], known_ids, -1)
                out += self._cpu(known[0], ids, known[1]).to(x.device)
        out += products.view(tokens, k, -1).sum(1)
        return out

    def _grouped(self, stack: ExpertStack, x: Tensor, blocks: Blocks, weights: Tensor, products: Tensor) -> None:
        inner = torch.empty(len(products), stack.gate.out_features, dtype=self._launch.dot, device=x.device)
        grouped_experts(x, stack, blocks, weights, inner, products, self._launch)


def _uses_a_token(config: ModelConfig, heat: Sequence[Sequence[float]] | None) -> Tensor:
    """float64 [L, E], each layer's in sum the experts that a token has; 0 of a layer that nothing is known of."""
    experts, k = config.n_routed_experts, config.num_experts_per_tok
    rows = [[1.0] * experts] * config.num_hidden_layers if heat is None else [[*row] or [0.0] * experts for row in heat]
    counted = torch.tensor(rows, dtype=torch.float64)
    return k * counted / counted.sum(1, keepdim=True).clamp(min=1e-30)


def _put(stack: ExpertStack, slot: int, weights: ExpertWeights) -> None:
    for matrices, weight in zip((stack.gate, stack.up, stack.down), weights, strict=True):
        matrices.put(slot, weight)


class CardExperts:
    """All layers' experts; `layer` hands out one layer's.

    `on_card` names each layer's experts that get a slot, as far as `arena` has room behind the cache, the hottest
    first: `heat` [L][E] are shares of the uses (None: all alike). Without an arena there is room for all of them, for
    good. `stream_from` is the fewest tokens of a pass for which the others are carried to the card, None for never.
    """

    def __init__(
        self,
        source: WeightSource,
        config: ModelConfig,
        kernels: Kernels,
        on_card: Sequence[Sequence[int]],
        device: torch.device,
        *,
        stream_from: int | None = None,
        arena: Arena | None = None,
        heat: Sequence[Sequence[float]] | None = None,
    ) -> None:
        self._prompts = Prompts(Streamer(device, STAGING // 2), math.inf if stream_from is None else stream_from)
        self._source = source
        self._config = config
        self._kernels = kernels
        self._handoff = Handoff(config.hidden_size, config.num_experts_per_tok, kernels, device)
        shape = (config.num_hidden_layers, config.n_routed_experts)
        self._uses = torch.zeros(shape, dtype=torch.int32, device=device)
        self._layers: dict[int, LayerExperts] = {}
        self._tables: dict[int, SlotTable] = {}
        self._hits = HitCounts(self._uses, self._tables)
        self._refresh: Refresh | None = None
        self._heat = _uses_a_token(config, heat)
        self._earlier = REMEMBERED * self._heat  # of earlier runs as much as is remembered of this one
        on_card = [experts if moe else () for experts, moe in zip(on_card, config.moe_layers, strict=True)]
        self._slot = self._slot_bytes(on_card)
        self._arena = arena or Arena(self._slot * sum(map(len, on_card)), device)
        self._arena.give_back, self._arena.take_back = self._give_back, self._take_back
        slots = len(self._arena.memory) // self._slot
        self._memory = self._arena.memory[: slots * self._slot].view(slots, self._slot)
        self._on_card = self._numbered(on_card, -(-self._arena.taken // self._slot))

    def layer(self, index: int) -> LayerExperts:
        """The routed experts of layer `index`, which must be an MoE layer; asked for once."""
        made = LayerExperts(
            partial(self._look_up, index),
            self._uses[index],
            self._on_card[index],
            self._memory,
            self._kernels,
            self._handoff,
            self._prompts,
        )
        self._layers[index] = made
        self._tables[index] = made.table
        return made

    def _look_up(self, layer: int, expert: int) -> ExpertWeights:
        return expert_weights(self._source, f"model.layers.{layer}.mlp.experts.{expert}")

    def _slot_bytes(self, on_card: Sequence[Sequence[int]]) -> int:
        """Of the largest expert: every slot may hold any."""
        likes = [self._look_up(layer, experts[0]) for layer, experts in enumerate(on_card) if experts]
        forms = {tuple((type(weight), weight.nbytes) for weight in like): like for like in likes}
        return max(map(slot_bytes, forms.values()), default=SLOT_UNIT)

    def _numbered(self, on_card: Sequence[Sequence[int]], first: int) -> list[dict[int, int]]:
        """Layer by layer, experts by their slots' numbers, from `first` on: the coldest have the lowest, which
        go first, and where there is not room for all the coldest get none."""
        every = [(layer, expert) for layer, experts in enumerate(on_card) for expert in experts]
        every.sort(key=lambda each: (-float(self._heat[each]), each[1], each[0]))
        numbered: list[dict[int, int]] = [{} for _ in on_card]
        chosen = every[: max(0, len(self._memory) - first)]
        for number, (layer, expert) in enumerate(reversed(chosen), first):
            numbered[layer][number] = expert
        return numbered

    def _give_back(self, nbytes: int) -> None:
        """Let no slot be in the first `nbytes` of the arena: experts leave the card, the coldest first."""
        if self._uses.is_cuda:
            torch.cuda.synchronize(self._uses.device)
        if self._refresh is not None:
            self._refresh.settle()
        recent = self._uses.cpu().double() if self._refresh is None else self._refresh.recent()
        warmth = (recent + self._earlier).tolist()
        self._hits.book()
        changes = what_to_give_back(self._tables, -(-nbytes // self._slot), lambda layer, expert: warmth[layer][expert])
        for layer, slot in changes.retired:
            self._tables[layer].retire(slot)
        for move in changes.moves:
            self._tables[move.layer].move(move.slot, move.to)
            self._memory[move.to].copy_(self._memory[move.slot])
        for layer in {layer for layer, _ in changes.retired} | {move.layer for move in changes.moves}:
            self._layers[layer].publish()

    def _take_back(self, before: int) -> None:
        """The cache had the first `before` bytes of the arena: slots there come back, if anybody fills them."""
        if self._refresh is None:
            return
        if self._uses.is_cuda:
            torch.cuda.synchronize(self._uses.device)
        first, end = (-(-nbytes // self._slot) for nbytes in (self._arena.taken, before))
        self._refresh.refill(range(first, min(end, len(self._memory))))

    def keep_fresh(self, executor: Executor | None = None) -> None:
        """From now on, let experts change places as they are used, `between_passes`."""
        swappable = {index: layer for index, layer in self._layers.items() if layer.table.held}
        self._refresh = Refresh(swappable, self._uses, executor, self._hits.book, self._earlier)

    def between_passes(self) -> None:
        """To be called when no pass runs."""
        if self._refresh is not None:
            self._refresh.between_passes()

    def expect(self, uses: Tensor) -> None:
        """Let experts change places as if they had just been used so, [L, E]: a conversation is taken up again."""
        tokens = float(uses.sum(1).max()) / self._config.num_experts_per_tok
        if self._refresh is not None and tokens > 0:
            self._refresh.expect(uses, tokens)

    @property
    def failure(self) -> str | None:
        """Why an expert could not change places, where one could not: the first time."""
        return None if self._refresh is None else self._refresh.failure

    def uses(self) -> Tensor:
        """int64 [L, E] in CPU memory: how often each expert fired. Layers that are not on the card are not counted."""
        return self._uses.cpu().long()

    def hits(self) -> Tensor:
        """int64 [L, 2] in CPU memory: how many of the uses so far found their expert on the card, and how many there
        were. Layers that are not on the card are not counted. Between passes."""
        return self._hits.totals()

    def close(self) -> None:
        """Wait for what is under way, host functions too, which know memory by its address; then let go of it."""
        if self._refresh is not None:
            self._refresh.close()
            self._refresh = None
        if self._uses.is_cuda:
            torch.cuda.synchronize(self._uses.device)
        self._arena.give_back = self._arena.take_back = lambda nbytes: None
        self._layers.clear()  # they know this object: a circle that would keep the card's memory
