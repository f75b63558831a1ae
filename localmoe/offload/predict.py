"""How fast a placement should be: bytes over bandwidths, multiply-adds over rates, and what each layer costs besides.

Pure arithmetic on `Machine`'s figures. A part on the card takes the larger of its reading and its computing, on the CPU
both; parts that overlap (the card's experts beside the CPU's) take the larger, parts that follow one another add up.
Nothing is fitted to a result: where a prediction is off, a term is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from localmoe.model.config import ModelConfig
from localmoe.model.mla import cheaper_path
from localmoe.model.sizes import ModelSizes, Part
from localmoe.offload.machine import CpuSpeed, GpuSpeed, Machine

CHUNK = 512
"""Tokens of a prompt that the CPU engine computes at a time."""
GPU_CHUNK = 4096
"""The same where experts are streamed to the card: each chunk carries a layer's experts over once."""

HEAD_BLOCK = 16
"""Heads that the CPU's attention computes together, in the lanes of a vector; fewer take as long."""

CPU_MEMORY = "CPU memory bandwidth"
CPU_COMPUTE = "CPU arithmetic"
CPU_LAYERS = "fixed costs of the CPU's layers"
CONTEXT = "attention over the context"
DISK = "disk"
GPU_MEMORY = "GPU memory bandwidth"
GPU_COMPUTE = "GPU arithmetic"
GPU_LAYERS = "fixed costs of the card's layers"
HANDOFF = "handing over between card and CPU"
PCIE = "PCIe"

EVICTION = 1.7e9
"""Bytes a second that full memory gives up for what comes from the disk, beside reading it (measured, two cores)."""


class Costs(dict[str, float]):
    """Seconds by cause; a cause that is not there costs nothing."""

    def __missing__(self, cause: str) -> float:
        return 0.0

    def __add__(self, other: Mapping[str, float]) -> Costs:
        return Costs({cause: self[cause] + other.get(cause, 0.0) for cause in {**self, **other}})


@dataclass(frozen=True)
class Subject:
    """The model that is planned. `heat` is, for each layer, how often each routed expert is among the chosen, adding
    up to num_experts_per_tok (dense layers: empty); None where nobody counted, and all are taken as alike."""

    config: ModelConfig
    sizes: ModelSizes
    cache_row: int
    """Bytes that a token's latents take in one layer."""
    heat: Sequence[Sequence[float]] | None = None

    @property
    def cache_per_token(self) -> int:
        """Bytes of latent cache a token, all layers."""
        return self.cache_row * self.config.num_hidden_layers

    @property
    def plain_cache_per_token(self) -> int:
        """Bytes a token would take in a plain multi-head cache of bf16 keys and values."""
        config = self.config
        return 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * config.num_hidden_layers


@dataclass(frozen=True)
class Residence:
    """Where one layer is: on the card or not; how many of its routed experts are on the card and how many stay on the
    disk, and which share of all uses these are (the hit rates)."""

    on_gpu: bool
    gpu_experts: int = 0
    gpu_hits: float = 0.0
    disk_experts: int = 0
    disk_hits: float = 0.0


@dataclass(frozen=True)
class Speed:
    """`bound` is the cause of the largest part of `seconds`, which are those of one token in decode and of the whole
    prompt in prefill."""

    tokens_per_second: float
    bound: str
    bound_share: float
    seconds: Mapping[str, float]


def decode(subject: Subject, machine: Machine, layers: Sequence[Residence], head_on_gpu: bool, held: int) -> Speed:
    """One token with `held` tokens in the cache."""
    costs = Costs()
    for index, home in enumerate(layers):
        if home.on_gpu and machine.gpu is not None:
            costs += _decode_on_gpu(subject, machine, machine.gpu, index, home, held)
        else:
            costs += _decode_on_cpu(subject, machine, index, home, held)
    head = subject.sizes.head
    if head_on_gpu and machine.gpu is not None:
        costs[GPU_MEMORY] += head.nbytes / machine.gpu.read.value
    else:
        costs[CPU_MEMORY] += _reading(subject, machine.cpu, head)
    return _speed(costs, 1)


def prefill(subject: Subject, machine: Machine, layers: Sequence[Residence], head_on_gpu: bool, tokens: int) -> Speed:
    """A prompt of so many tokens, from an empty cache."""
    costs = Costs()
    gpu = machine.gpu if any(home.on_gpu for home in layers) else None
    chunk = GPU_CHUNK if gpu is not None else CHUNK
    for start in range(0, tokens, chunk):
        count = min(chunk, tokens - start)
        for index, home in enumerate(layers):
            if home.on_gpu and gpu is not None:
                costs += _prefill_on_gpu(subject, machine, gpu, index, home, (start, count))
            else:
                costs += _prefill_on_cpu(subject, machine, index, home, (start, count))
        if head_on_gpu and gpu is not None:
            costs[GPU_MEMORY] += subject.sizes.head.nbytes / gpu.read.value
        else:
            costs[CPU_MEMORY] += _reading(subject, machine.cpu, subject.sizes.head)  # of the last token alone
    return _speed(costs, tokens)


def stream_from(subject: Subject, machine: Machine, layers: Sequence[Residence]) -> int | None:
    """The fewest tokens in a pass for which carrying a layer's cold experts to the card beats computing them on the
    CPU, or None where no layer has such experts."""
    gpu = machine.gpu
    cold = [(index, home) for index, home in enumerate(layers) if home.on_gpu and _cold_bytes(subject, index, home) > 0]
    if gpu is None or not cold:
        return None
    index, home = cold[len(cold) // 2]

    def pays(tokens: int) -> bool:
        streamed = max(_streaming(subject, gpu, index, home, tokens).values())
        return streamed < sum(_cold_experts(subject, machine, index, home, tokens).values())

    low, high = 1, 1 << 20
    if not pays(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle + 1, high)
    return low


def _decode_on_cpu(subject: Subject, machine: Machine, index: int, home: Residence, held: int) -> Costs:
    cpu, layer, config = machine.cpu, subject.sizes.layers[index], subject.config
    costs = Costs({CPU_LAYERS: cpu.layer.value})
    costs[CPU_MEMORY] += _reading(subject, cpu, layer.attention) + _reading(subject, cpu, layer.mlp)
    heads = -(-config.num_attention_heads // HEAD_BLOCK) * HEAD_BLOCK
    computing = heads * held * (config.latent_width + config.kv_lora_rank) / cpu.latents.value
    costs[CONTEXT] += max(held * subject.cache_row / cpu.read.value, computing)
    if layer.experts:
        costs += _cold_experts(subject, machine, index, home, 1)
    return costs


def _decode_on_gpu(subject: Subject, machine: Machine, gpu: GpuSpeed, index: int, home: Residence, held: int) -> Costs:
    layer, k = subject.sizes.layers[index], subject.config.num_experts_per_tok
    costs = Costs({GPU_LAYERS: gpu.layer.value})
    costs[GPU_MEMORY] += layer.attention.nbytes / gpu.read.value
    costs[CONTEXT] += held * subject.cache_row / gpu.read.value
    here = Costs({GPU_MEMORY: (layer.mlp.nbytes + k * home.gpu_hits * layer.expert.nbytes) / gpu.read.value})
    there = Costs()
    # The CPU has work in a layer only if one of the k experts is not on the card
    needed = 1 - home.gpu_hits**k if layer.experts else 0.0
    if needed > 1e-9:
        there = _cold_experts(subject, machine, index, home, 1)
        there[CPU_LAYERS] += needed * machine.cpu.layer.value / 2  # experts alone: no attention, no router
        there[HANDOFF] += needed * gpu.handoff.value
    return costs + max(here, there, key=lambda part: sum(part.values()))


def _prefill_on_cpu(subject: Subject, machine: Machine, index: int, home: Residence, tokens: tuple[int, int]) -> Costs:
    start, count = tokens
    cpu, layer = machine.cpu, subject.sizes.layers[index]
    costs = Costs({CPU_LAYERS: cpu.layer.value})
    for part in (layer.attention, layer.mlp):
        costs += _many_on_cpu(subject, cpu, part, count)
    costs[CONTEXT] += _attention_macs(subject.config, start, count) / cpu.attention.value
    if layer.experts:
        costs += _cold_experts(subject, machine, index, home, count)
    return costs


def _prefill_on_gpu(
    subject: Subject, machine: Machine, gpu: GpuSpeed, index: int, home: Residence, tokens: tuple[int, int]
) -> Costs:
    start, count = tokens
    layer, k = subject.sizes.layers[index], subject.config.num_experts_per_tok
    costs = Costs({GPU_LAYERS: gpu.layer.value})
    costs[CONTEXT] += _attention_macs(subject.config, start, count) / gpu.macs.value
    weights = count * (sum(layer.attention.weights.values()) + sum(layer.mlp.weights.values()))
    weights += int(count * k * home.gpu_hits * sum(layer.expert.weights.values()))
    costs[GPU_COMPUTE] += weights / gpu.macs.value
    if layer.experts and home.gpu_hits < 1:
        on_cpu = _cold_experts(subject, machine, index, home, count)
        streamed = _streaming(subject, gpu, index, home, count)
        # What is streamed comes over while the card computes the rest of the layer and the one before
        carried = Costs({cause: max(0.0, seconds - sum(costs.values())) for cause, seconds in streamed.items()})
        slower = max(streamed, key=lambda cause: streamed[cause])
        costs += on_cpu if sum(on_cpu.values()) < streamed[slower] else Costs({slower: carried[slower]})
    return costs


def _cold_experts(subject: Subject, machine: Machine, index: int, home: Residence, tokens: int) -> Costs:
    """The CPU's share of a layer's routed experts in a pass of so many tokens."""
    cpu, layer, k = machine.cpu, subject.sizes.layers[index], subject.config.num_experts_per_tok
    uses = k * (1 - home.gpu_hits)
    touched = _touched(layer.experts - home.gpu_experts, uses, tokens)
    costs = Costs()
    for form, stored in layer.expert.stored.items():
        rate = cpu.cached.value if _in_cache(subject, cpu) else cpu.experts_rate(form)
        costs[CPU_MEMORY] += touched * stored / rate
        # On top: a thread reads a few rows and then multiplies them (measured, docs/benchmarks.md)
        if tokens > 1:
            costs[CPU_COMPUTE] += tokens * uses * layer.expert.weights.get(form, 0) / cpu.many_rate(form)
    fetched = _touched(home.disk_experts, k * home.disk_hits, tokens)
    costs[DISK] += fetched * layer.expert.nbytes * (1 / machine.disk.value + 1 / EVICTION)
    return costs


def _streaming(subject: Subject, gpu: GpuSpeed, index: int, home: Residence, tokens: int) -> Costs:
    """Carrying a layer's cold experts over, and computing them there: the two overlap."""
    layer, k = subject.sizes.layers[index], subject.config.num_experts_per_tok
    macs = tokens * k * (1 - home.gpu_hits) * sum(layer.expert.weights.values())
    return Costs({PCIE: _cold_bytes(subject, index, home) / gpu.pcie.value, GPU_COMPUTE: macs / gpu.macs.value})


def _cold_bytes(subject: Subject, index: int, home: Residence) -> float:
    layer = subject.sizes.layers[index]
    return (layer.experts - home.gpu_experts) * layer.expert.nbytes


def _touched(experts: int, uses: float, tokens: int) -> float:
    """Distinct ones among so many experts that tokens meet, each using `uses` of them with equal chances."""
    return experts * (1 - (1 - min(1.0, uses / experts)) ** tokens) if experts else 0.0


def _many_on_cpu(subject: Subject, cpu: CpuSpeed, part: Part, tokens: int) -> Costs:
    costs = Costs()
    for form, stored in part.stored.items():
        costs[CPU_MEMORY] += stored / _rate(subject, cpu, form)
        costs[CPU_COMPUTE] += tokens * part.weights.get(form, 0) / cpu.many_rate(form)
    return costs


def _reading(subject: Subject, cpu: CpuSpeed, part: Part) -> float:
    """Seconds in which one token's products read a part from memory."""
    return sum(stored / _rate(subject, cpu, form) for form, stored in part.stored.items())


def _rate(subject: Subject, cpu: CpuSpeed, form: str) -> float:
    return cpu.cached.value if _in_cache(subject, cpu) else cpu.weights_rate(form)


def _in_cache(subject: Subject, cpu: CpuSpeed) -> bool:
    """A model that the last-level cache holds is not read from memory."""
    return subject.sizes.nbytes <= cpu.cache_bytes


def _attention_macs(config: ModelConfig, start: int, count: int) -> int:
    """Multiply-adds of one layer's attention for `count` tokens after `start`, the cheaper way (model/mla.py)."""
    context, r = start + count, config.kv_lora_rank
    n, p, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    if cheaper_path(config, count, context) == "naive":
        a_head = context * r * (n + v) + count * context * (n + p + v)
    else:
        a_head = count * r * (n + v) + count * context * (2 * r + p)
    return config.num_attention_heads * a_head


def _speed(costs: Costs, tokens: int) -> Speed:
    total = sum(costs.values())
    bound = max(costs, key=lambda cause: costs[cause])
    return Speed(tokens / total, bound, costs[bound] / total, dict(costs))
