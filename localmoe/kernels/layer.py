"""Layers of up to 8 tokens in one native call: norms, attention, router and experts, added to the stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localmoe.formats.weights import Weight
from localmoe.kernels import _cpu, cpu
from localmoe.kernels.attention import DecodeAttention
from localmoe.kernels.experts import ExpertProducts
from localmoe.kernels.routing import NativeRouting

_Array = np.ndarray[Any, Any]

LONGEST_CALL = 0.25
"""Seconds after which a call ends at a layer: Ctrl-C is not to wait for a token of a model that is read from disk."""


@dataclass(frozen=True)
class LayerParts:
    """What a layer is made of. `router` and its matrix are missing where the MLP is dense."""

    attention_norm: Tensor
    attention: DecodeAttention
    mlp_norm: Tensor
    experts: ExpertProducts
    epsilon: float  # of both norms
    router: tuple[Weight, NativeRouting | None] | None = None

    def native(self, backend: cpu.Backend) -> _cpu.Layer | None:
        """None where a part has no native form."""
        if self.experts.native is None:
            return None
        norms = self.attention_norm.tolist(), self.mlp_norm.tolist()
        layer = _cpu.Layer(norms[0], self.attention.native, norms[1], self.experts.native, self.epsilon)
        if self.router is not None:
            matrix, routing = backend.matrix(self.router[0]), self.router[1]
            if matrix is None or routing is None:
                return None
            layer.set_router(matrix, routing.native)
        return layer


class NativeLayers:
    """Layers that follow one another, on the native kernels."""

    def __init__(self, backend: cpu.Backend, parts: Sequence[LayerParts], native: Sequence[_cpu.Layer]) -> None:
        self._kernels = backend.kernels
        self._parts = parts
        self._layers = _cpu.Layers()
        for layer in native:
            self._layers.add(layer)
        self._k = max((part.router[1].experts_per_token for part in parts if part.router and part.router[1]), default=0)
        self._buffers: dict[int, _Buffers] = {}  # by number of tokens
        self._rows: Sequence[Tensor] = ()  # the caches of the last call, and what the kernels know of them
        self._caches = _cpu.Caches([])

    @classmethod
    def choose(cls, backend: cpu.Backend | None, parts: Sequence[LayerParts]) -> NativeLayers | None:
        """None without native kernels, or where a part has no native form."""
        if backend is None:
            return None
        native = [layer for part in parts if (layer := part.native(backend)) is not None]
        return cls(backend, parts, native) if native and len(native) == len(parts) else None

    def takes(self, tokens: int, rows: Sequence[Tensor]) -> bool:
        """Whether a pass of so many tokens over these caches is for one call."""
        fits = self._parts[0].attention.takes(tokens, rows[0])  # caches are all of one type
        return fits and all(part.experts.native is not None for part in self._parts)

    def __call__(self, x: Tensor, rotations: Tensor, rows: Sequence[Tensor], start: int) -> Tensor:
        """x float32 [T, H] becomes the last layer's output and is returned; `rows` are the layers' caches, the rest is
        as in `cpu.Backend.attention`.

        A row's result does not depend on the others.
        """
        buffers = self._buffers.get(len(x))
        if buffers is None:
            buffers = self._buffers[len(x)] = _Buffers.make(len(self._parts), x, self._k)
        if rows is not self._rows:
            self._rows, self._caches = rows, _cpu.Caches([cpu.array(cache) for cache in rows])
        stream, turns, layers = cpu.array(x), cpu.array(rotations), self._layers
        done, routed = 0, False
        while done < len(self._parts):
            done, routed = self._kernels.layers(
                layers, done, routed, LONGEST_CALL, stream, turns, self._caches, start, *buffers.arrays
            )
            if routed and not self._hold(done, x, buffers):  # an expert that was never chosen before
                done, routed = done + 1, False
        for part, expert_ids in zip(self._parts, buffers.expert_ids, strict=True):
            if part.router is not None:
                part.experts.count(expert_ids)
        return x

    def _hold(self, number: int, x: Tensor, buffers: _Buffers) -> bool:
        """Look up the experts that a layer's router chose. False where one has no native form: x is then the layer's
        output already."""
        experts, ids = self._parts[number].experts, buffers.expert_ids[number]
        experts.hold(ids)
        if experts.native is not None:
            return True
        x.add_(experts.compute(buffers.normed, ids, buffers.weights[number]))
        return False


@dataclass(frozen=True)
class _Buffers:
    """What a call leaves: the experts' input where it stopped, and who was chosen in each layer."""

    normed: Tensor  # float32 [T, H]
    expert_ids: Tensor  # int64 [layers, T, k]
    weights: Tensor  # float32 [layers, T, k]
    arrays: tuple[_Array, _Array, _Array]  # the same memory

    @classmethod
    def make(cls, layers: int, x: Tensor, k: int) -> _Buffers:
        """For passes of `x` [T, H]."""
        normed, weights = torch.empty_like(x), torch.empty(layers, len(x), k)
        ids = torch.zeros(layers, len(x), k, dtype=torch.int64)
        return cls(normed, ids, weights, (cpu.array(normed), cpu.array(ids), cpu.array(weights)))
