"""A training step's work shared by processes, each with a core: gradients of some sequences, Muon for some matrices.

Weights, momenta and gradients lie in shared memory. Sequences go to whoever is free, so a core that others use too
costs little; which gradients are added up first then changes from run to run, and the last bits with it. With one
process nothing is shared, and a run repeats to the bit.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from demo_model import Model
from torch import Tensor, nn

WEIGHT_DECAY = 0.05
AT_ONCE = 1 << 16  # weights that Muon makes orthogonal together


class Muon:
    """Momentum, made orthogonal by five Newton-Schulz steps (Jordan 2024; scaled by 0.2 sqrt(max(m, n)) and with
    weight decay as Moonlight's, arXiv 2502.16982). Matrices of one shape are done together."""

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float = 0.95) -> None:
        self._momentum = momentum
        self.parameters = list(parameters)
        self.buffers = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, number: int, gradient: Tensor, rate: float) -> None:
        """Moves parameter `number`; `gradient` is overwritten."""
        parameter, buffer = self.parameters[number], self.buffers[number]
        buffer.mul_(self._momentum).add_(gradient)
        update = gradient.add_(buffer, alpha=self._momentum).view(-1, *gradient.shape[-2:])  # Nesterov
        tall = update.shape[1] > update.shape[2]
        # Some at a time, so that the five steps stay in the cache.
        for part in update.split(max(AT_ONCE // update[0].numel(), 1)):
            part.copy_(orthogonal(part.mT).mT if tall else orthogonal(part))
        parameter.mul_(1 - rate * WEIGHT_DECAY)
        longer = max(parameter.shape[-2:])
        parameter.add_(update.view_as(parameter), alpha=-rate * 0.2 * longer**0.5)


def orthogonal(matrices: Tensor) -> Tensor:
    """[N, m, n] with m <= n -> matrices of the same singular vectors and singular values near 1."""
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


@dataclass(frozen=True)
class Pass:
    """The losses of some sequences."""

    total: Tensor  # what is minimised
    parts: tuple[Tensor, ...]  # what it is made of


class Team:
    """This process and `processes - 1` forked from it; they end with it. To be made before any backward pass, since
    autograd's threads don't outlive a fork."""

    def __init__(self, model: Model, muon: Muon, losses: Callable[[Tensor, int], Pass], processes: int = 1) -> None:
        """`losses` takes sequences and a stage's number."""
        self._model, self._muon, self._losses = model, muon, losses
        self._parameters = list(model.parameters())
        places = {id(parameter): place for place, parameter in enumerate(self._parameters)}
        self._by_muon = [places[id(parameter)] for parameter in muon.parameters]
        size = sum(parameter.numel() for parameter in self._parameters)
        gradients = torch.zeros(processes, size, device=self._parameters[0].device)
        if processes > 1:
            for tensor in (gradients, *self._parameters, *muon.buffers):
                tensor.share_memory_()
            for layer in model.experts():
                layer.correction_bias.share_memory_()
        self._gradients = [self._views(row) for row in gradients]  # [process][parameter]
        self._use(0)
        self._others: list[Connection] = []
        fork = multiprocessing.get_context("fork") if processes > 1 else None
        self._taken = fork.Value("l", 0) if fork else None
        for rank in range(1, processes):
            assert fork is not None
            here, there = fork.Pipe()
            fork.Process(target=self._work, args=(rank, there, [*self._others, here]), daemon=True).start()
            there.close()
            self._others.append(here)

    def _views(self, row: Tensor) -> list[Tensor]:
        parts = row.split([parameter.numel() for parameter in self._parameters])
        return [part.view_as(parameter) for part, parameter in zip(parts, self._parameters, strict=True)]

    def _use(self, rank: int) -> None:
        for parameter, gradient in zip(self._parameters, self._gradients[rank], strict=True):
            parameter.grad = gradient

    def gradients(self, passes: Sequence[Tensor], stage: int) -> list[float]:
        """Of the mean of some passes; the means of their losses' parts. Experts' loads are counted."""
        if self._taken is not None:
            self._taken.value = 0
        for other in self._others:
            other.send((stage, [part.numpy() for part in passes]))
        found = [self._take(passes, stage)]
        for other in self._others:
            losses, loads = other.recv()
            found.append(losses)
            for layer, load in zip(self._model.experts(), loads, strict=True):
                layer.load += torch.from_numpy(load)
        return list(np.sum([losses for losses in found if losses], axis=0) / len(passes))

    def move(self, rate: float) -> None:
        """One step of Muon's matrices; the other parameters' `grad` is the whole gradient afterwards."""
        for other in self._others:
            other.send(rate)
        self._move(0, rate)
        for place in set(range(len(self._parameters))) - set(self._by_muon):
            self._sum(place)
        for other in self._others:
            other.recv()

    def _take(self, passes: Sequence[Tensor], stage: int) -> list[float]:
        """Adds up gradients and losses of passes that nobody has taken yet; empty where all were taken."""
        for parameter in self._parameters:
            assert parameter.grad is not None
            parameter.grad.zero_()
        parts: list[list[float]] = []
        for number in self._numbers(len(passes)):
            done = self._losses(passes[number], stage)
            (done.total / len(passes)).backward()  # type: ignore[no-untyped-call]
            parts.append([float(part) for part in done.parts])
        return [sum(part) for part in zip(*parts, strict=True)]

    def _numbers(self, count: int) -> Iterable[int]:
        if self._taken is None:
            yield from range(count)
            return
        while True:
            with self._taken.get_lock():
                number = self._taken.value
                self._taken.value += 1
            if number >= count:
                return
            yield number

    def _move(self, rank: int, rate: float) -> None:
        processes = len(self._gradients)
        for number in range(rank, len(self._by_muon), processes):
            self._muon.step(number, self._sum(self._by_muon[number]), rate)

    def _sum(self, place: int) -> Tensor:
        """A parameter's gradient over all processes; it lies where this process's first is."""
        first, *others = (row[place] for row in self._gradients)
        for other in others:
            first.add_(other)
        return first

    def _work(self, rank: int, lead: Connection, ends: Sequence[Connection]) -> None:
        """What the others do until the first has ended."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends them
        torch.set_num_threads(1)  # OpenMP's threads don't outlive a fork either; it would wait for them for ever
        for end in ends:
            end.close()  # or this process would hold open what tells another that the first has ended
        self._use(rank)
        try:
            while True:
                stage, passes = lead.recv()
                losses = self._take([torch.from_numpy(part) for part in passes], stage)
                lead.send((losses, self._loads()))
                self._move(rank, lead.recv())
                lead.send(None)
        except EOFError:
            return

    def _loads(self) -> list[Any]:
        """Of this process's experts, which then count anew."""
        loads = [layer.load.numpy().copy() for layer in self._model.experts()]
        for layer in self._model.experts():
            layer.load.zero_()
        return loads
