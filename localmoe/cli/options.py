"""The options that commands share, and how their values are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import typer

from localmoe.cli import model_argument
from localmoe.cli.values import CACHE_DTYPES, DEVICES, TIERS, check_choice
from localmoe.cli.values import check_sampling as check_sampling
from localmoe.cli.values import parse_size as parse_size
from localmoe.errors import UsageError

_MOST_BIAS = 1e4

_MODEL_HELP = "A name known to localmoe, a hub repo id, or a directory. A name or id may end in :RECIPE or :source."
NamedModel = Annotated[
    str,
    typer.Argument(metavar="MODEL", show_default=False, help=_MODEL_HELP, callback=model_argument.meant),
]
"""MODEL where leaving it out would be rash: what downloads, writes or deletes."""
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help=_MODEL_HELP + " Without it the config file's.",
        callback=model_argument.meant,
        default_factory=model_argument.configured,
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where to compute.")]
KernelTier = Annotated[
    str,
    typer.Option(
        "--kernels",
        metavar="TIER",
        help="auto, reference, portable, avx2, avxvnni or avx512.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, help="CPU threads.  [default: one a physical core]"),
]
Vram = Annotated[
    str | None, typer.Option("--vram", metavar="SIZE", help="Use at most this much GPU memory, as 12GiB or 12GB.")
]
Ram = Annotated[str | None, typer.Option("--ram", metavar="SIZE", help="Use at most this much CPU memory.")]
Context = Annotated[
    int | None,
    typer.Option("--ctx", metavar="N", min=1, help="Context in tokens.  [default: the model's, or what fits]"),
]
CacheDtype = Annotated[
    str,
    typer.Option(
        "--cache-dtype",
        metavar="TYPE",
        help="What the latent cache holds: bf16, int8 (56 % of its memory) or float32; auto is bf16.",
    ),
]
Mtp = Annotated[
    str,
    typer.Option(
        "--mtp",
        metavar="auto|N",
        help="Tokens to guess at a time, checked in one pass; auto: as many as pay here; 0: none. Changes no output.",
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="Freeze where experts are placed: on a card, too, a seed gives one text."),
]
Think = Annotated[
    bool | None,
    typer.Option("--think/--no-think", show_default=False, help="Let the model think first, where its template can."),
]
Yes = Annotated[
    bool, typer.Option("-y", "--yes", help="Download and quantize a model that is not here without asking.")
]
ExplainSpeed = Annotated[
    bool, typer.Option("--explain-speed", help="Then show on stderr where a token's time went, and what would help.")
]
# main() looks for this flag itself, before parsing, so that it also covers what parsing raises.
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]

MaxTokens = Annotated[
    int | None,
    typer.Option("-n", "--max-tokens", metavar="N", min=1, help="Stop after N tokens.  [default: none]"),
]
Temperature = Annotated[
    float | None, typer.Option("--temp", metavar="T", help="Sampling temperature; 0 always takes the likeliest token.")
]
TopP = Annotated[
    float | None, typer.Option("--top-p", metavar="P", help="Sample from the likeliest tokens that add up to P.")
]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="K", help="Sample from the K likeliest tokens; 0: all.")]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", metavar="P", help="Sample from tokens at least P times as likely as the likeliest."),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty", metavar="R", help="Divide the logits of tokens that were there already; 1 is off."
    ),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option("--presence-penalty", metavar="X", help="Take X off the logits of tokens in the answer so far."),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option("--frequency-penalty", metavar="X", help="Take X off for each time a token is in the answer so far."),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        "--logit-bias",
        metavar="ID=B",
        show_default=False,
        help="Add B to the logit of the token with this id; -inf: never. May be repeated.",
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="S", min=0, help="Make sampling repeatable.")]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", show_default=False, help="End the answer before TEXT. May be repeated."),
]
Session = Annotated[
    str | None,
    typer.Option(
        "--session",
        metavar="NAME",
        show_default=False,
        help="Go on with the conversation kept under NAME, or begin it; what was computed is kept with it.",
    ),
]
WhenFull = Annotated[
    str | None,
    typer.Option(
        "--when-full",
        metavar="HOW",
        show_default=False,
        help="Where a conversation no longer fits the context: drop its oldest turns, or stop.  "
        "[default: chat asks, run stops]",
    ),
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system prompt.")]


def json_help(keys: str) -> str:
    """Help text of a command's `--json`: the documented keys."""
    return f"Print one JSON object: {keys}."


@dataclass(frozen=True)
class Machine:
    """What the user allows the engine to use. Sizes in bytes."""

    device: str = "auto"
    kernels: str = "auto"
    threads: int | None = None
    vram: int | None = None
    ram: int | None = None
    context: int | None = None
    cache_dtype: str = "auto"
    mtp: int | None = 0  # None: as many as pay
    deterministic: bool = False


def parse_mtp(text: str) -> int | None:
    """The number of tokens to guess, None for `auto`. Raises UsageError."""
    if text == "auto":
        return None
    if not (text.isascii() and text.isdecimal() and len(text) == 1 and int(text) < 8):
        raise UsageError(f"--mtp: {text!r} is neither auto nor a number from 0 to 7")
    return int(text)


def machine(
    device: str, kernels: str, threads: int | None, vram: str | None, ram: str | None, ctx: int | None, cache: str
) -> Machine:
    """The common options, as typed, put together. Raises UsageError naming the option that is wrong."""
    choices = (("--device", device, DEVICES), ("--kernels", kernels, TIERS), ("--cache-dtype", cache, CACHE_DTYPES))
    for option, value, known in choices:
        check_choice(value, known, option)
    return Machine(device, kernels, threads, parse_size(vram, "--vram"), parse_size(ram, "--ram"), ctx, cache)


@dataclass(frozen=True)
class SamplingFlags:
    """The sampling flags as typed, None where one was not given."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def given(self) -> dict[str, float]:
        """Those that were given, by the names that sampling uses. Raises UsageError naming a bad value's flag."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        for name, value in values.items():
            check_sampling(name, value, "--temp" if name == "temperature" else f"--{name.replace('_', '-')}")
        return values


def parse_bias(entries: list[str] | None) -> dict[int, float]:
    """Token ids and what to add to their logits, from `ID=B`. Raises UsageError for what is not that."""
    found: dict[int, float] = {}
    for entry in entries or ():
        token_id, _, text = entry.partition("=")
        try:
            bias = float(text)
        except ValueError:
            bias = math.nan
        if not (token_id.isascii() and token_id.isdecimal() and len(token_id) < 10) or not bias <= _MOST_BIAS:
            raise UsageError(f"--logit-bias: {entry!r} is not ID=B, a token id and a number up to 10000 or -inf")
        found[int(token_id)] = bias if bias == -math.inf else max(bias, -_MOST_BIAS)
    return found


def check_when_full(how: str | None) -> None:
    """Raises UsageError for another word than drop or stop."""
    if how not in (None, "drop", "stop"):
        raise UsageError(f"--when-full: {how!r} is neither drop nor stop")


def check_stop(words: list[str] | None) -> None:
    """Raises UsageError for an empty stop text, which would stop at once."""
    if words and "" in words:
        raise UsageError("--stop: an empty text would stop at once")
