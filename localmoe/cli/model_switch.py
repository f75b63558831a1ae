"""`/model NAME` in a chat: another model takes over, with the same options and what the user has set since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from localmoe.cli import settings
from localmoe.cli.answer import Request, splitter
from localmoe.cli.model_argument import meant
from localmoe.cli.opening import find, label, open_found
from localmoe.errors import LocalMoeError

if TYPE_CHECKING:
    from localmoe.cli.options import Machine
    from localmoe.engine import Engine
    from localmoe.store import Resolved


@dataclass(frozen=True)
class Opened:
    """The model that goes on. `problem` says why it is the one before."""

    engine: Engine
    name: str
    request: Request
    problem: str | None = None


class ModelSwitch:
    """Changes a chat's model. `flags` are the sampling settings of the command line, `resolved` is the first model."""

    def __init__(self, resolved: Resolved, machine: Machine, flags: Mapping[str, float], *, yes: bool) -> None:
        self._resolved = resolved
        self._machine = machine
        self._flags = flags
        self._yes = yes

    def __call__(self, engine: Engine, request: Request, model: str) -> Opened:
        """`model` in place of `engine`, which is closed first, since memory may not hold both; where `model` then
        cannot be opened, the one before is opened again.

        Raises, with `engine` still open, what finding, quantizing or downloading `model` raises.
        """
        before, found = self._resolved, find(meant(model), self._machine, yes=self._yes)
        advised = settings.sampling(self._flags, before.name, engine.generation_defaults)
        wishes = {name: value for name, value in request.sampling.items() if value != advised[name]}
        engine.close()
        try:
            opened = self._open(found, request, wishes)
        except (LocalMoeError, KeyboardInterrupt, MemoryError) as error:
            opened = self._open(before, request, wishes)
            return replace(opened, problem=f"{error or 'stopped'}; {opened.name} goes on")
        self._resolved = found
        return opened

    def _open(self, resolved: Resolved, request: Request, wishes: Mapping[str, float]) -> Opened:
        """Raises what loading raises, and TemplateError for a model that cannot chat."""
        engine = open_found(resolved, self._machine)
        try:
            chosen = settings.sampling({**self._flags, **wishes}, resolved.name, engine.generation_defaults)
            template = engine.chat_template
            can_switch = template is not None and template.switches_thinking
            thinking = request.thinking if can_switch else None
            splitter(engine, [{"role": "user", "content": "?"}], thinking)
        except BaseException:
            engine.close()
            raise
        return Opened(engine, label(resolved), replace(request, sampling=chosen, thinking=thinking))
