"""`localmoe chat`: a conversation at the terminal."""

from __future__ import annotations

import sys

import typer

from localmoe.cli import options, settings, streams
from localmoe.cli.answer import splitter
from localmoe.cli.kept import Kept
from localmoe.cli.option_groups import AnswerOptions, EngineOptions, grouped
from localmoe.cli.talk import COMMANDS, Asking, Chat
from localmoe.errors import UsageError


@grouped
def chat(
    model: options.Model,
    wanted: AnswerOptions,
    think: options.Think = None,
    *,
    on: EngineOptions,
    explain_speed: options.ExplainSpeed = False,
    yes: options.Yes = False,
    debug: options.Debug = False,
) -> None:
    """Talk with MODEL. /help lists what can be typed; Ctrl-C stops an answer, Ctrl-D leaves."""
    machine = on.machine()
    wanted.check()
    if not (streams.is_terminal(sys.stdin) and streams.is_terminal(sys.stdout)):
        raise UsageError("chat needs a terminal; in a pipe or a script use localmoe run")

    from localmoe.cli.line_editor import LineEditor
    from localmoe.cli.model_switch import ModelSwitch
    from localmoe.cli.opening import label, open_engine

    with Kept.open(wanted.session) as kept:
        machine = kept.machine(machine)
        resolved, engine = open_engine(model, machine, yes=yes)
        with engine:
            sampling = settings.sampling(kept.flags(wanted.flags()), resolved.name, engine.generation_defaults)
            request = wanted.request(sampling, settings.thinking(think, "chat", engine))
            conversation = kept.conversation(settings.system(wanted.system, "chat"))
            splitter(engine, conversation.asking("?"), think)  # one that cannot chat says so before the first question
            kept.restore(engine, label(resolved))
            talk = Chat(engine, label(resolved), kept.request(request), conversation, kept)
            talk.explains = explain_speed
            talk.switch = ModelSwitch(resolved, machine, wanted.flags(), yes=yes)
            editor = LineEditor([name.split()[0] for name in COMMANDS], talk.status)
            drops = wanted.when_full == "drop"
            asking = Asking(editor.read, editor.choose if wanted.when_full is None else lambda _: drops)
            _talk(talk, asking)


def _talk(talk: Chat, asking: Asking) -> None:
    try:
        with streams.ending_signals():
            talk.talk(asking)
    except SystemExit as leaving:
        raise typer.Exit(int(leaving.code or 0)) from None
    finally:
        talk.close()
