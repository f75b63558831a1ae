"""A whole layer of up to 8 tokens in one native call: norms, attention, router and experts, added to the stream."""

from __future__ import annotations

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


@dataclass(frozen=True)
class LayerParts:
    """What a layer is made of. `router` and its matrix are missing where the MLP is dense."""

    attention_norm: Tensor
    attention: DecodeAttention
    mlp_norm: Tensor
    experts: ExpertProducts
    epsilon: float  # of both norms
    router: tuple[Weight, NativeRouting | None] | None = None


class NativeLayer:
    """One layer on the native kernels."""

    def __init__(self, backend: cpu.Backend, parts: LayerParts, native: _cpu.Layer, k: int) -> None:
        self._kernels = backend.kernels
        self._native = native
        self._experts = parts.experts
        self._attention = parts.attention
        self._k = k
        self._buffers: dict[int, _Buffers] = {}  # by number of tokens

    @classmethod
    def choose(cls, backend: cpu.Backend | None, parts: LayerParts) -> NativeLayer | None:
        """None without native kernels, or where a part has no native form."""
        experts = parts.experts.native
        if backend is None or experts is None:
            return None
        routing = None if parts.router is None else parts.router[1]
        norms = parts.attention_norm.tolist(), parts.mlp_norm.tolist()
        native = _cpu.Layer(norms[0], parts.attention.native, norms[1], experts, parts.epsilon)
        if parts.router is not None:
            matrix = backend.matrix(parts.router[0])
            if matrix is None or routing is None:
                return None
            native.set_router(matrix, routing.native)
        return cls(backend, parts, native, 0 if routing is None else routing.experts_per_token)

    def takes(self, tokens: int, cache: Tensor) -> bool:
        """Whether a pass of so many tokens over this cache is for one call."""
        return self._experts.native is not None and self._attention.takes(tokens, cache)

    def __call__(self, x: Tensor, rotations: Tensor, cache: Tensor, start: int) -> Tensor:
        """x float32 [T, H] becomes the layer's output and is returned; the rest as in `cpu.Backend.attention`.

        A row's result does not depend on the others.
        """
        tokens, width = x.shape
        buffers = self._buffers.get(tokens)
        if buffers is None:
            buffers = self._buffers[tokens] = _Buffers.make(tokens, width, self._k)
        stream = cpu.array(x)
        if not self._kernels.layer(
            self._native, stream, cpu.array(rotations), cpu.array(cache), start, *buffers.arrays
        ):  # an expert that was never chosen before
            self._experts.hold(buffers.expert_ids)
            if self._experts.native is None or not self._kernels.finish(self._native, stream, *buffers.arrays):
                return x.add_(self._experts(buffers.normed, buffers.expert_ids, buffers.weights))
        self._experts.count(buffers.expert_ids)
        return x


@dataclass(frozen=True)
class _Buffers:
    """What a call leaves: the experts' input, and who was chosen."""

    normed: Tensor  # float32 [T, H]
    expert_ids: Tensor  # int64 [T, k]
    weights: Tensor  # float32 [T, k]
    arrays: tuple[np.ndarray[Any, Any], ...]  # the same memory

    @classmethod
    def make(cls, tokens: int, width: int, k: int) -> _Buffers:
        tensors = torch.empty(tokens, width), torch.empty(tokens, k, dtype=torch.int64), torch.empty(tokens, k)
        return cls(*tensors, tuple(map(cpu.array, tensors)))
