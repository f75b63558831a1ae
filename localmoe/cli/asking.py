"""From what the user typed to what the model is asked: plain text to continue, or messages, by way of a template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from localmoe.cli import prompt_template, settings
from localmoe.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from localmoe.cli.prompt_template import PromptTemplate
    from localmoe.text import Message


@dataclass(frozen=True)
class Form:
    """What every question of a command shares. Made by `form`."""

    raw: bool = False
    system: str | None = None
    template: PromptTemplate | None = None
    params: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs_text(self) -> bool:
        """Whether there is nothing to ask without a text of the user's."""
        return self.template is None or self.template.takes_input

    @property
    def wishes_thinking(self) -> bool | None:
        """What the template says of thinking."""
        return None if self.template is None else self.template.settings.get("think")

    def ask(
        self, text: str, *, system: str | None = None, params: Mapping[str, str] | None = None
    ) -> str | list[Message]:
        """What the model is asked for `text`, with a system prompt and parameters of its own before the shared ones.

        Raises UsageError for parameters that the template does not have or lacks, and for those without one.
        """
        system = self.system if system is None else system
        if self.template is not None:
            filled = self.template.fill({**self.params, **(params or {})}, text)
            text, system = filled.prompt, filled.system if system is None else system
        elif params:
            raise UsageError("params fill in a template; add --template NAME")
        return text if self.raw else messages(text, settings.system(system, "run"))


def form(raw: bool, system: str | None, template: str | None, param: Sequence[str] | None) -> Form:
    """The options put together. Raises UsageError for those that contradict each other, and as `load` does."""
    if param and template is None:
        raise UsageError("--param fills in a template; add --template NAME")
    saved = None if template is None else prompt_template.load(template)
    if raw and saved is not None and saved.system is not None:
        raise UsageError(f"--raw: the template {template} has a system prompt, which needs the model's chat template")
    return Form(raw, system, saved, prompt_template.parse_params(param))


def messages(question: str, system: str | None) -> list[Message]:
    """A conversation of one question."""
    asked: list[Message] = [{"role": "user", "content": question}]
    return asked if system is None else [{"role": "system", "content": system}, *asked]
