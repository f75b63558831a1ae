"""Routed experts of the card's layers: some in slots there, the others computed on the CPU where they are mapped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from localmoe.kernels.dispatch import Kernels
from localmoe.kernels.experts import ExpertProducts, ExpertWeights
from localmoe.kernels.handoff import Handoff
from localmoe.kernels.triton.experts import ExpertStack, add_experts
from localmoe.kernels.triton.grouped import grouped_experts, sort_pairs
from localmoe.kernels.triton.launch import Launch, launch_for
from localmoe.kernels.triton.weights import empty_stack
from localmoe.model.card.rows import RowBuffers
from localmoe.model.config import ModelConfig
from localmoe.model.layers import WeightSource, expert_weights


class LayerExperts:
    """One layer's. `on_card` are the experts that get a slot each, in the order of the slots."""

    def __init__(
        self,
        look_up: Callable[[int], ExpertWeights],
        count: int,
        on_card: Sequence[int],
        kernels: Kernels,
        handoff: Handoff,
    ) -> None:
        device = handoff.device
        self._launch = launch_for(device)
        self._handoff = handoff
        self._slots = torch.full((count,), -1, dtype=torch.int32)  # [E] as the CPU sees it
        self._stack: ExpertStack | None = None
        if on_card:
            like = look_up(on_card[0])
            stacks = [empty_stack(weight, len(on_card), device) for weight in like]
            for slot, expert in enumerate(on_card):
                for stack, weight in zip(stacks, look_up(expert), strict=True):
                    stack.put(slot, weight)
                self._slots[expert] = slot
            gate, up, down = stacks
            self._stack = ExpertStack(gate, up, down, self._slots.to(device))
        self._cpu: ExpertProducts | None = None
        if len(on_card) < count:
            self._cpu = kernels.experts(count, look_up)
        self.captures = self._cpu is None or handoff.captures(self._cpu)

    def submit(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """Start the CPU's experts; see `localmoe.model.card.mlp.RoutedExperts`."""
        if self._cpu is not None:
            self._handoff.submit(self._cpu, self._slots, hidden, expert_ids, weights)

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

    def many(self, x: Tensor, expert_ids: Tensor, weights: Tensor, out: Tensor) -> None:
        """All experts of a long pass: the card's by groups, the CPU's by its own kernels for many rows."""
        if self._cpu is not None:
            ids = expert_ids.cpu()  # waits for the card
            away = torch.where(self._slots[ids.long()] >= 0, -1, ids.long())
            out += self._cpu(x.cpu(), away, weights.cpu()).to(x.device)
        if self._stack is not None:
            out += self._grouped(self._stack, x, expert_ids, weights)

    def _grouped(self, stack: ExpertStack, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        tokens, k = expert_ids.shape
        blocks = sort_pairs(expert_ids, len(self._slots), self._launch)
        inner = torch.empty(tokens * k, stack.gate.out_features, dtype=self._launch.dot, device=x.device)
        products = torch.zeros(tokens * k, x.shape[1], device=x.device)
        grouped_experts(x, stack, blocks, weights, inner, products, self._launch)
        return products.view(tokens, k, -1).sum(1)


class CardExperts:
    """All layers' experts; `layer` hands out one layer's. `on_card` names each layer's experts that get a slot."""

    def __init__(
        self,
        source: WeightSource,
        config: ModelConfig,
        kernels: Kernels,
        on_card: Sequence[Sequence[int]],
        device: torch.device,
    ) -> None:
        self._source = source
        self._config = config
        self._kernels = kernels
        self._on_card = on_card
        self._handoff = Handoff(config.hidden_size, config.num_experts_per_tok, kernels, device)

    def layer(self, index: int) -> LayerExperts:
        """The routed experts of layer `index`, which must be an MoE layer."""
        module = f"model.layers.{index}.mlp.experts"
        return LayerExperts(
            lambda expert: expert_weights(self._source, f"{module}.{expert}"),
            self._config.n_routed_experts,
            self._on_card[index],
            self._kernels,
            self._handoff,
        )
