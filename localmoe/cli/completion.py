"""`localmoe completion SHELL`: the script that a shell loads, and the candidates that it then asks for.

The scripts ask `localmoe __complete SHELL WORD... CURRENT`, the words before the cursor and the one it stands at. The
answer is a first line, `words` or `files` (then the shell completes file names itself), and a candidate a line, with
what it means where the shell can show that. Typer's own scripts know neither a word with a colon in it, as
MODEL:RECIPE, nor file names where a file is wanted, and zsh's passes candidates through eval.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmoe.cli import config_file, options, prompt_template, streams
from localmoe.cli.values import CACHE_DTYPES, TIERS, check_choice
from localmoe.errors import LocalMoeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SHELLS = ("bash", "zsh", "fish")
ASK = "__complete"
Candidates = dict[str, str]
"""Each with what it means, or an empty text."""

_WITHOUT_MODEL = frozenset({"list", "doctor", "config", "sessions", "templates", "completion"})  # as first argument
_FILE_METAVARS = ("FILE", "DIR", "FILE|-")


def completion(
    shell: Annotated[
        str, typer.Argument(metavar="bash|zsh|fish", show_default=False, help="The shell to print the script for.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help("shell, script"))] = False,
    debug: options.Debug = False,
) -> None:
    """Print what makes a shell complete commands, options, models, recipes, templates and settings.

    bash: eval "$(localmoe completion bash)" in ~/.bashrc. zsh: the same with zsh in ~/.zshrc, after compinit.
    fish: localmoe completion fish > ~/.config/fish/completions/localmoe.fish
    """
    check_choice(shell, SHELLS, "completion")
    script = _SCRIPTS[shell]
    if as_json:
        streams.write_json({"shell": shell, "script": script})
    else:
        streams.write(script)


def answer(arguments: Sequence[str], commands: Mapping[str, str], find: Callable[[str], Any]) -> str:
    """What to tell a shell. `commands` are the program's with what they do, `find` gets one.

    The arguments begin with the shell's name; bash's go on with its COMP_WORDBREAKS: it takes a word apart at these,
    and its candidates must be the part behind the last. Whatever goes wrong, there are no candidates.
    """
    shell, *words = arguments
    breaks = words.pop(0) if shell == "bash" and words else ""
    current = words[-1] if words else ""
    try:
        candidates = _complete(words[:-1], current, commands, find)
    except (LocalMoeError, OSError, ValueError):
        candidates = {}
    if candidates is None:
        return "files\n"
    cut = max((current.rfind(character) + 1 for character in ":=" if character in breaks), default=0)
    found = {value[cut:]: what for value, what in candidates.items() if value.startswith(current)}
    if shell == "bash":
        lines = list(found)
    elif shell == "zsh":  # whose lists have a colon between the two
        lines = [value.replace(":", "\\:") + (f":{what}" if what else "") for value, what in found.items()]
    else:
        lines = [value + (f"\t{what}" if what else "") for value, what in found.items()]
    return "".join(f"{line}\n" for line in ["words", *lines])


def _complete(
    words: Sequence[str], current: str, commands: Mapping[str, str], find: Callable[[str], Any]
) -> Candidates | None:
    """The candidates for `current` after `words`; None where a file name is wanted."""
    if not words:
        flags = {"--help": "", "--version": "", "--json": "with --version"}
        return flags if current.startswith("-") else dict(commands)
    if words[0] not in commands:
        return {}
    if len(words) == 1 and words[0] not in _WITHOUT_MODEL and not current.startswith(("-", "/", "./", "../", "~")):
        return models()  # asked for most, and answered without the command's code
    command, rest = find(words[0]), list(words[1:])
    while hasattr(command, "commands"):  # config, templates
        if not rest:
            return {name: inner.get_short_help_str() for name, inner in command.commands.items()}
        if rest[0] not in command.commands:
            return {}
        command = command.commands[rest.pop(0)]
    return _of_command(command.params, rest, current)


def _of_command(params: Sequence[Any], words: list[str], current: str) -> Candidates | None:
    """The candidates for `current`, the next word of a command with these parameters."""
    named = {flag: each for each in params if each.param_type_name == "option" for flag in each.opts}
    named |= {flag: each for each in params for flag in each.secondary_opts}
    given: list[str] = []
    wanted = None  # the option whose value comes next
    only_arguments = False
    for word in words:
        if wanted is not None:
            wanted = None
        elif word == "--":
            only_arguments = True
        elif word.startswith("-") and word != "-" and not only_arguments:
            option = named.get(word)
            wanted = option if option is not None and not option.is_flag else None
        else:
            given.append(word)
    if wanted is not None:
        return _values(wanted, given, "")
    option, equals, _ = current.partition("=")
    if equals and option in named and not only_arguments:
        found = _values(named[option], given, option + equals)
        return found if found is not None else {}  # a shell completes no file name in the middle of a word
    if current.startswith("-") and not only_arguments:
        return {flag: _first_sentence(each) for flag, each in named.items() if flag.startswith("--")} | {"--help": ""}
    arguments = [each for each in params if each.param_type_name == "argument"]
    place = min(len(given), len(arguments) - 1) if arguments else -1
    if place < 0 or (len(given) > place and arguments[place].nargs == 1):
        return {}
    if arguments[place].name == "model" and current.startswith(("/", "./", "../", "~")):
        return None
    return _values(arguments[place], given, "")


def _first_sentence(option: Any) -> str:
    return str(option.help or "").partition(".")[0].partition("  [")[0]


def _values(parameter: Any, given: Sequence[str], prefix: str) -> Candidates | None:
    """What an option or argument can be, after `prefix`; None where it is a file."""
    metavar = parameter.metavar or ""
    if metavar in _FILE_METAVARS:
        return None
    return {prefix + value: what for value, what in _known(parameter.name, metavar, given).items()}


def _known(name: str, metavar: str, given: Sequence[str]) -> Candidates:
    if metavar in ("MODEL",):
        return models()
    if name == "recipe":
        from localmoe.store import RECIPES

        return dict.fromkeys(RECIPES, "")
    if name == "template" or metavar == "TEMPLATE":
        return dict.fromkeys(prompt_template.names(), "")
    if name == "session" or (metavar == "SESSION" and given and given[0] != "list"):
        return _sessions()
    if metavar == "KEY":
        return _settings()
    if name == "value" and given:  # of `config set KEY`
        return _setting_values(given[0])
    if name in ("kernels", "cache_dtype"):
        return dict.fromkeys(TIERS if name == "kernels" else CACHE_DTYPES, "")
    return dict.fromkeys(metavar.split("|"), "") if "|" in metavar and metavar != "auto|N" else {}


def models() -> Candidates:
    """Every name that MODEL may be: aliases, what is in the store, what can be pulled. Reads directories only."""
    from localmoe import store
    from localmoe.hub.names import registry

    found = {name: f"your alias of {target}" for name, target in _aliases().items()}
    made: dict[str, list[str]] = {}
    base = store.home() / "models"
    for path in sorted(base.glob("*/*/localmoe.json")):
        made.setdefault(path.parents[1].name.replace("--", "/"), []).append(path.parent.name)
    for name, recipes in made.items():
        found |= {name: "on this machine", **{f"{name}:{recipe}": "on this machine" for recipe in recipes}}
    endings = (*store.RECIPES, "source")  # to convert is for what others packed, of which the registry has none
    for name, known in registry().items():
        if known.refused is None:
            found.setdefault(name, known.what)
            found |= {f"{name}:{e}": "" for e in endings if f"{name}:{e}" not in found}
    return found


def _sessions() -> Candidates:
    from localmoe.sessions import list_sessions

    return {entry.name: entry.facts.model if entry.facts else "" for entry in list_sessions()}


def _aliases() -> Mapping[str, str]:
    try:
        return config_file.read().aliases
    except LocalMoeError:
        return {}


def _settings() -> Candidates:
    found = {"model": config_file.MODEL.what} | {f"alias.{name}": target for name, target in _aliases().items()}
    tables = config_file.TABLES.items()
    return found | {f"{table}.{name}": key.what for table, keys in tables for name, key in keys.items()}


def _setting_values(name: str) -> Candidates:
    table, _, inner = name.partition(".")
    if name == "model" or table == "alias":
        return models()
    key = config_file.TABLES.get(table, {}).get(inner)
    if key is None:
        return {}
    return dict.fromkeys(("true", "false") if key.kind == "flag" else key.choices, "")


_BASH = """\
# bash completion for localmoe
_localmoe() {
    local IFS=$'\\n' line="${COMP_LINE:0:COMP_POINT}" lines
    # The words as they were typed, not as bash takes them apart at colons; an unfinished quotation mark is left out.
    local -a words=()
    IFS=$' \\t\\n' read -ra words <<<"${line//[\\"\\'\\\\]/}"
    [[ $line == *[[:space:]] ]] && words+=("")
    mapfile -t lines < <("$1" __complete bash "$COMP_WORDBREAKS" "${words[@]:1}" 2>/dev/null)
    COMPREPLY=()
    if [[ ${lines[0]} == files ]]; then
        compopt -o default
    else
        COMPREPLY=("${lines[@]:1}")
    fi
}
complete -F _localmoe localmoe
"""

_ZSH = """\
#compdef localmoe
# zsh completion for localmoe
_localmoe() {
    local -a lines
    lines=("${(@f)$("${(@Q)words[1]}" __complete zsh "${(@Q)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ $lines[1] == files ]]; then
        _files
    elif (( $#lines > 1 )); then
        shift lines
        _describe -V localmoe lines
    fi
}
if [[ $funcstack[1] == _localmoe ]]; then
    _localmoe "$@"
else
    compdef _localmoe localmoe
fi
"""

_FISH = """\
# fish completion for localmoe
function __localmoe_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l lines ($words[1] __complete fish $words[2..-1] "$current" 2>/dev/null)
    if test "$lines[1]" = files
        __fish_complete_path "$current"
    else
        printf '%s\\n' $lines[2..-1]
    end
end
complete -c localmoe -f -k -a '(__localmoe_complete)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
