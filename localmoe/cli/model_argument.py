"""What MODEL means before the store is asked: an alias of the config file, or its default model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localmoe.errors import ModelNotFoundError, UsageError

if TYPE_CHECKING:
    from localmoe.cli.config_file import Config


def configured() -> str:
    """The config file's `model`. Raises UsageError where it names none."""
    model = _config().model
    if model is None:
        raise UsageError("missing MODEL; `localmoe list` shows the names, `localmoe config set model NAME` keeps one")
    return model


def meant(model: str) -> str:
    """The model that an alias stands for, with the alias's own ending if it has one; any other text as it is.

    Raises UsageError for an ending on top of the alias's own, ModelNotFoundError for the near miss of an alias.
    """
    from localmoe import store
    from localmoe.cli.values import near_miss
    from localmoe.hub import registry

    aliases = _config().aliases
    name, colon, ending = model.partition(":")
    if name in aliases:
        target = aliases[name]
        if colon and ":" in target:
            raise UsageError(f"{name} stands for {target}, which has an ending; leave :{ending} out")
        return target + colon + ending
    if aliases and not _is_prompt(model):
        try:
            store.parse_ref(model)
        except ModelNotFoundError:
            near = near_miss(name, [*aliases, *registry()])
            if near in aliases:
                raise ModelNotFoundError(f"no model is called {model!r}: did you mean your alias {near}?") from None
            raise
    return model


def with_prompt(model: str, prompt: str | None) -> tuple[str, str | None]:
    """MODEL and PROMPT of a command that has both: a first word that can only be a PROMPT is one."""
    return (meant(configured()), model) if prompt is None and _is_prompt(model) else (model, prompt)


def _is_prompt(text: str) -> bool:
    """Whether it has spaces, which no model's name has; a directory is told by its beginning."""
    return any(map(str.isspace, text)) and not text.startswith(("/", "~", "./", "../"))


def _config() -> Config:
    from localmoe.cli import config_file

    return config_file.read()
