"""The user's config file, `$XDG_CONFIG_HOME/localmoe/config.toml`: what may stand in it, and what it says.

    model = "deepseek-v2-lite-chat"      where MODEL is left out

    [alias]                              names of one's own for models
    [sampling]                           how to draw tokens, everywhere
    [options]                            any option below, for every command that has it
    [run] [chat] [bench] ...             the same for one command, before [options] and [sampling]

A flag on the command line comes before all of it. Whatever the file holds that is not known, or of the wrong type, is
refused by name: a misspelt setting that does nothing would be found out too late.
"""

from __future__ import annotations

import contextlib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from localmoe.cli.values import (
    CACHE_DTYPES,
    DEVICES,
    TIERS,
    check_choice,
    check_sampling,
    parse_size,
    suggestion,
)
from localmoe.errors import UsageError

Kind = Literal["text", "texts", "flag", "whole", "number", "size", "mtp", "choice"]
_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_ALSO = {"n": "max_tokens", "p": "prompt", "context": "ctx"}  # what else settings are called
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Key:
    """One setting: the command's parameter it stands for, what it may be, and what it does."""

    parameter: str
    kind: Kind
    what: str
    least: int = 1  # of a whole number
    choices: tuple[str, ...] = ()


SAMPLING: Mapping[str, Key] = {
    "temperature": Key("temp", "number", "0 always takes the likeliest token"),
    "top_p": Key("top_p", "number", "sample from the likeliest tokens that add up to this"),
    "top_k": Key("top_k", "number", "sample from so many of the likeliest tokens; 0: all"),
    "min_p": Key("min_p", "number", "sample from tokens at least so many times as likely as the likeliest"),
    "repetition_penalty": Key("repetition_penalty", "number", "1 is off"),
    "presence_penalty": Key("presence_penalty", "number", "0 is off"),
    "frequency_penalty": Key("frequency_penalty", "number", "0 is off"),
}
_MACHINE: Mapping[str, Key] = {
    "device": Key("device", "choice", "where to compute", choices=DEVICES),
    "kernels": Key("kernels", "choice", "the kernel tier", choices=TIERS),
    "threads": Key("threads", "whole", "CPU threads"),
    "vram": Key("vram", "size", "use at most this much GPU memory"),
    "ram": Key("ram", "size", "use at most this much CPU memory"),
    "ctx": Key("ctx", "whole", "context in tokens"),
    "cache_dtype": Key("cache_dtype", "choice", "what the latent cache holds", choices=CACHE_DTYPES),
}
ANSWER: Mapping[str, Key] = {
    "max_tokens": Key("max_tokens", "whole", "stop after so many tokens"),
    "seed": Key("seed", "whole", "make sampling repeatable", least=0),
    "stop": Key("stop", "texts", "end the answer before one of these texts"),
    "system": Key("system", "text", "the system prompt"),
    "think": Key("think", "flag", "let the model think first, where its template can"),
    "mtp": Key("mtp", "mtp", "tokens to guess at a time, or auto"),
}
_FROZEN: Mapping[str, Key] = {"deterministic": Key("deterministic", "flag", "freeze where experts are placed")}
_CHAT = {**SAMPLING, **ANSWER, **_MACHINE, **_FROZEN}
COMMANDS: Mapping[str, Mapping[str, Key]] = {
    "run": _CHAT,
    "chat": _CHAT,
    "bench": {
        "prompt": Key("prompt", "whole", "tokens to prefill"),
        "n": Key("count", "whole", "tokens to decode"),
        "context": Key("context", "whole", "tokens in the cache before decoding begins", least=0),
        "repeats": Key("repeats", "whole", "medians over so many"),
        **_MACHINE,
    },
    "eval": {**_MACHINE, **_FROZEN},
    "plan": {name: key for name, key in _MACHINE.items() if name != "kernels"},
    "doctor": {"threads": _MACHINE["threads"]},
}
"""The settings of each command's own table. No table for commands that write, delete or download."""
TABLES: Mapping[str, Mapping[str, Key]] = {
    "sampling": SAMPLING,
    "options": {**ANSWER, **_MACHINE, **_FROZEN},
    **COMMANDS,
}
MODEL = Key("model", "text", "the model where none is named")
ALIAS = Key("alias", "text", "the model that the name stands for")
_DEPENDS_ON_THE_MODEL = frozenset({"system", "think"})  # the command asks for them: not every model can


@dataclass(frozen=True)
class Config:
    """What the file says, checked; empty where there is none."""

    path: Path
    content: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str | None:
        """The model where none is named."""
        return self.content.get("model")

    @property
    def aliases(self) -> Mapping[str, str]:
        return MappingProxyType(self.content.get("alias", {}))

    @property
    def sampling(self) -> dict[str, float]:
        """The `[sampling]` table."""
        return dict(self.content.get("sampling", {}))

    def value(self, command: str, name: str) -> Any:
        """A setting of a command, from its own table or from `[options]`; None where neither has it."""
        found = self.content.get(command, {}).get(name)
        return self.content.get("options", {}).get(name) if found is None else found

    def defaults(self, command: str) -> dict[str, Any]:
        """What the file sets of a command's parameters, by their names in the program.

        Without what depends on the model, which the command asks for itself, and without `[sampling]`, which
        `settings.sampling` puts in its place among the others.
        """
        known = COMMANDS.get(command, {})
        found = {name: self.value(command, name) for name in known.keys() - _DEPENDS_ON_THE_MODEL}
        return {
            known[name].parameter: str(value) if known[name].kind == "mtp" else value
            for name, value in found.items()
            if value is not None
        }


def path() -> Path:
    """`$XDG_CONFIG_HOME/localmoe/config.toml`; the XDG rules ignore a relative XDG_CONFIG_HOME."""
    return directory() / "config.toml"


def directory() -> Path:
    """Where the config file and the prompt templates lie."""
    base = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".config") / "localmoe"


def read() -> Config:
    """The config file, checked. Raises UsageError naming the file, the key and what was probably meant."""
    where = path()
    return Config(where, check(parse(text(where), where), where))


def text(where: Path) -> str:
    """The file as it stands, empty without one. Raises UsageError."""
    try:
        return where.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def parse(content: str, where: Path) -> dict[str, Any]:
    """The file as TOML, not checked any further. Raises UsageError naming the line."""
    try:
        return tomllib.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: cannot be read: {error or 'nested too deep'}") from error


def check(content: dict[str, Any], where: Path) -> dict[str, Any]:
    """`content` itself. Raises UsageError for the first key or value that is wrong."""
    for name, value in content.items():
        if name == "model":
            check_value(MODEL, name, value, f"{where}: {name}")
        elif name not in ("alias", *TABLES):
            raise UsageError(f"{where}: {name!r} is not a setting{_instead(name)}")
        elif not isinstance(value, dict):
            raise UsageError(f"{where}: {name} is not a table; write [{name}] on a line of its own")
        elif name == "alias":
            _check_aliases(value, where)
        else:
            for inner, each in value.items():
                check_value(known_key(name, inner, str(where)), inner, each, f"{where}: [{name}] {inner}")
    return content


def known_key(table: str, name: str, where: str) -> Key:
    """Raises UsageError for what the table does not have."""
    keys = TABLES[table]
    if name not in keys:
        meant = _spelt(keys, name) or in_words(homes(name))
        said = f"; did you mean {meant}?" if meant else suggestion(name, list(keys))
        raise UsageError(f"{where}: [{table}] has no setting {name!r}{said}")
    return keys[name]


def homes(word: str) -> list[str]:
    """The settings that go by this name, `sampling.temperature` say, in any spelling: an option's own name too."""
    return [f"{table}.{name}" for table, keys in TABLES.items() if (name := _spelt(keys, word)) is not None]


def in_words(names: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def _spelt(keys: Mapping[str, Key], word: str) -> str | None:
    """The setting of a table that `word` is another spelling of: with dashes, in capitals, as the option."""
    plain = word.lower().lstrip("-").replace("-", "_").removeprefix("no_")
    plain = plain if plain in keys else _ALSO.get(plain, plain)
    return next((name for name, key in keys.items() if plain in (name, key.parameter)), None)


def _instead(name: str) -> str:
    """Where a setting that stands at the wrong place belongs, or what was probably meant."""
    for table, keys in TABLES.items():
        if (meant := _spelt(keys, name)) is not None:
            as_named = "" if meant == name else f", as {meant}"
            return f" at the top of the file; it belongs under [{table}]{as_named}"
    return suggestion(name, ["model", "alias", *TABLES])


def scalar(key: Key, word: str) -> Any:
    """What was typed as the setting's own type, where it can be read so; `check_value` refuses the rest."""
    if key.kind == "flag":
        return _FLAGS.get(word.lower(), word)
    if key.kind in ("whole", "number", "mtp"):
        for convert in (int, float):
            with contextlib.suppress(ValueError):
                return convert(word)
    return word


def check_value(key: Key, name: str, value: object, where: str) -> None:
    """Raises UsageError when `value` cannot be the setting's; `where` says who set it."""
    if key.kind == "number":
        check_sampling(name, value, where)
    elif key.kind == "choice":
        check_choice(value, key.choices, where)
    elif key.kind == "flag":
        _require(isinstance(value, bool), value, where, "true or false")
    elif key.kind == "whole":
        whole = isinstance(value, int) and not isinstance(value, bool) and key.least <= value < 1 << 63
        _require(whole, value, where, f"a whole number from {key.least} on")
    elif key.kind == "mtp":
        guesses = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 8
        _require(value == "auto" or guesses, value, where, '"auto" or a number from 0 to 7')
    elif key.kind == "texts":
        texts = isinstance(value, list) and all(isinstance(each, str) and each for each in value)
        _require(texts, value, where, 'a list of texts, as ["END"]')
    elif key.kind == "size":
        _require(isinstance(value, str), value, where, 'a size, as "12GiB"')
        parse_size(str(value), where)
    else:
        _require(isinstance(value, str) and bool(value), value, where, "a text in quotation marks")


def _require(right: bool, value: object, where: str, needed: str) -> None:
    if not right:
        shown = "a table" if isinstance(value, dict) else repr(value)
        raise UsageError(f"{where}: {needed} is needed, not {shown}")


def _check_aliases(aliases: dict[str, Any], where: Path) -> None:
    from localmoe.hub import registry

    for name, target in aliases.items():
        place = f"{where}: [alias] {name}"
        if _ALIAS.fullmatch(name) is None:
            raise UsageError(f"{place}: an alias is made of letters, digits, '.', '_' and '-'")
        if name in registry():
            raise UsageError(f"{place}: is a model's own name already; choose another")
        check_value(ALIAS, name, target, place)
        if target.partition(":")[0] in aliases:
            raise UsageError(f"{place}: {target!r} is an alias itself; name the model")
