from typing import Any

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, Any]

def supported_tiers() -> list[str]: ...
def search_scales(
    tier: str,
    bits: int,
    group: int,
    baseline: float,
    guesses: list[float],
    weights: Array,
    factors: Array | None,
    block_rows: int,
    block_columns: int,
    importance: Array | None,
    packed: Array | None,
    scales: Array,
    errors: Array,
    norms: Array,
) -> None: ...

class Matrix:
    @staticmethod
    def int4(packed: Tensor, scale: Tensor, group: int) -> Matrix: ...
    @staticmethod
    def int8(packed: Tensor, scale: Tensor, group: int) -> Matrix: ...
    @staticmethod
    def nf4(codes: Tensor, absmax: Tensor) -> Matrix: ...
    @staticmethod
    def bf16(weight: Tensor) -> Matrix: ...
    @property
    def out_features(self) -> int: ...

class Experts:
    def __init__(self, count: int) -> None: ...
    def set(self, index: int, gate: Matrix, up: Matrix, down: Matrix) -> None: ...
    def set_shared(self, gate: Matrix, up: Matrix, down: Matrix) -> None: ...

class Attention:
    def __init__(
        self,
        query: Matrix,
        latent: Matrix,
        expand: Matrix,
        output: Matrix,
        latent_norm: list[float],
        heads: int,
        nope: int,
        scale: float,
        epsilon: float,
    ) -> None: ...
    def set_query_down(self, matrix: Matrix, norm: list[float]) -> None: ...

class Router:
    def __init__(
        self,
        sigmoid: bool,
        bias: list[float],
        groups: int,
        kept: int,
        best: int,
        outside: float,
        k: int,
        normalised: bool,
        factor: float,
    ) -> None: ...
    def route(self, logits: Array, ids: Array, weights: Array) -> None: ...

class Layer:
    def __init__(
        self,
        attention_norm: list[float],
        attention: Attention,
        mlp_norm: list[float],
        experts: Experts,
        epsilon: float,
    ) -> None: ...
    def set_router(self, matrix: Matrix, router: Router) -> None: ...

class Layers:
    def __init__(self) -> None: ...
    def add(self, layer: Layer) -> None: ...

class Caches:
    def __init__(self, rows: list[Array]) -> None: ...

class Kernels:
    def __init__(self, tier: str, threads: int, cpus: list[int]) -> None: ...
    def linear(self, x: Array, weight: Matrix, y: Array) -> None: ...
    def ask_ahead(self, bytes: int, tells: bool) -> None: ...
    def bytes_asked(self) -> int: ...
    def experts(self, experts: Experts, x: Array, ids: Array, weights: Array, y: Array) -> None: ...
    def attention(
        self, attention: Attention, x: Array, rotations: Array, cache: Array, start: int, y: Array
    ) -> None: ...
    def layers(
        self,
        layers: Layers,
        first: int,
        routed: bool,
        seconds: float,
        x: Array,
        rotations: Array,
        caches: Caches,
        start: int,
        normed: Array,
        ids: Array,
        weights: Array,
    ) -> tuple[int, bool]: ...
    def take_seconds(self) -> dict[str, float]: ...
    def read_bandwidth(self, memory: Array) -> float: ...

class CudaDriver:
    def __init__(self, library: str) -> None: ...
    def ring(self, stream: int) -> None: ...

class Doorbell:
    def __init__(self, driver: CudaDriver, words: Array) -> None: ...
    def ring(self, stream: int) -> None: ...
    def let_go(self) -> None: ...
    def stop(self) -> None: ...

class ExpertJob:
    def __init__(
        self, kernels: Kernels, experts: Experts, x: Array, ids: Array, weights: Array, slots: Array, y: Array
    ) -> None: ...
    def run(self) -> None: ...
    def enqueue(self, caller: CudaDriver | Doorbell, stream: int) -> None: ...
