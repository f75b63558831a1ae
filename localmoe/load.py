"""The one place where everything is wired together: a model's name -> its files -> an Engine."""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType

import torch

from localmoe.engine import Engine
from localmoe.errors import DeviceError, ModelNotFoundError, UsageError
from localmoe.formats.checkpoint import Checkpoint
from localmoe.kernels.dispatch import Kernels
from localmoe.memory import USABLE, MemoryNeeds, by_use, choose_context
from localmoe.model.config import ModelConfig
from localmoe.model.deepseek import Model
from localmoe.model.kv_cache import row_bytes
from localmoe.model.mtp import MtpLayer, has_mtp, mtp_module
from localmoe.model.shapes import check_checkpoint
from localmoe.offload.counts import ExpertCounts
from localmoe.offload.device import CardMemory, choose_card, hold_to, subject_of
from localmoe.offload.experts import ExpertStore
from localmoe.offload.probe import usable_memory
from localmoe.speculative import MOST_DRAFTS
from localmoe.store import Resolved, home, resolve

__all__ = ["Engine", "load"]

_LEAST_AHEAD, _MOST_AHEAD = 64 << 20, 1 << 30
"""Bytes of experts that are asked for before they are computed: all that a few tokens choose in one layer, and of a
prompt's so many that the disk is never idle, yet not so many that they drive each other out of memory."""


def load(
    model: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    vram: int | None = None,
    ctx: int | None = None,
    kernels: str = "auto",
    ram: int | None = None,
    cache_dtype: str = "auto",
    mtp: int | None = 0,
    deterministic: bool = False,
    counts: ExpertCounts | None = None,
) -> Engine:
    """Open a model: a name or repository id, with or without a `:RECIPE` or `:source` ending, or a directory.

    Only headers are read; the weights are mapped and come into memory as they are used. `ram` (bytes) is the
    budget for what must stay in memory, the machine's available memory by default; `ctx` (tokens) is by default
    the smaller of the model's maximum and what fits. `threads` sets torch's threads too, for the whole process.
    `cache_dtype` is what the latent cache holds: bf16 by default ("auto"), float32 or int8. `mtp` is how many tokens
    to guess at a time, with the checkpoint's MTP layer or, without one, from what the text repeats; None: as many as
    measuring finds to pay, and none on a card, where nobody has measured it yet; 0: none. On a card experts change
    places as they are used, and with them the last bits of results, unless it is to be `deterministic`, which knows
    nothing of earlier runs either. `counts` counts the experts that are chosen, on the CPU's engine.

    Raises ModelNotFoundError with what to type, CheckpointError and UnsupportedModelError for files that
    cannot be run, DeviceError for a device, kernel tier or memory that this machine lacks, UsageError.
    """
    # The reference computes on the CPU, where no card is asked for
    card = choose_card("cpu" if kernels == "reference" and device == "auto" and vram is None else device, vram)
    chosen = Kernels.choose(kernels, threads, cache_dtype)
    _refuse_what_cannot_be(card, chosen, mtp)
    checkpoint, config = _checked(resolve(str(model.expanduser().absolute()) if isinstance(model, Path) else model))
    row, guesses = row_bytes(config, chosen.cache_dtype), mtp != 0 and (card is None or mtp is not None)
    mtp_layer = guesses and has_mtp(config, checkpoint)
    needs = MemoryNeeds.of(config, checkpoint.tensors.values(), row, mtp=mtp_layer)
    budget = usable_memory() if ram is None else ram
    if threads is not None:
        # Torch computes what has no kernel of ours (norms, softmax, prefill). Its pool belongs to the process and
        # idles while our kernels' pool runs, so both get the same number. Unset, torch takes a thread a core.
        torch.set_num_threads(threads)
    larger = budget is not None and not needs.fit(budget)
    with ExitStack() as opened:
        opened.callback(checkpoint.close)  # which a thread may be reading
        if budget is not None:
            _bring_in(checkpoint, config, chosen, budget, larger=larger, card=card is not None, mtp=mtp_layer)
        experts = ExpertStore(checkpoint, config, chosen)
        if card is not None:
            rest = budget if budget is None else budget - needs.mtp
            engine = _on_card(card, checkpoint, config, chosen, experts, rest, ctx, deterministic)
        else:
            context = choose_context(needs, config.max_position_embeddings, ctx, budget)
            routed = experts.layer if counts is None else counts.watching(experts.layer)
            engine = Engine(Model(config, checkpoint, chosen, routed), checkpoint, chosen, context)
        opened.callback(engine.close)
        engine.reads_the_disk = larger
        if guesses:
            engine.speculate(MtpLayer(engine.model, checkpoint, chosen, experts.layer) if mtp_layer else None, mtp)
        opened.pop_all()  # all is well
        return engine


def _bring_in(
    checkpoint: Checkpoint, config: ModelConfig, kernels: Kernels, budget: int, *, larger: bool, card: bool, mtp: bool
) -> None:
    """In the background the whole model or, of one that is `larger` than memory, what every token reads there: the
    experts then come as they are chosen."""
    if not larger:
        checkpoint.warm()
        return
    kernels.ask_ahead(min(max(budget // 16, _LEAST_AHEAD), _MOST_AHEAD), checkpoint.tells_what_is_in_memory())
    always, _ = by_use(config, checkpoint.tensors.values(), mtp=mtp)
    here = [info for info in always if not card or info.name.startswith(f"{mtp_module(config)}.")]
    # Without a lock, experts that pass through memory drive out what every token needs
    fits = sum(info.nbytes for info in here) <= (usable_memory() or 0) * USABLE  # `budget` may be more than there is
    checkpoint.warm([info.name for info in here], keep=fits)


def _on_card(
    card: CardMemory,
    checkpoint: Checkpoint,
    config: ModelConfig,
    kernels: Kernels,
    experts: ExpertStore,
    ram: int | None,
    ctx: int | None,
    deterministic: bool,
) -> Engine:
    """An engine with as much of the model on the card as its memory holds."""
    from localmoe.model.card.arena import Arena
    from localmoe.model.card.model import CardLayout, CardModel
    from localmoe.model.sizes import CACHE_STEP, card_cache_bytes
    from localmoe.offload.card import CardExperts
    from localmoe.offload.heat import Heat, heat_file, known_heat
    from localmoe.offload.machine import GIB
    from localmoe.offload.on_card import OnCard
    from localmoe.offload.plan import Budgets, experts_on_card, place, prompt_chunk
    from localmoe.offload.predict import stream_from
    from localmoe.offload.probe import look
    from localmoe.offload.record import machine_here

    known = heat_file(home(), checkpoint.directory)
    heat = Heat.none(config) if deterministic else known_heat(home(), checkpoint.directory, config)
    subject = subject_of(config, checkpoint, row_bytes(config, kernels.cache_dtype), heat.shares(config))
    # Places that change with the length of a conversation would be another answer to the same prompt
    placed = place(subject, Budgets(ram, card.vram, ctx), held=None if deterministic else CACHE_STEP)
    hold_to(card)
    torch.set_float32_matmul_precision("highest")  # the environment may allow TF32, and routers choose others then
    machine = machine_here(look(ask_cards=False), home(), kernels.threads or 1, with_card=True, card=card.name)
    chosen = experts_on_card(subject, placed.layers)
    layers = sum(layer.on_gpu for layer in placed.layers)
    tokens = placed.context if deterministic else min(CACHE_STEP, placed.context)
    try:
        arena = Arena(placed.arena, card.device, card_cache_bytes(subject.cache_row, layers, tokens))
        carried = stream_from(subject, machine, placed.layers)
        kept = CardExperts(
            checkpoint, config, kernels, chosen, card.device, stream_from=carried, arena=arena, heat=subject.heat
        )
        with ExitStack() as opened:
            opened.callback(kept.close)
            chunk = prompt_chunk(config, card.vram)
            layout = CardLayout(card.device, layers, placed.head_on_gpu, placed.context, chunk, arena)
            model = CardModel(config, checkpoint, kernels, layout, kept.layer, experts.layer, kept.between_passes)
            opened.pop_all()
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"--vram {card.vram / GIB:.2f} GiB: other programs took the card's memory meanwhile; try again with less"
        ) from error
    if not deterministic:
        kept.keep_fresh()

    def closing() -> None:
        kept.close()
        if not deterministic:
            with suppress(OSError):  # a hint for the next run, which does without
                heat.plus(kept.uses()).write(known)

    def troubles() -> list[str]:
        found = {
            "decode runs without CUDA graphs": model.not_captured,
            "an expert could not be brought to the card": kept.failure,
        }
        return [f"{what}: {why}" for what, why in found.items() if why is not None]

    on_card = OnCard(placed, kept.uses, kept.hits, kept.expect, troubles, closing)
    return Engine(model, checkpoint, kernels, placed.context, on_card)


def _checked(resolved: Resolved) -> tuple[Checkpoint, ModelConfig]:
    """The headers of a model's files, which are of one that can be run."""
    checkpoint = Checkpoint.open(resolved.path)
    _refuse_unquantized(resolved, checkpoint)
    config = ModelConfig.from_dict(checkpoint.config)
    check_checkpoint(config, checkpoint)
    return checkpoint, config


def _refuse_what_cannot_be(card: CardMemory | None, kernels: Kernels, mtp: int | None) -> None:
    if mtp is not None and not 0 <= mtp <= MOST_DRAFTS:
        raise UsageError(f"--mtp {mtp}: from 0 to {MOST_DRAFTS} tokens can be guessed at a time")
    if card is not None and card.device.type == "cuda" and kernels.cache_dtype == torch.float32:
        raise UsageError("a card's latent cache is bf16 or int8: choose one by --cache-dtype, or --device cpu")


def _refuse_unquantized(resolved: Resolved, checkpoint: Checkpoint) -> None:
    """A bare name means the quantized model: running the source instead would take four times the memory."""
    is_bare_name = resolved.ref.directory is None and resolved.ref.ending is None
    if is_bare_name and resolved.kind == "source" and checkpoint.quantization is None:
        raise ModelNotFoundError(
            f"{resolved.name} is here as its makers ship it, not yet quantized: `localmoe quantize {resolved.name}` "
            f"does that, {resolved.name}:source runs it as it is"
        )


class _CallableModule(ModuleType):
    """`localmoe.load` is this module and, by the Python contract, a function: Python sets a package's attribute to
    the submodule once that is imported, so the module itself takes the call."""

    __call__ = staticmethod(load)


sys.modules[__name__].__class__ = _CallableModule
