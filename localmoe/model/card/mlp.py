"""MLPs on the card: a dense layer's, and a MoE layer's router and shared expert beside experts that live elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from localmoe.kernels.experts import ExpertWeights
from localmoe.kernels.marks import UNMARKED, Mark
from localmoe.kernels.triton.experts import ExpertStack, add_experts
from localmoe.kernels.triton.launch import Launch
from localmoe.kernels.triton.matmul import matmul
from localmoe.kernels.triton.matvec import matvec, new_output
from localmoe.kernels.triton.router import route
from localmoe.kernels.triton.weights import upload
from localmoe.model.card.rows import RowBuffers
from localmoe.model.config import ModelConfig
from localmoe.model.layers import WeightSource, expert_weights


class RoutedExperts(Protocol):
    """One layer's routed experts, some on the card and some not. Ids are int32 [T, k], weights float32 [T, k]."""

    uses: Tensor
    """int32 [E] on the card: the router counts there."""

    @property
    def captures(self) -> bool:
        """Whether a CUDA graph can hold its passes of up to 8 rows."""
        ...

    @property
    def both_sides(self) -> bool:
        """Whether the CPU takes part, since some are not on the card. It changes between passes only."""
        ...

    def submit(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor, mark: Mark) -> None:
        """Start what is not computed on the card for up to 8 rows, hidden float32 [T, H]. Marks what it takes."""
        ...

    def add_own(self, rows: RowBuffers, count: int, launch: Launch) -> None:
        """Add the card's experts of `rows.normed` to `rows.delta`."""
        ...

    def collect(self, delta: Tensor) -> None:
        """Add what was submitted to `delta` [T, H]."""
        ...

    def many(self, x: Tensor, expert_ids: Tensor, weights: Tensor, shared: Callable[[], Tensor]) -> Tensor:
        """What `shared` makes plus all experts of any number of rows: x float32 [T, H] -> [T, H]. What the CPU needs to
        know is on its way there before `shared` gives the card more to do."""
        ...


class CardMlp:
    """down(silu(gate x) * up x): a dense layer's MLP, or the shared experts as one."""

    def __init__(self, weights: ExpertWeights, device: torch.device) -> None:
        gate, up, down = (upload([weight], device) for weight in weights)
        self._stack = ExpertStack(gate, up, down, torch.zeros(1, dtype=torch.int32, device=device))

    def few(self, rows: RowBuffers, count: int, launch: Launch) -> None:
        """From `rows.normed` to `rows.delta`, which it overwrites."""
        stack = self._stack
        add_experts(
            rows.normed.of(stack.gate)[:count], stack, rows.no_ids[:count], rows.ones[:count],
            rows.inner_rows(count, stack.gate.out_features), rows.delta[:count], launch, fresh=True,
        )  # fmt: skip

    def many(self, x: Tensor, launch: Launch) -> Tensor:
        """float32 [T, H] -> [T, H]."""
        gate, up, down = self._stack.gate, self._stack.up, self._stack.down
        inner = F.silu(matmul(x, gate, new_output(x, gate), launch))
        inner.mul_(matmul(x, up, new_output(x, up), launch))
        return matmul(inner, down, new_output(x, down), launch)


class CardMoE:
    """Router, shared experts, routed experts."""

    def __init__(
        self, config: ModelConfig, source: WeightSource, module: str, experts: RoutedExperts, device: torch.device
    ) -> None:
        self._config = config
        self._experts = experts
        self._router = upload([source.weight(f"{module}.gate")], device)  # [E, H], never quantized
        self._bias = None
        if config.topk_method == "noaux_tc":
            self._bias = source.tensor(f"{module}.gate.e_score_correction_bias").float().to(device)
        self._shared = None
        if config.n_shared_experts:
            self._shared = CardMlp(expert_weights(source, f"{module}.shared_experts"), device)

    @property
    def captures(self) -> bool:
        """As `RoutedExperts.captures`."""
        return self._experts.captures

    @property
    def both_sides(self) -> bool:
        """As `RoutedExperts.both_sides`."""
        return self._experts.both_sides

    @property
    def uses(self) -> Tensor:
        """As `RoutedExperts.uses`."""
        return self._experts.uses

    def few(self, rows: RowBuffers, count: int, launch: Launch, mark: Mark = UNMARKED) -> None:
        """From `rows.normed` to `rows.delta`. The CPU's experts run beside the card's."""
        logits, x = rows.router_logits[:count], rows.normed.natural[:count]
        ids, weights, delta = rows.expert_ids[:count], rows.expert_weights[:count], rows.delta[:count]
        matvec(x, self._router, logits, launch)
        self._route(logits, ids, weights)
        mark("router")
        self._experts.submit(x, ids, weights, mark)
        if self._shared is None:
            delta.zero_()
        else:
            self._shared.few(rows, count, launch)
            mark("shared expert")
        self._experts.add_own(rows, count, launch)
        mark("experts on GPU")
        self._experts.collect(delta)
        mark("waiting")

    def many(self, x: Tensor, launch: Launch) -> Tensor:
        """float32 [T, H] -> [T, H]."""
        # In float32, for rounded operands would choose other experts; torch uses no TF32 unless it is told to
        logits = x @ self._router.values.float().T
        ids = torch.empty(len(x), self._config.num_experts_per_tok, dtype=torch.int32, device=x.device)
        weights = torch.empty(ids.shape, device=x.device)
        self._route(logits, ids, weights)
        shared = self._shared
        return self._experts.many(
            x, ids, weights, lambda: torch.zeros_like(x) if shared is None else shared.many(x, launch)
        )

    def _route(self, logits: Tensor, ids: Tensor, weights: Tensor) -> None:
        config = self._config
        grouped = config.topk_method != "greedy"
        route(
            logits, self._bias, ids, weights,
            groups=config.n_group if grouped else 1, top_groups=config.topk_group if grouped else 1,
            sigmoid=config.scoring_func == "sigmoid", normalise=config.norm_topk_prob,
            factor=config.routed_scaling_factor, counts=self._experts.uses,
        )  # fmt: skip
