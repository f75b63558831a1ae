"""Saved prompts: `$XDG_CONFIG_HOME/localmoe/templates/NAME.toml`.

    prompt = "Translate into {language}:\\n{input}"
    description = "a translation"           and, all optional:
    system = "You are a translator."
    temperature = 0.2                       any setting of how to answer, as in the config file's [options]
    [params]
    language = "French"                     what {language} is when --param does not say

`{name}` is replaced, `{{name}}` is not and loses a brace; every other brace stands for itself. Values are put in
as they are: nothing in them is replaced again, and nothing is run. Not to be confused with a model's chat template.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from localmoe.cli import config_file
from localmoe.cli.config_file import ANSWER, SAMPLING, Key, check_value
from localmoe.cli.sanitize import printable_line
from localmoe.cli.values import suggestion
from localmoe.errors import InputError, StorageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SETTINGS: Mapping[str, Key] = {**SAMPLING, **{name: key for name, key in ANSWER.items() if name != "system"}}
_TEXTS = ("prompt", "system", "description")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_FIELD = re.compile(r"\{(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))\}")
INPUT = "input"


@dataclass(frozen=True)
class PromptTemplate:
    """One saved prompt. `settings` are those of how to answer, by their names in the config file."""

    name: str
    prompt: str
    system: str | None = None
    description: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fields(self) -> list[str]:
        """The names between braces, each once."""
        found = [match[2] for text in (self.prompt, self.system or "") for match in _FIELD.finditer(text)]
        return list(dict.fromkeys(name for name in found if name))

    @property
    def takes_input(self) -> bool:
        return INPUT in self.fields

    def fill(self, given: Mapping[str, str], text: str) -> PromptTemplate:
        """The template with its fields replaced: by `given`, by its own defaults, and `text` for `{input}`. Without
        that field the text comes under the prompt. Raises UsageError for a name too many or too few."""
        known = [name for name in self.fields if name != INPUT]
        for name in given:
            if name not in known:
                hint = suggestion(name, known) if known else "; it has none"
                raise UsageError(f"--param: template {self.name} has no {{{printable_line(name)}}}{hint}")
        values = {**self.params, **given, INPUT: text}
        missing = [name for name in known if name not in values]
        if missing:
            raise UsageError(f"template {self.name} needs " + " and ".join(f"--param {name}=..." for name in missing))

        def filled(template: str) -> str:
            return _FIELD.sub(lambda match: f"{{{match[1]}}}" if match[1] else values[match[2]], template)

        prompt = filled(self.prompt)
        if text and not self.takes_input:
            prompt = f"{prompt}\n{text}"
        return PromptTemplate(self.name, prompt, None if self.system is None else filled(self.system))


def directory() -> Path:
    return config_file.directory() / "templates"


def path_of(name: str) -> Path:
    """Where a template lies. Raises UsageError for what cannot be a name: it is never a path."""
    if _NAME.fullmatch(name) is None:
        raise UsageError(
            f"{printable_line(name)!r} cannot be a template's name: letters, digits, '_' and '-', up to 64 of them"
        )
    return directory() / f"{name}.toml"


def names() -> list[str]:
    """The templates that are here."""
    try:
        found = [path.stem for path in directory().iterdir() if path.suffix == ".toml" and _NAME.fullmatch(path.stem)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(f"{directory()}: cannot be read: {error.strerror}") from error
    return sorted(found)


def load(name: str) -> PromptTemplate:
    """Raises UsageError for a template that is not here, naming the nearest, and for one that is not right."""
    path = path_of(name)
    if not path.is_file():
        hint = suggestion(name, names()) if names() else "; localmoe templates add makes one"
        raise UsageError(f"no template is called {name!r}{hint}")
    return read(name, config_file.parse(config_file.text(path), path), str(path))


def read(name: str, content: Mapping[str, Any], where: str) -> PromptTemplate:
    """A template from what its file holds. Raises UsageError naming the file and the key."""
    known = [*_TEXTS, "params", *SETTINGS]
    for key, value in content.items():
        if key in SETTINGS:
            check_value(SETTINGS[key], key, value, f"{where}: {key}")
        elif key == "params":
            if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
                raise UsageError(f"{where}: [params] holds a text for each name")
        elif key not in _TEXTS:
            raise UsageError(f"{where}: a template has no {key!r}{suggestion(key, known)}")
        elif not isinstance(value, str):
            raise UsageError(f"{where}: {key}: a text in quotation marks is needed, not {value!r}")
    if not content.get("prompt"):
        raise UsageError(f"{where}: a template needs a prompt")
    params = content.get("params", {})
    settings = {key: value for key, value in content.items() if key in SETTINGS}
    template = PromptTemplate(
        name, content["prompt"], content.get("system"), content.get("description", ""), params, settings
    )
    for each in params:
        if each == INPUT or each not in template.fields:
            raise UsageError(f"{where}: [params] {each}: there is no {{{each}}} to stand for")
    return template


def parse_params(entries: Sequence[str] | None) -> dict[str, str]:
    """Names and values from `NAME=VALUE`. Raises UsageError for what is not that, InputError for broken UTF-8."""
    found: dict[str, str] = {}
    for entry in entries or ():
        name, equals, value = entry.partition("=")
        if not equals or not name.isidentifier() or name == INPUT:
            raise UsageError(f"--param: {printable_line(entry)!r} is not NAME=VALUE")
        if any("\ud800" <= character <= "\udfff" for character in entry):
            raise InputError(f"--param {printable_line(name)}: the value is not valid UTF-8")
        found[name] = value
    return found
