"""The one place where everything is wired together: a model's name -> its files -> an Engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from localmoe.errors import (
    CheckpointError,
    ContextOverflowError,
    DeviceError,
    ModelNotFoundError,
    TemplateError,
    UsageError,
)
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.safetensors import TensorInfo
from localmoe.generate import Settings, Step, generate
from localmoe.kernels.dispatch import Kernels
from localmoe.memory import MemoryNeeds, available_memory, choose_context
from localmoe.model.config import ModelConfig
from localmoe.model.deepseek import Model
from localmoe.model.kv_cache import row_bytes
from localmoe.model.mtp import MtpLayer, has_mtp
from localmoe.model.shapes import check_checkpoint
from localmoe.offload.device import CardMemory, choose_card, hold_to, subject_of
from localmoe.offload.experts import ExpertStore
from localmoe.offload.heat import Heat, heat_file
from localmoe.offload.machine import GIB
from localmoe.offload.plan import Budgets, Placement, experts_on_card, place, prompt_chunk
from localmoe.offload.predict import stream_from
from localmoe.offload.probe import look
from localmoe.offload.record import machine_here
from localmoe.sampling import SamplingParams
from localmoe.session import CachedTokens
from localmoe.speculative import MOST_DRAFTS, Drafter, DraftLength, LookupDrafter, MtpDrafter
from localmoe.store import Resolved, home, resolve
from localmoe.text import ChatTemplate, Message, Tokenizer, end_token_ids
from localmoe.text.files import read_json_object

if TYPE_CHECKING:
    from localmoe.model.card.model import CardModel

Prompt = str | Sequence[int] | Sequence[Message]


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
) -> Engine:
    """Open a model: a name or repository id, with or without a `:RECIPE` or `:source` ending, or a directory.

    Only headers are read; the weights are mapped and come into memory as they are used. `ram` (bytes) is the
    budget for what must stay in memory, the machine's available memory by default; `ctx` (tokens) is by default
    the smaller of the model's maximum and what fits. `threads` sets torch's threads too, for the whole process.
    `cache_dtype` is what the latent cache holds: bf16 by default ("auto"), float32 or int8. `mtp` is how many tokens
    to guess at a time, with the checkpoint's MTP layer or, without one, from what the text repeats; None: as many as
    measuring finds to pay, 0: none. On a card experts change places as they are used, and with them the last bits of
    results, unless it is to be `deterministic`.

    Raises ModelNotFoundError with what to type, CheckpointError and UnsupportedModelError for files that
    cannot be run, DeviceError for a device, kernel tier or memory that this machine lacks, UsageError.
    """
    card = choose_card(device, vram)
    if mtp is not None and not 0 <= mtp <= MOST_DRAFTS:
        raise UsageError(f"--mtp {mtp}: from 0 to {MOST_DRAFTS} tokens can be guessed at a time")
    chosen = Kernels.choose(kernels, threads, cache_dtype)
    resolved = resolve(str(model.expanduser().absolute()) if isinstance(model, Path) else model)
    checkpoint = Checkpoint.open(resolved.path)
    _refuse_unquantized(resolved, checkpoint)
    config = ModelConfig.from_dict(checkpoint.config)
    check_checkpoint(config, checkpoint)
    needs = MemoryNeeds.of(config, checkpoint.tensors.values(), row_bytes(config, chosen.cache_dtype))
    budget = available_memory() if ram is None else ram
    if threads is not None:
        # Torch computes what has no kernel of ours (norms, softmax, prefill). Its pool belongs to the process and
        # idles while our kernels' pool runs, so both get the same number. Unset, torch takes a thread a core.
        torch.set_num_threads(threads)
    if budget is not None and needs.always + needs.experts < budget:
        checkpoint.warm()
    experts = ExpertStore(checkpoint, config, chosen)
    if card is not None:
        engine = _on_card(card, checkpoint, config, chosen, experts, Budgets(budget, card.vram, ctx), deterministic)
    else:
        context = choose_context(needs, config.max_position_embeddings, ctx, budget)
        engine = Engine(Model(config, checkpoint, chosen, experts.layer), checkpoint, chosen, context)
    if mtp != 0:
        engine.speculate(_mtp_layer(engine.model, checkpoint, chosen, experts), mtp)
    return engine


def _on_card(
    card: CardMemory,
    checkpoint: Checkpoint,
    config: ModelConfig,
    kernels: Kernels,
    experts: ExpertStore,
    may: Budgets,
    deterministic: bool,
) -> Engine:
    """An engine with as much of the model on the card as its memory holds."""
    from localmoe.model.card.model import CardLayout, CardModel
    from localmoe.offload.card import CardExperts

    known = heat_file(home(), checkpoint.directory)
    heat = Heat.read(known, config)
    subject = subject_of(config, checkpoint, row_bytes(config, kernels.cache_dtype), heat.shares(config))
    placed = place(subject, may)
    hold_to(card)
    machine = machine_here(look(ask_cards=False), home(), kernels.threads or 1, with_card=True)
    from_tokens = stream_from(subject, machine, placed.layers)
    chosen = experts_on_card(subject, placed.layers)
    kept = CardExperts(checkpoint, config, kernels, chosen, card.device, stream_from=from_tokens)
    layers = sum(layer.on_gpu for layer in placed.layers)
    layout = CardLayout(card.device, layers, placed.head_on_gpu, placed.context, prompt_chunk(config, card.vram))
    try:
        model = CardModel(config, checkpoint, kernels, layout, kept.layer, experts.layer, kept.between_passes)
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"--vram {card.vram / GIB:.2f} GiB: other programs took the card's memory meanwhile; try again with less"
        ) from error
    if not deterministic:
        kept.keep_fresh()

    def closing() -> None:
        kept.close()
        with suppress(OSError):  # a hint for the next run, which does without
            heat.plus(kept.uses()).write(known)

    return Engine(model, checkpoint, kernels, placed.context, placed, closing)


def _mtp_layer(
    model: Model | CardModel, checkpoint: Checkpoint, kernels: Kernels, experts: ExpertStore
) -> MtpLayer | None:
    """The checkpoint's own. On a card guesses come from what the text repeats: the MTP layer is the CPU's so far."""
    if not isinstance(model, Model) or not has_mtp(model.config, checkpoint):
        return None
    return MtpLayer(model, checkpoint, kernels, experts.layer)


class Engine:
    """An open model. Made by `load`; close it, or use it as a context manager."""

    def __init__(
        self,
        model: Model | CardModel,
        checkpoint: Checkpoint,
        kernels: Kernels,
        max_context: int,
        placement: Placement | None = None,
        closing: Callable[[], None] = lambda: None,
    ) -> None:
        self.placement = placement
        """Where everything is, if some of it is on a card."""
        self._closing = closing  # called once
        self.config: ModelConfig = model.config
        self.path: Path = checkpoint.directory
        self.kernels = kernels
        self.max_context = max_context
        self._checkpoint = checkpoint
        self._model: Model | CardModel | None = model
        self._cached: CachedTokens | None = None  # what `reuse_prefix` goes on from
        self._mtp: MtpLayer | None = None
        self._lengths: DraftLength | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises CheckpointError when the model has none, or a damaged one; token ids work without it."""
        return Tokenizer.from_directory(self.path)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The checkpoint's own, or None."""
        return ChatTemplate.from_directory(self.path)

    @cached_property
    def generation_defaults(self) -> dict[str, float]:
        """What `generation_config.json` advises of temperature, top_p, top_k, min_p and repetition_penalty; empty
        where it advises greedy decoding. Raises CheckpointError for a value out of range."""
        path = self.path / "generation_config.json"
        found = read_json_object(path)
        if found.get("do_sample") is False:
            return {}
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        advised = {name: found[name] for name in names if found.get(name) is not None}
        try:
            SamplingParams(**advised)
        except UsageError as error:
            raise CheckpointError(f"{path}: {error}") from error
        return advised

    @property
    def tensors(self) -> Iterable[TensorInfo]:
        """What the checkpoint's headers say of every tensor."""
        return self._checkpoint.tensors.values()

    def speculate(self, layer: MtpLayer | None, drafts: int | None) -> None:
        """Guess tokens from now on, with an MTP layer or from what the text repeats; see `load` for `drafts`."""
        most = drafts if drafts is not None else 3 if layer is not None else MOST_DRAFTS
        self._mtp, self._cached = layer, None
        self._lengths = DraftLength(most, fixed=drafts is not None)

    def logits(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """Float32 logits [T, V] of one sequence of T tokens, from an empty cache.

        Raises InputError for no tokens or ids outside the vocabulary, ContextOverflowError for too many.
        """
        model = self.model
        ids = torch.as_tensor(token_ids, dtype=torch.int64)
        if len(ids) > self.max_context:
            raise ContextOverflowError(f"{len(ids):,} tokens do not fit the context of {self.max_context:,}")
        cache = model.new_cache(len(ids))
        logits = torch.empty(len(ids), self.config.vocab_size)  # [T, V]
        with torch.inference_mode():
            for start in range(0, max(len(ids), 1), model.prefill_chunk):
                chunk = slice(start, start + model.prefill_chunk)
                logits[chunk] = model.forward(ids[chunk], cache)
        return logits

    def prompt_ids(self, prompt: Prompt, *, thinking: bool | None = None, add_bos: bool = True) -> list[int]:
        """The token ids that `generate` starts from.

        Text is continued as it is, control tokens in it included, after the beginning the tokenizer puts before
        texts (`add_bos`). Messages go through the chat template, and only the template writes control tokens.
        Raises TemplateError when there is none or it fails, UsageError for a thinking switch it does not have.
        """
        if not isinstance(prompt, str) and prompt and all(isinstance(message, Mapping) for message in prompt):
            return self._chat_ids(prompt, thinking)  # type: ignore[arg-type]  # just checked
        if thinking is not None:
            raise UsageError("thinking is switched by the chat template, which a prompt without messages does not use")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_bos=add_bos)
        if not all(isinstance(token_id, int) for token_id in prompt):
            raise UsageError("a prompt is a text, a sequence of token ids, or a sequence of messages")
        return list(prompt)  # type: ignore[arg-type]  # just checked

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        top_logprobs: int = 0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        thinking: bool | None = None,
        add_bos: bool = True,
        reuse_prefix: bool = False,
    ) -> Generator[Step]:
        """Answer or continue `prompt` (see `prompt_ids`), one Step a token.

        Ends at an end token, a stop string, `max_tokens`, or a full context ("length"). `SamplingParams` says what
        the settings from `temperature` to `logit_bias` do; each Step names the `top_logprobs` likeliest tokens.
        The same seed gives the same text, on the same kernels. `reuse_prefix` goes on from what the last such call
        left in the cache, so that a chat's next turn computes only what is new.
        Raises at the call, before any work, ContextOverflowError for a prompt that leaves no room for an
        answer, UsageError for a setting out of range, and what `prompt_ids` raises.
        """
        model = self.model
        settings = Settings(
            max_tokens=max_tokens,
            sampling=SamplingParams(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                logit_bias=tuple((logit_bias or {}).items()),
            ),
            seed=seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            top_logprobs=top_logprobs,
        )
        for token_id in logit_bias or ():
            if token_id >= self.config.vocab_size:
                raise UsageError(f"logit_bias: {token_id} is outside the vocabulary of {self.config.vocab_size}")
        ids = self.prompt_ids(prompt, thinking=thinking, add_bos=add_bos)
        return generate(
            model,
            self._cache_for(reuse_prefix),
            ids,
            settings,
            end_ids=self._end_ids,
            detokenizer=self.tokenizer.stream() if self._has_tokenizer else None,
            prefill_chunk=model.prefill_chunk,
            lengths=self._lengths,
        )

    def close(self) -> None:
        """Let go of the model's memory and files. May be called twice."""
        if self._model is not None:
            self._closing()
        self._model = self._mtp = None
        self._cached = None
        self._checkpoint.close()

    @property
    def model(self) -> Model | CardModel:
        """The network itself, for tools that run it their own way. Raises UsageError when the engine is closed."""
        if self._model is None:
            raise UsageError("the engine is closed")
        return self._model

    def _cache_for(self, reuse_prefix: bool) -> CachedTokens:
        if not reuse_prefix:
            return self._new_cache()
        if self._cached is None:
            self._cached = self._new_cache()
        return self._cached

    def _new_cache(self) -> CachedTokens:
        capacity, dtype = self.max_context, self.kernels.cache_dtype
        drafter: Drafter | None = None
        if self._mtp is not None:
            drafter = MtpDrafter(self._mtp, self._mtp.cache(capacity, dtype))
        elif self._lengths is not None:
            drafter = LookupDrafter()
        return CachedTokens(self.model.new_cache(capacity), drafter)

    def _chat_ids(self, messages: Sequence[Message], thinking: bool | None) -> list[int]:
        template = self.chat_template
        if template is None:
            raise TemplateError(f"{self.path.name} has no chat template; `--raw` continues text without one")
        if thinking is not None and not template.switches_thinking:
            raise UsageError("this model's chat template cannot switch thinking on or off")
        return template.encode(self.tokenizer, messages, thinking=thinking)

    @property
    def _has_tokenizer(self) -> bool:
        return (self.path / "tokenizer.json").is_file()

    @cached_property
    def _end_ids(self) -> frozenset[int]:
        return self.tokenizer.eos_ids if self._has_tokenizer else end_token_ids(self.path)


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
