"""An open model: what a program talks to. `localmoe.load` makes one."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeGuard

import torch
from torch import Tensor

from localmoe.draft_length import DraftLength, FixedLength, MeasuredLength
from localmoe.errors import CheckpointError, ContextOverflowError, TemplateError, UsageError
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.safetensors import TensorInfo
from localmoe.generate import Settings, Step, generate
from localmoe.grammar import Grammar, Vocabulary
from localmoe.kernels.dispatch import CACHE_DTYPES, Kernels
from localmoe.model.config import ModelConfig
from localmoe.model.deepseek import Model
from localmoe.model.mtp import MtpLayer
from localmoe.offload.on_card import OnCard
from localmoe.sampling import SamplingParams
from localmoe.session import CachedTokens
from localmoe.session_file import restore, write
from localmoe.sessions import Facts
from localmoe.speculative import MOST_DRAFTS, Drafter, LookupDrafter, MtpDrafter
from localmoe.text import (
    THINKING_END,
    ChatTemplate,
    Message,
    ThinkingSplitter,
    Tokenizer,
    end_token_ids,
    tokenizer_file,
)
from localmoe.text.files import read_json_object

if TYPE_CHECKING:
    from localmoe.model.card.model import CardModel, Split

Prompt = str | Sequence[int] | Sequence[Message]

_MOST_CHAINED = 3
"""Guesses of an MTP layer that are worth trying: it was trained for the first, and each costs a pass of it."""

_SPLIT_TOKENS = 8
"""Passes that a token's time on a card is split up by."""


class Engine:
    """An open model. Made by `load`; close it, or use it as a context manager."""

    def __init__(
        self,
        model: Model | CardModel,
        checkpoint: Checkpoint,
        kernels: Kernels,
        max_context: int,
        card: OnCard | None = None,
    ) -> None:
        self._card = card  # none once it is closed
        self.placement = card.placement if card is not None else None
        """Where everything is, if some of it is on a card."""
        self.reads_the_disk = False
        """Whether the model is larger than the memory that it may use, so that experts come from the disk."""
        self.config: ModelConfig = model.config
        self.path: Path = checkpoint.directory
        self.kernels = kernels
        self.max_context = max_context
        self._checkpoint = checkpoint
        self._model: Model | CardModel | None = model
        self._cached: CachedTokens | None = None  # what `reuse_prefix` goes on from
        self._mtp: MtpLayer | None = None
        self._lengths: DraftLength | None = None
        self._session_heat: Tensor | None = None  # what the opened session counted, before this run

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
        self._mtp, self._cached = layer, None
        if drafts is None:
            self._lengths = MeasuredLength(_MOST_CHAINED if layer is not None else MOST_DRAFTS)
        else:
            self._lengths = FixedLength(drafts)

    def logits(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """Float32 logits [T, V] of one sequence of T tokens, from an empty cache.

        Raises InputError for no tokens or ids outside the vocabulary, ContextOverflowError for too many.
        """
        model = self.model
        ids = torch.as_tensor(token_ids, dtype=torch.int64)
        if len(ids) > self.max_context:
            raise ContextOverflowError(f"{len(ids):,} tokens do not fit the context of {self.max_context:,}")
        self._leave_the_card()
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
        if _is_chat(prompt):
            return self._chat_ids(prompt, thinking)
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
        schema: str | Mapping[str, Any] | None = None,
        grammar: str | None = None,
        choice: Sequence[str] = (),
        thinking: bool | None = None,
        add_bos: bool = True,
        reuse_prefix: bool = False,
    ) -> Generator[Step]:
        """Answer or continue `prompt` (see `prompt_ids`), one Step a token.

        Ends at an end token (after messages at any that begins a turn, too), a stop string, `max_tokens`, or a full
        context ("length"). `SamplingParams` says what the settings from `temperature` to `logit_bias` do; each Step
        names the `top_logprobs` likeliest tokens. The same seed gives the same text, on the same kernels.
        `reuse_prefix` goes on from what such calls left in the cache, so that a chat's next turn computes only what is
        new. At most one of `schema` (JSON schema), `grammar` and `choice` says what the answer, after any thinking, has
        to be: see `localmoe.grammar`. Raises at the call UsageError for a setting out of range, ContextOverflowError
        for a prompt that leaves no room, and what `prompt_ids` raises.
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
            grammar=(held_to := self._grammar(schema, grammar, choice)),
            grammar_after=THINKING_END if held_to is not None and self._begins_thinking(prompt, thinking) else "",
        )
        self._check_bias(logit_bias or {})
        ids = self.prompt_ids(prompt, thinking=thinking, add_bos=add_bos)
        return generate(
            model,
            self._cache_for(reuse_prefix),
            ids,
            settings,
            end_ids=self._end_ids | self._turn_ids if _is_chat(prompt) else self._end_ids,
            detokenizer=self.tokenizer.stream() if self._has_tokenizer else None,
            prefill_chunk=model.prefill_chunk,
            lengths=self._lengths,
        )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights, in hex: see `localmoe.formats.fingerprint`."""
        from localmoe.formats.fingerprint import fingerprint

        return fingerprint(self.path, self.tensors)

    @property
    def cache_dtype(self) -> str:
        """What the latent cache holds: float32, bf16 or int8."""
        return next(name for name, dtype in CACHE_DTYPES.items() if dtype == self.kernels.cache_dtype)

    @property
    def cache_bytes(self) -> int:
        """Memory that the kept latent cache takes now; see `generate`'s `reuse_prefix`."""
        return 0 if self._cached is None else self._cached.nbytes

    def expert_uses(self) -> Tensor | None:
        """How often each expert fired since the model was opened, [L, E], where it is counted: on a card."""
        return None if self._card is None else self._card.uses()

    def expert_hits(self) -> Tensor | None:
        """How many of them found their expert on the card, and how many there were, [L, 2]; between passes."""
        return None if self._card is None else self._card.hits()

    def hit_rates(self, since: Tensor | None = None) -> list[float] | None:
        """The share of each MoE layer's expert uses that the card served, measured from when `expert_hits` said `since`
        (None: from the beginning), and foreseen where nothing was counted; None without a card. Between passes."""
        return None if self._card is None else self._card.hit_rates(self.config.moe_layers, since)

    @property
    def troubles(self) -> list[str]:
        """What makes a card slower than it need be; nothing where all works, or without one."""
        return [] if self._card is None else self._card.troubles()

    def card_split(self, held: int) -> Split | None:
        """Where a decoded token's time goes on the card, from a few passes beside what is decoded: after the kept
        conversation, or where none is kept after `held` random tokens. Nothing of the conversation changes. None
        without a card, or where the context has no room for one token more."""
        model = self.model
        if isinstance(model, Model):
            return None
        if self._cached is not None and self._cached.length:
            cache, ids = self._cached.cache, self._cached.token_ids[-_SPLIT_TOKENS:]
        else:
            random = torch.Generator().manual_seed(0)
            cache = model.new_cache(self.max_context)
            held = min(held, cache.capacity - 1)
            for layer in cache.layers:
                cache.append(layer, torch.randn(held, self.config.latent_width, generator=random))
            cache.advance(held)
            self._cached = None  # a card holds one cache
            ids = tuple(torch.randint(0, self.config.vocab_size, (_SPLIT_TOKENS,), generator=random).tolist())
        return model.split(ids, cache) if cache.length < cache.capacity else None

    def save_session(self, path: Path, facts: Facts) -> Facts:
        """Write what `reuse_prefix` would go on from, and `facts`, whose model and counts are filled in, to a file.

        Atomic: see `localmoe.session_file`. Raises StorageError; nothing in memory is lost then.
        """
        known = replace(facts, model_hash=self.fingerprint, cache_dtype=self.cache_dtype)
        uses, before = self.expert_uses(), self._session_heat
        heat = uses if before is None else before if uses is None else before + uses
        return write(path, known, self._cache_for(reuse_prefix=True), heat)

    def open_session(self, path: Path, *, model: str = "this model") -> Facts:
        """Read what `save_session` wrote: the next call with `reuse_prefix` goes on from there.

        An MTP layer goes on from its own rows, or, where the session was kept without them, from what comes next. The
        experts that the session used get places on a card. `model` is what messages call this one. Raises SessionError,
        ContextOverflowError, StorageError; on the CPU the engine goes on as before then.
        """
        before, self._cached = self._cached if self.placement is None else None, None  # a card holds one cache
        try:
            cached = self._new_cache()
            restored = restore(path, cached, self.fingerprint, self.cache_dtype, model)
        except BaseException:
            self._cached = before
            raise
        self._cached = cached
        heat, shape = restored.expert_heat, (self.config.num_hidden_layers, self.config.n_routed_experts)
        usable = heat is not None and heat.shape == shape and bool((heat.isfinite() & (heat >= 0)).all())
        self._session_heat = heat if usable else None
        if self._session_heat is not None and self._card is not None:
            self._card.expect(self._session_heat)
        return restored.facts

    def close(self) -> None:
        """Let go of the model's memory and files. May be called twice."""
        card, self._card = self._card, None
        if card is not None:
            card.close()
        self._model = self._mtp = self._cached = None
        try:
            if card is not None:
                torch.cuda.empty_cache()  # or the next model would find the card as full as before
        finally:
            self._checkpoint.close()

    @property
    def model(self) -> Model | CardModel:
        """The network itself, for tools that run it their own way. Raises UsageError when the engine is closed."""
        if self._model is None:
            raise UsageError("the engine is closed")
        return self._model

    def _cache_for(self, reuse_prefix: bool) -> CachedTokens:
        if not reuse_prefix:
            self._leave_the_card()
            return self._new_cache()
        if self._cached is None:
            self._cached = self._new_cache()
        return self._cached

    def _leave_the_card(self) -> None:
        """A card holds one cache: what was kept there to be gone on from is lost to the next one."""
        if self.placement is not None:
            self._cached = None

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
        return tokenizer_file(self.path) is not None

    def _check_bias(self, logit_bias: Mapping[int, float]) -> None:
        for token_id in logit_bias:
            if token_id >= self.config.vocab_size:
                raise UsageError(f"logit_bias: {token_id} is outside the vocabulary of {self.config.vocab_size}")

    def _grammar(
        self, schema: str | Mapping[str, Any] | None, grammar: str | None, choice: Sequence[str]
    ) -> Grammar | None:
        values = {"schema": schema, "grammar": grammar, "choice": choice or None}
        given = [name for name, value in values.items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"{given[0]} and {given[1]} are both given; an answer can be held to one")
        if schema is not None:
            return self._vocabulary.schema(schema)
        if grammar is not None:
            return self._vocabulary.grammar(grammar)
        return self._vocabulary.choice(choice) if choice else None

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer, self.config.vocab_size, self._end_ids)

    def _begins_thinking(self, prompt: Prompt, thinking: bool | None) -> bool:
        """Whether the template ends the prompt inside the model's thinking."""
        if not _is_chat(prompt) or self.chat_template is None:
            return False
        return ThinkingSplitter.after(self.chat_template.render(prompt, thinking=thinking)).is_thinking

    @cached_property
    def _end_ids(self) -> frozenset[int]:
        return self.tokenizer.eos_ids if self._has_tokenizer else end_token_ids(self.path)

    @cached_property
    def _turn_ids(self) -> frozenset[int]:
        return frozenset() if self.chat_template is None else self.chat_template.turn_ids(self.tokenizer)


def _is_chat(prompt: Prompt) -> TypeGuard[Sequence[Message]]:
    return not isinstance(prompt, str) and bool(prompt) and all(isinstance(message, Mapping) for message in prompt)
