"""`--session NAME`: a conversation taken up from its file, and written back."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from localmoe import sessions
from localmoe.cli import settings
from localmoe.cli.conversation import Conversation
from localmoe.cli.options import check_sampling
from localmoe.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from localmoe.cli.answer import Request
    from localmoe.cli.options import Machine
    from localmoe.engine import Engine

_SHARE = 0.1  # of the time since the last one that saving may take


class Kept:
    """A session, its name taken until it is closed; without a name a conversation that nobody keeps.

    Opened before the model is loaded, so that a wrong name costs nothing.
    """

    def __init__(self, claim: sessions.Claim | None, facts: sessions.Facts | None) -> None:
        self._claim = claim
        self._facts = facts  # of the file that was there
        self._saved_at: float | None = None
        self._took = 0.0

    @classmethod
    def open(cls, name: str | None) -> Kept:
        """Raises UsageError for what is no name, SessionError for a file that cannot be used or is open elsewhere."""
        if name is None:
            return cls(None, None)
        claim = sessions.Claim.take(name)
        try:
            return cls(claim, sessions.read_facts(claim.path) if claim.path.exists() else None)
        except BaseException:
            claim.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._claim is not None:
            self._claim.close()

    @property
    def name(self) -> str | None:
        """None for a conversation that is not kept."""
        return None if self._claim is None else self._claim.name

    @property
    def is_new(self) -> bool:
        """Whether there was no file."""
        return self._facts is None

    @property
    def tokens(self) -> int:
        """Tokens that the file held."""
        return 0 if self._facts is None else self._facts.tokens

    def machine(self, machine: Machine) -> Machine:
        """The machine with the latent cache that the session has. Raises UsageError where another is asked for."""
        if self._facts is None or machine.cache_dtype == self._facts.cache_dtype:
            return machine
        if machine.cache_dtype != "auto":
            raise UsageError(
                f"--cache-dtype {machine.cache_dtype}: session {self.name} holds its latents in "
                f"{self._facts.cache_dtype}; leave the option out"
            )
        return replace(machine, cache_dtype=self._facts.cache_dtype)

    def conversation(self, system: str | None) -> Conversation:
        """What was said so far; a system prompt given now takes the old one's place. Raises SessionError."""
        if self._facts is None:
            return Conversation(system)
        try:
            found = Conversation.of(self._facts.messages)
        except ValueError as error:
            raise sessions.damaged(self.name or "") from error
        found.count(self._facts.tokens)
        return found if system is None else replace(found, system=system)

    def flags(self, given: Mapping[str, float]) -> dict[str, float]:
        """Sampling flags: those of the session and, before them, those given now."""
        kept = {} if self._facts is None else dict(self._facts.sampling)
        for name, value in kept.items():
            check_sampling(name, value, f"session {self.name}: {name}")
        return {name: value for name, value in kept.items() if name in settings.GREEDY} | dict(given)

    def request(self, request: Request) -> Request:
        """The request with the session's seed and biases where it has none of its own."""
        if self._facts is None:
            return request
        seed = self._facts.seed if request.seed is None else request.seed
        return replace(request, seed=seed, logit_bias=request.logit_bias or dict(self._facts.logit_bias))

    def restore(self, engine: Engine, label: str) -> None:
        """Read the latents into the engine. Raises SessionError, ContextOverflowError, StorageError."""
        if self._claim is not None and self._facts is not None:
            engine.open_session(self._claim.path, model=label)

    @property
    def is_due(self) -> bool:
        """Whether saving now would take little of the time since it was done last: it writes the whole cache."""
        return self._saved_at is None or time.monotonic() - self._saved_at >= self._took / _SHARE

    def save(self, engine: Engine, label: str, conversation: Conversation, request: Request) -> None:
        """Write everything, if anything changed. Raises StorageError; the old file, and what is in memory, are whole
        then."""
        if self._claim is None:
            return
        started = time.monotonic()
        facts = sessions.Facts(
            messages=conversation.messages,
            sampling=request.sampling,
            seed=request.seed,
            logit_bias=request.logit_bias,
            model=label,
        )
        if self._facts is not None and _said(self._facts) == _said(facts):
            return  # what is on disk says the same
        self._facts = engine.save_session(self._claim.path, facts)
        self._saved_at = time.monotonic()
        self._took = self._saved_at - started


def _said(facts: sessions.Facts) -> tuple[object, ...]:
    return list(facts.messages), dict(facts.sampling), facts.seed, dict(facts.logit_bias)


def turns_to_drop(engine: Engine, conversation: Conversation, question: str, thinking: bool | None) -> int | None:
    """How many of the oldest turns have to go for `question` to be asked with half of the context free, or, where
    that cannot be, with as much free as there is without any turn. None where even then there is no room.

    Half, because every drop moves what comes after the system prompt, which must then be computed again.
    """

    def used(dropped: int) -> int:
        rest = Conversation(conversation.system, conversation.turns[dropped:])
        return len(engine.prompt_ids(rest.asking(question), thinking=thinking))

    least, most = 0, len(conversation.turns)
    if used(most) >= engine.max_context:
        return None
    while least < most:
        middle = (least + most) // 2
        if used(middle) <= engine.max_context // 2:
            most = middle
        else:
            least = middle + 1
    return least
