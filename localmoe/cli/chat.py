"""`localmoe chat`: a conversation at the terminal."""

from __future__ import annotations

import sys
from dataclasses import replace

import typer

from localmoe.cli import options, settings, streams
from localmoe.cli.answer import Request, splitter
from localmoe.cli.kept import Kept
from localmoe.cli.talk import COMMANDS, Asking, Chat
from localmoe.errors import UsageError


def chat(
    model: options.Model,
    max_tokens: options.MaxTokens = None,
    temp: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    logit_bias: options.LogitBias = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    system: options.System = None,
    session: options.Session = None,
    when_full: options.WhenFull = None,
    think: options.Think = None,
    device: options.Device = "auto",
    kernels: options.KernelTier = "auto",
    threads: options.Threads = None,
    vram: options.Vram = None,
    ram: options.Ram = None,
    ctx: options.Context = None,
    cache_dtype: options.CacheDtype = "auto",
    mtp: options.Mtp = "auto",
    deterministic: options.Deterministic = False,
    explain_speed: options.ExplainSpeed = False,
    yes: options.Yes = False,
    debug: options.Debug = False,
) -> None:
    """Talk with MODEL. /help lists what can be typed; Ctrl-C stops an answer, Ctrl-D leaves."""
    penalties = (repetition_penalty, presence_penalty, frequency_penalty)
    flags = options.SamplingFlags(temp, top_p, top_k, min_p, *penalties).given()
    bias = options.parse_bias(logit_bias)
    machine = options.machine(device, kernels, threads, vram, ram, ctx, cache_dtype)
    machine = replace(machine, mtp=options.parse_mtp(mtp), deterministic=deterministic)
    options.check_stop(stop)
    options.check_when_full(when_full)
    if not (streams.is_terminal(sys.stdin) and streams.is_terminal(sys.stdout)):
        raise UsageError("chat needs a terminal; in a pipe or a script use localmoe run")

    from localmoe.cli.line_editor import LineEditor
    from localmoe.cli.model_switch import ModelSwitch
    from localmoe.cli.opening import label, open_engine

    with Kept.open(session) as kept:
        machine = kept.machine(machine)
        resolved, engine = open_engine(model, machine, yes=yes)
        with engine:
            request = Request(
                sampling=settings.sampling(kept.flags(flags), resolved.name, engine.generation_defaults),
                max_tokens=max_tokens,
                seed=seed,
                stop=stop or (),
                thinking=settings.thinking(think, "chat", engine),
                logit_bias=bias,
            )
            conversation = kept.conversation(settings.system(system, "chat"))
            splitter(engine, conversation.asking("?"), think)  # one that cannot chat says so before the first question
            kept.restore(engine, label(resolved))
            talk = Chat(engine, label(resolved), kept.request(request), conversation, kept)
            talk.explains = explain_speed
            talk.switch = ModelSwitch(resolved, machine, flags, yes=yes)
            editor = LineEditor([name.split()[0] for name in COMMANDS], talk.status)
            asking = Asking(editor.read, editor.choose if when_full is None else lambda _: when_full == "drop")
            try:
                with streams.ending_signals():
                    talk.talk(asking)
            except SystemExit as leaving:
                raise typer.Exit(int(leaving.code or 0)) from None
            finally:
                talk.close()
