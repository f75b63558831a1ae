"""`localmoe sessions`: the conversations that `--session` keeps."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmoe import sessions as store
from localmoe.cli import options, streams, units
from localmoe.cli.sanitize import printable, printable_line
from localmoe.cli.values import check_choice, near_miss
from localmoe.errors import SessionError, UsageError

if TYPE_CHECKING:
    from typing import Literal

    from localmoe.sessions import Entry

    Side = Literal["left", "right"]

_ENTRY = "name, path, size_bytes, modified (seconds since 1970), model, tokens, turns, cache_dtype, problem"
_KEYS = (
    f"list: sessions [{{{_ENTRY}}}]; show: {_ENTRY}, model_sha256, draft_tokens (of the MTP layer), sampling, seed, "
    "messages [{role, content}]; rm: removed [path]"
)


def sessions(
    action: Annotated[str, typer.Argument(metavar="list|show|rm", help="What to do.")] = "list",
    name: Annotated[str | None, typer.Argument(metavar="SESSION", show_default=False, help="For show and rm.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help(_KEYS))] = False,
    debug: options.Debug = False,
) -> None:
    """List the conversations that --session keeps, show one, or delete it (rm).

    A session holds its tokens, its messages and the model's latent cache, so that a chat goes on without computing them
    again. It is readable by you alone.
    """
    check_choice(action, ("list", "show", "rm"), "sessions")
    if (name is None) != (action == "list"):
        raise UsageError(
            f"sessions {action}: name the session" if name is None else "sessions list: takes no name; show NAME does"
        )
    if name is None:
        _list(as_json)
    elif action == "show":
        _show(store.find(_known(name)), as_json)
    else:
        removed = store.remove(_known(name))
        if as_json:
            streams.write_json({"removed": [str(removed)]})
        else:
            streams.write(f"removed {printable_line(removed)}\n")


def _known(name: str) -> str:
    """A session's name; of one that is not there the error says which was probably meant."""
    names = [entry.name for entry in store.list_sessions()]
    near = None if name in names else near_miss(name, names)
    if near is not None:
        raise SessionError(f"there is no session {printable_line(name)}; did you mean {near}?")
    return name


def _list(as_json: bool) -> None:
    entries = store.list_sessions()
    if as_json:
        streams.write_json({"sessions": [_record(entry) for entry in entries]})
        return
    if not entries:
        streams.write("no sessions; `localmoe chat MODEL --session NAME` begins one\n")
        return

    from localmoe.cli.render import table

    rows = [
        (
            entry.name,
            "" if entry.facts is None else printable_line(entry.facts.model),
            "" if entry.facts is None else str(_turns(entry)),
            "" if entry.facts is None else f"{entry.facts.tokens:,}",
            units.size(entry.size_bytes),
            _when(entry) if entry.problem is None else "cannot be used: show says why",
        )
        for entry in entries
    ]
    sides: tuple[Side, ...] = ("left", "left", "right", "right", "right", "left")
    streams.write(table(("SESSION", "MODEL", "TURNS", "TOKENS", "SIZE", "LAST USED"), rows, sides) + "\n")


def _show(entry: Entry, as_json: bool) -> None:
    facts = entry.facts
    if facts is None:
        raise SessionError(entry.problem or "")
    if as_json:
        more = {
            "model_sha256": facts.model_hash,
            "draft_tokens": facts.draft_tokens,
            "sampling": dict(facts.sampling),
            "seed": facts.seed,
            "messages": [dict(message) for message in facts.messages],
        }
        streams.write_json(_record(entry) | more)
        return
    mtp = f", {facts.draft_tokens:,} with the MTP layer's" if facts.draft_tokens else ""
    streams.write(
        f"session   {entry.name} ({printable_line(entry.path)})\n"
        f"model     {printable_line(facts.model)} ({facts.model_hash[:12]})\n"
        f"size      {units.size(entry.size_bytes)}: {facts.tokens:,} tokens in {facts.cache_dtype}{mtp}\n"
        f"last used {_when(entry)}\n"
    )
    for message in facts.messages:
        streams.write(f"\n[{message['role']}]\n{printable(message['content'])}\n")


def _record(entry: Entry) -> dict[str, Any]:
    facts = entry.facts
    return {
        "name": entry.name,
        "path": str(entry.path),
        "size_bytes": entry.size_bytes,
        "modified": entry.modified,
        "model": None if facts is None else facts.model,
        "tokens": None if facts is None else facts.tokens,
        "turns": None if facts is None else _turns(entry),
        "cache_dtype": None if facts is None else facts.cache_dtype,
        "problem": entry.problem,
    }


def _turns(entry: Entry) -> int:
    return sum(message["role"] == "user" for message in entry.facts.messages) if entry.facts else 0


def _when(entry: Entry) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.modified))
