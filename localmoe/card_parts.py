"""Where a token's time goes on a card, and what each part reads.

Decoding replays a CUDA graph, of which only the whole time is known. Its parts are timed in passes of their own
(`CardModel.split`), outside the graph; how they share the time is applied to what decoding took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from localmoe.kernels.marks import COPIES, EXPERTS_ON_CPU

if TYPE_CHECKING:
    from localmoe.model.card.model import Split
    from localmoe.offload.plan import Placement
    from localmoe.offload.predict import Subject

CARD = "card"
"""The part that is one where nothing split it."""
_ON_CPU = "layers on CPU"
_PARTS_OF_CPU_LAYERS = ("attention", "router", "experts", "dense")


def split_up(parts: Mapping[str, float], split: Split | None) -> dict[str, float]:
    """Seconds by part with the card's own split up, adding up to the same. What the CPU's layers took is one part
    then: the card's have their names."""
    if split is None or CARD not in parts or not sum(split.parts.values()):
        return dict(parts)
    found = {part: spent for part, spent in parts.items() if part not in (CARD, *_PARTS_OF_CPU_LAYERS)}
    on_cpu = sum(parts.get(part, 0.0) for part in _PARTS_OF_CPU_LAYERS)
    if on_cpu:
        found[_ON_CPU] = on_cpu
    scale = parts[CARD] / sum(split.parts.values())
    for part, spent in split.parts.items():
        found[part] = found.get(part, 0.0) + scale * spent
    return found


def bytes_by_card_part(subject: Subject, placement: Placement, hit_rates: Sequence[float], held: int) -> dict[str, int]:
    """What a token reads, by the names of `split_up`, with `held` tokens in the cache; for the copies, what goes over
    PCIe. `hit_rates` are the MoE layers', of the experts on the card."""
    config, sizes = subject.config, subject.sizes
    hidden, k = config.hidden_size, config.num_experts_per_tok
    whole = placement.head_on_gpu and not placement.cpu_layers
    read = dict.fromkeys(("attention", "router", "shared expert", "dense", _ON_CPU), 0)
    on_card = on_cpu = 0.0
    copied = 4 * hidden + 4 * (config.vocab_size if whole else hidden)
    rates = iter(hit_rates)
    for home, layer in zip(placement.layers, sizes.layers, strict=True):
        rate = next(rates) if layer.experts else 0.0
        attention = layer.attention.nbytes + held * subject.cache_row
        experts = k * layer.expert.nbytes if layer.experts else 0
        if not home.on_gpu:
            read[_ON_CPU] += attention + layer.mlp.nbytes + experts
        elif not layer.experts:
            read["attention"] += attention
            read["dense"] += layer.mlp.nbytes
        else:
            router = config.n_routed_experts * hidden * (4 if "float32" in layer.mlp.stored else 2)
            read["attention"] += attention
            read["router"] += router
            read["shared expert"] += layer.mlp.nbytes - router
            on_card += rate * experts
            on_cpu += (1 - rate) * experts
            copied += (8 * hidden + 8 * k) if home.gpu_experts < config.n_routed_experts else 0
    found = read | {"experts on GPU": round(on_card), EXPERTS_ON_CPU: round(on_cpu), "head": sizes.head.nbytes}
    return {part: count for part, count in (found | {COPIES: copied}).items() if count}
