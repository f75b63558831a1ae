"""Options that belong together, as one parameter of a command: its function says what it does and not what it takes.

Typer wants every option as a parameter of its own. A command that is `grouped` may have dataclasses of options among
its parameters; for Typer their fields stand in their place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, get_type_hints

from localmoe.cli import options
from localmoe.cli.answer import Request


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, each of whose groups Typer sees as the group's options, in that place and order."""
    hints = get_type_hints(command, include_extras=True)
    flat: list[tuple[str, Any, Any]] = []  # name, default, type
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if is_dataclass(kind):
            groups[parameter.name] = kind
            inner = get_type_hints(kind, include_extras=True)
            flat += [(field.name, field.default, inner[field.name]) for field in fields(kind)]
        else:
            flat.append((parameter.name, parameter.default, kind))

    def called(**given: Any) -> None:
        made = {}
        for name, kind in groups.items():
            made[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        command(**given, **made)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, keyword, default=value, annotation=kind) for name, value, kind in flat]
    called.__dict__["__signature__"] = inspect.Signature(parameters)
    called.__annotations__ = {name: kind for name, _, kind in flat}
    called.__name__, called.__doc__, called.__module__ = command.__name__, command.__doc__, command.__module__
    return called


@dataclass(frozen=True)
class AnswerOptions:
    """How to answer: what `run` and `chat` share."""

    max_tokens: options.MaxTokens = None
    temp: options.Temperature = None
    top_p: options.TopP = None
    top_k: options.TopK = None
    min_p: options.MinP = None
    repetition_penalty: options.RepetitionPenalty = None
    presence_penalty: options.PresencePenalty = None
    frequency_penalty: options.FrequencyPenalty = None
    logit_bias: options.LogitBias = None
    seed: options.Seed = None
    stop: options.Stop = None
    system: options.System = None
    session: options.Session = None
    when_full: options.WhenFull = None

    def check(self) -> None:
        """Raises UsageError naming the option that is wrong."""
        self.flags()
        self.bias()
        options.check_stop(self.stop)
        options.check_when_full(self.when_full)

    def flags(self) -> dict[str, float]:
        """The sampling flags that were given, by the names that sampling uses. Raises UsageError."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return options.SamplingFlags(self.temp, self.top_p, self.top_k, self.min_p, *penalties).given()

    def request(self, sampling: dict[str, float], thinking: bool | None) -> Request:
        """What the engine is asked for, with the settings that hold and whether to think. Raises UsageError."""
        return Request(
            sampling=sampling,
            max_tokens=self.max_tokens,
            seed=self.seed,
            stop=self.stop or (),
            thinking=thinking,
            logit_bias=self.bias(),
        )

    def bias(self) -> dict[int, float]:
        """What to add to which token's logit. Raises UsageError."""
        return options.parse_bias(self.logit_bias)


@dataclass(frozen=True)
class MachineOptions:
    """What the engine may use."""

    device: options.Device = "auto"
    kernels: options.KernelTier = "auto"
    threads: options.Threads = None
    vram: options.Vram = None
    ram: options.Ram = None
    ctx: options.Context = None
    cache_dtype: options.CacheDtype = "auto"

    def machine(self) -> options.Machine:
        """Put together. Raises UsageError naming the option that is wrong."""
        limits = (self.threads, self.vram, self.ram, self.ctx)
        return options.machine(self.device, self.kernels, *limits, self.cache_dtype)


@dataclass(frozen=True)
class EngineOptions(MachineOptions):
    """The same for an engine that answers."""

    mtp: options.Mtp = "auto"
    deterministic: options.Deterministic = False

    def machine(self) -> options.Machine:
        """Raises UsageError naming the option that is wrong."""
        return replace(super().machine(), mtp=options.parse_mtp(self.mtp), deterministic=self.deterministic)
