"""How much memory a model needs, and the context that fits: plain numbers in, a decision out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localmoe.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from localmoe.formats.safetensors import TensorInfo
    from localmoe.model.config import ModelConfig

USABLE = 0.9  # of the available memory: the rest is for activations, other programs, and what they read
LEAST_CONTEXT = 4096  # tokens for which we rather read experts from the disk than offer less
_GIB = 1 << 30


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes of a model, by how often they are used."""

    always: int  # read for every token: attention, shared experts, dense layers, routers, head
    experts: int  # routed experts, of which a token reads a few
    cache_per_token: int  # of the latent cache, all layers
    mtp: int = 0  # of the first two, what is the MTP layer's

    @classmethod
    def of(
        cls, config: ModelConfig, tensors: Iterable[TensorInfo], cache_row: int, *, mtp: bool = False
    ) -> MemoryNeeds:
        """Add up a checkpoint's headers; a token's latents take `cache_row` bytes a layer.

        The embeddings, of which a token reads a row, are left out, and so are the MTP layers, but with `mtp` for the
        first: its weights, and its own latents.
        """
        always, experts = by_use(config, tensors, mtp=mtp)
        module = f"model.layers.{config.num_hidden_layers}."
        guessing = _nbytes(info for info in [*always, *experts] if info.name.startswith(module))
        return cls(_nbytes(always), _nbytes(experts), cache_row * (config.num_hidden_layers + mtp), guessing)

    def fit(self, budget: float) -> bool:
        """Whether all weights stay in a memory of so many bytes."""
        return self.always + self.experts <= budget * USABLE

    def context_within(self, budget: float) -> int:
        """Tokens whose latents fit beside all weights, or beside those that every token needs where that would
        be fewer than 4,096: the experts are mapped, and what does not stay in memory is read from the disk."""
        beside_all = int(budget - self.always - self.experts) // self.cache_per_token
        if beside_all >= LEAST_CONTEXT:
            return beside_all
        return min(LEAST_CONTEXT, int(budget - self.always) // self.cache_per_token)


def by_use(
    config: ModelConfig, tensors: Iterable[TensorInfo], *, mtp: bool = False
) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """(what every token reads, the routed experts), as `MemoryNeeds.of` counts them."""
    layers = config.num_hidden_layers
    unused = [f"model.layers.{layers + i}." for i in range(max(config.num_nextn_predict_layers, 1))]
    if mtp:
        unused[0] = f"model.layers.{layers}.embed_tokens."
    if not config.tie_word_embeddings:
        unused.append("model.embed_tokens.")
    used = [info for info in tensors if not info.name.startswith(tuple(unused))]
    experts = [info for info in used if ".mlp.experts." in info.name]
    return [info for info in used if ".mlp.experts." not in info.name], experts


def _nbytes(tensors: Iterable[TensorInfo]) -> int:
    return sum(info.nbytes for info in tensors)


def choose_context(needs: MemoryNeeds, maximum: int, asked: int | None, budget: int | None) -> int:
    """The context in tokens: `asked`, or the smaller of the model's `maximum` and what fits `budget` bytes.

    A budget of None is not known. Raises UsageError for a context beyond the model's, DeviceError, with the
    number that would do, where memory does not hold it.
    """
    if asked is not None and asked < 1:
        raise UsageError(f"--ctx {asked}: at least one token is needed")
    if asked is not None and asked > maximum:
        raise UsageError(f"--ctx {asked}: the model was made for at most {maximum} tokens")
    if budget is None:
        return maximum if asked is None else asked
    usable = budget * USABLE
    wanted = min(maximum, LEAST_CONTEXT) if asked is None else asked
    needed = needs.always + wanted * needs.cache_per_token
    if needed > usable:
        fits = int(usable - needs.always) // needs.cache_per_token
        hint = f"; --ctx {fits} would fit" if fits >= 1 else ""
        raise DeviceError(
            f"{wanted} tokens of context beside the weights that every token reads need "
            f"{needed / USABLE / _GIB:.2f} GiB of memory and there are {budget / _GIB:.2f}{hint}"
        )
    return wanted if asked is not None else min(maximum, max(wanted, needs.context_within(usable)))


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that programs can still take without swapping, or None where the kernel does not tell.

    Page cache counts as available: it holds the mapped weights, which is what we want it for.
    """
    try:
        text = meminfo.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None
