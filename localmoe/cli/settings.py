"""Where sampling settings come from: flag, user config, models.toml, generation_config.json, else greedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localmoe.cli import config_file
from localmoe.cli.values import check_sampling
from localmoe.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from localmoe.engine import Engine

GREEDY: dict[str, float] = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
_IN_CHECKPOINTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # of generation_config.json


def sampling(flags: Mapping[str, float], name: str, checkpoint: Mapping[str, float]) -> dict[str, float]:
    """Every sampling setting for the model `name`, each from the first place that has it.

    `flags` are those given on the command line, `checkpoint` what generation_config.json advises.
    """
    chosen = GREEDY | dict(checkpoint) | advised(name) | config_file.read().sampling | dict(flags)
    return chosen | {"top_k": int(chosen["top_k"])}


def thinking(flag: bool | None, command: str, engine: Engine, wish: bool | None = None) -> bool | None:
    """Whether to think: the flag, else a wish, else the config file's, where this model's template can be asked."""
    template = engine.chat_template
    if flag is not None or template is None or not template.switches_thinking:
        return flag
    return config_file.read().value(command, "think") if wish is None else wish


def system(flag: str | None, command: str) -> str | None:
    """The system prompt: the flag, else the config file's."""
    text: str | None = config_file.read().value(command, "system") if flag is None else flag
    return text


def as_text(sampling: Mapping[str, float], seed: int | None = None) -> str:
    """The settings in words, a seed with them where there is one."""
    if seed is not None:
        return f"{as_text(sampling)}, seed {seed}"
    if sampling["temperature"] == 0:
        penalties = [f"{name} {sampling[name]:g}" for name in list(GREEDY)[4:] if sampling[name] != GREEDY[name]]
        return ", ".join(["greedy: always the likeliest token", *penalties])
    return ", ".join(f"{name} {value:g}" for name, value in sampling.items() if value != GREEDY[name])


def advised(name: str) -> dict[str, float]:
    """What models.toml says the makers of `name` advise."""
    from localmoe.hub import registry

    known = registry().get(name)
    return dict(known.sampling) if known is not None else {}


def from_checkpoint(directory: Path) -> dict[str, float]:
    """What a checkpoint's generation_config.json advises; nothing where it says `do_sample: false`.

    The same as the engine's `generation_defaults`, for commands that load no engine. Raises CheckpointError.
    """
    from localmoe.text.files import read_json_object

    path = directory / "generation_config.json"
    config = read_json_object(path)
    if config.get("do_sample") is False:
        return {}
    found = {name: value for name in _IN_CHECKPOINTS if (value := config.get(name)) is not None}
    for name, value in found.items():
        try:
            check_sampling(name, value, f"{path}: {name}")
        except UsageError as error:
            raise CheckpointError(str(error)) from error
    return found
