"""Experts carried to the card for one pass of a long prompt, a group at a time, and forgotten again.

Two buffers on the card and two, pinned, in CPU memory: while a group computes, the next one is copied, first into
pinned memory (a mapped file cannot be pinned) and then over PCIe on a stream of its own. All layers use the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from localmoe.formats.weights import Weight
from localmoe.kernels.experts import ExpertWeights
from localmoe.kernels.triton.experts import ExpertStack
from localmoe.kernels.triton.weights import DeviceMatrix, empty_stack, slot_bytes

LookUp = Callable[[int], ExpertWeights]


@dataclass
class _Buffer:
    """A group's place on both sides. `arrived` and `free` are events: of the copy there, of the last use there."""

    pinned: tuple[DeviceMatrix, DeviceMatrix, DeviceMatrix]
    there: tuple[DeviceMatrix, DeviceMatrix, DeviceMatrix]
    arrived: torch.cuda.Event | None
    free: torch.cuda.Event | None


class Streamer:
    """One engine's: its layers take turns. `room` is the bytes of one buffer; a group is at least one expert."""

    def __init__(self, device: torch.device, room: int) -> None:
        self._device = device
        self._room = room
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        # Of another priority: torch's streams of one priority are a pool, and a graph's may be among them
        self._sending = torch.cuda.Stream(device, priority=-1) if self._cuda else None  # type: ignore[no-untyped-call]
        self._buffers: list[_Buffer] = []
        self._made_for: object = None

    def groups(self, look_up: LookUp, experts: Sequence[int], count: int) -> Iterator[ExpertStack]:
        """The experts' weights on the card, group by group: each stack is good until the next but one is asked for.

        `slots` of a stack has a place for each of the layer's `count` experts, -1 for those that are not in it.
        """
        if not experts:
            return
        size = self._prepare(look_up(experts[0]), len(experts))
        slots = torch.full((-(-len(experts) // size), count), -1, dtype=torch.int32)
        for at, expert in enumerate(experts):
            slots[at // size, expert] = at % size
        known = slots.to(self._device)
        for number, start in enumerate(range(0, len(experts), size)):
            buffer = self._buffers[number % 2]
            self._fill(buffer, [look_up(expert) for expert in experts[start : start + size]])
            yield ExpertStack(*buffer.there, known[number])
            if buffer.free is not None:
                buffer.free.record()

    def send(self, weights: ExpertWeights, put: Callable[[ExpertWeights], None]) -> None:
        """Have `put` copy one expert's weights to the card beside whatever else runs there, and wait for it. For one
        thread, which is not the one that asks for groups."""
        if self._sending is None:
            put(weights)
            return
        with torch.inference_mode(), torch.cuda.stream(self._sending):
            put(tuple(_pinned(weight) for weight in weights))  # type: ignore[arg-type]  # three, as there were
            self._sending.synchronize()

    def _prepare(self, like: ExpertWeights, most: int) -> int:
        """Buffers for experts of this form; returns how many fit in one."""
        size = max(1, min(most, self._room // slot_bytes(like)))
        parts = (tensor for weight in like for tensor in vars(weight).values() if isinstance(tensor, Tensor))
        form = (size, *((tensor.shape, tensor.dtype) for tensor in parts))
        if form != self._made_for:
            self._made_for = None  # until all of it is there
            self._buffers.clear()
            self._buffers = [self._buffer(like, size) for _ in range(2)]
            self._made_for = form
        return size

    def _buffer(self, like: ExpertWeights, size: int) -> _Buffer:
        cpu = torch.device("cpu")
        gate, up, down = (empty_stack(weight, size, cpu, pinned=self._cuda) for weight in like)
        there = tuple(empty_stack(weight, size, self._device) for weight in like)
        if not self._cuda:
            return _Buffer((gate, up, down), (there[0], there[1], there[2]), None, None)
        arrived, free = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        free.record()  # its memory may have been something else's until here
        return _Buffer((gate, up, down), (there[0], there[1], there[2]), arrived, free)

    def _fill(self, buffer: _Buffer, experts: Sequence[ExpertWeights]) -> None:
        if buffer.arrived is not None:
            buffer.arrived.synchronize()  # the pinned half is still being read until then
        for place, weights in enumerate(experts):
            for stack, weight in zip(buffer.pinned, weights, strict=True):
                stack.put(place, weight)
        if self._stream is None or buffer.arrived is None or buffer.free is None:
            self._copy(buffer)
            return
        self._stream.wait_event(buffer.free)
        with torch.cuda.stream(self._stream):
            self._copy(buffer)
            buffer.arrived.record()
        torch.cuda.current_stream(self._device).wait_event(buffer.arrived)

    @staticmethod
    def _copy(buffer: _Buffer) -> None:
        for there, pinned in zip(buffer.there, buffer.pinned, strict=True):
            there.values.copy_(pinned.values, non_blocking=True)
            there.scales.copy_(pinned.scales, non_blocking=True)


def _pinned(weight: Weight) -> Weight:
    """The same in pinned memory, from which a copy needs no help of the CPU."""
    tensors = {name: value.pin_memory() for name, value in vars(weight).items() if isinstance(value, Tensor)}
    return replace(weight, **tensors)  # type: ignore[arg-type]  # of the same names and types


def used_experts(expert_ids: Tensor, among: Tensor) -> list[int]:
    """Those of int64 `expert_ids` [T, k], in CPU memory, for which bool `among` [E] says so; ascending."""
    used = torch.zeros(len(among), dtype=torch.bool)
    used[expert_ids.flatten()] = True
    return (used & among).nonzero().flatten().tolist()
