"""`localmoe plan`: where every part of a model would go, and how fast it should be, from its config alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmoe import store
from localmoe.cli import options, streams, units
from localmoe.cli.opening import label
from localmoe.cli.sanitize import printable_line
from localmoe.cli.values import check_choice
from localmoe.errors import CheckpointError, DeviceError, ModelNotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from localmoe.model.sizes import Storage
    from localmoe.offload.machine import Figure, Machine
    from localmoe.offload.plan import Budgets, Plan
    from localmoe.offload.predict import Speed, Subject

_KEYS = (
    "model, recipe (null: as it is stored), device, forecast (the card's part, whose speeds nobody measured), threads, "
    "budgets {ram, vram}, context, longest_context, parts [{part, tier (gpu, ram, disk), size_bytes, what, why}], "
    "tiers {gpu, ram, disk}, latent_cache {bytes_per_token, plain_bytes_per_token}, decode, decode_full, prefill "
    "{tokens_per_second, bound, bound_share, seconds}, prompt_tokens, stream_from_tokens, cpu_layers, "
    "without_cpu_layers_tokens_per_second, advice [{change, decode_tokens_per_second}], figures {name: {value, unit, "
    "origin (cached, assumed), note}}, notes"
)
_WHERE = {"gpu": "GPU", "ram": "CPU memory", "disk": "disk"}
_FORECAST = "the card's part is a forecast: no GPU has confirmed these predictions yet"


@dataclass(frozen=True)
class _Target:
    """What is planned: the config that describes it, and the recipe it would be quantized by (None: stored so)."""

    name: str
    config: Path
    recipe: str | None


def plan(
    model: options.Model,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", metavar="R", help=f"{', '.join(store.RECIPES)}.  [default: what is here, or balanced]"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help(_KEYS))] = False,
    device: options.Device = "auto",
    threads: options.Threads = None,
    vram: options.Vram = None,
    ram: options.Ram = None,
    ctx: options.Context = None,
    cache_dtype: options.CacheDtype = "auto",
    debug: options.Debug = False,
) -> None:
    """Show where every part of MODEL would go, what that costs and why, and the tokens/s to expect.

    Needs the config only: of a model that is not here, config.json is fetched and nothing else. Without --vram it is
    the CPU's plan. --vram and --ram may be another machine's.
    """
    wanted = options.machine(device, "auto", threads, vram, ram, ctx, cache_dtype)
    target = _find(model, recipe)
    subject, made = _subject(target, wanted.cache_dtype)
    name = target.name if made is None else f"{target.name}:{made}"
    machine, budgets = _surroundings(wanted)

    from localmoe.offload.plan import make_plan

    result = make_plan(subject, machine, budgets)
    if as_json:
        streams.write_json(_record(name, made, subject, machine, budgets, result))
    else:
        streams.write(_text(name, subject, machine, budgets, result))


def forecast(config: Path, recipe: str | None, wanted: options.Machine) -> tuple[Subject, Machine, Plan, str | None]:
    """(model, machine, plan, what is made of the files) of a source whose config.json is `config` and which `recipe`
    would quantize, on the card that loading it would take. Made is `recipe`, `converted` where others packed the files,
    or nothing where they run as they are stored. Raises as the command does, and as loading does for a card that is
    missing."""
    from localmoe.offload.device import choose_card
    from localmoe.offload.plan import make_plan

    card = choose_card(wanted.device, wanted.vram)
    wanted = replace(wanted, device="cpu" if card is None else "cuda", vram=None if card is None else card.vram)

    subject, made = _subject(_Target("", config, recipe), wanted.cache_dtype)
    machine, budgets = _surroundings(wanted)
    return subject, machine, make_plan(subject, machine, budgets), made


@dataclass(frozen=True)
class Foreseen:
    """Tokens/s that plan reckons, and what there is to say of how sure it is."""

    prefill: float
    decode: float
    notes: tuple[str, ...]


def foreseen(config: Path, wanted: options.Machine, prompt: int, held: int) -> Foreseen:
    """Of files that are here: a prefill of `prompt` tokens, and decode with `held` in the cache. Raises as `forecast`
    does."""
    from localmoe.offload.plan import place
    from localmoe.offload.predict import decode, prefill

    subject, machine, plan, _ = forecast(config, None, wanted)
    before = after = plan.placement
    if plan.budgets.vram is not None:  # a card's experts make room for the cache as it grows
        before, after = (place(subject, plan.budgets, tokens) for tokens in (prompt, held))
    first = prefill(subject, machine, before.layers, before.head_on_gpu, prompt).tokens_per_second
    then = decode(subject, machine, after.layers, after.head_on_gpu, held).tokens_per_second
    return Foreseen(first, then, machine.notes)


def _find(model: str, flag: str | None) -> _Target:
    """Raises UsageError for a recipe that contradicts the model, ModelNotFoundError, HubError."""
    if flag is not None:
        check_choice(flag, store.RECIPES, "--recipe")
    ref = store.parse_ref(model)
    if ref.directory is not None:
        resolved = store.resolve(model)
        if resolved.kind == "artifact" and flag not in (None, resolved.recipe):
            raise UsageError(
                f"--recipe {flag}: {ref.directory} is quantized already, by {resolved.recipe}; plan its source instead"
            )
        return _Target(label(resolved), resolved.path / "config.json", flag if resolved.kind == "source" else None)
    if flag is not None and ref.ending not in (None, "source", flag):
        raise UsageError(f"--recipe {flag} contradicts the ending of {ref.name}:{ref.ending}; give one of them")
    if ref.ending == "source" and flag is None:
        return _Target(f"{ref.name}:source", _source_config(model), None)
    wanted = flag or ref.ending
    try:
        resolved = store.resolve(f"{ref.name}:{wanted}" if wanted else ref.name)
    except ModelNotFoundError:
        pass
    else:
        if resolved.kind == "artifact":
            return _Target(label(resolved), resolved.path / "config.json", None)
    return _Target(ref.name, _source_config(model), wanted or "balanced")


def _source_config(model: str) -> Path:
    from localmoe.hub import pull_config

    try:
        streams.passing_remark("looking for config.json ...")
        return pull_config(store.parse_ref(model))
    finally:
        streams.passing_remark("")


def _subject(target: _Target, cache_dtype: str) -> tuple[Subject, str | None]:
    """The model to plan, and what is made of its files, as `forecast` says. Raises CheckpointError,
    UnsupportedModelError naming the field."""
    from localmoe.kernels.dispatch import CACHE_DTYPES
    from localmoe.model.config import ModelConfig
    from localmoe.model.kv_cache import row_bytes
    from localmoe.model.sizes import model_sizes
    from localmoe.offload.predict import Subject
    from localmoe.text.files import read_json_object

    values = read_json_object(target.config)
    if not values:
        raise CheckpointError(f"{target.config}: missing or empty")
    config = ModelConfig.from_dict(values)
    storage, made = _storage(values, target.recipe)
    dtype = CACHE_DTYPES["bf16" if cache_dtype == "auto" else cache_dtype]
    return Subject(config, model_sizes(config, storage), row_bytes(config, dtype)), made


def _storage(values: Mapping[str, Any], recipe: str | None) -> tuple[Storage, str | None]:
    """How the weights would be stored, and what is made of the files for that; what its makers quantized to integers
    already stays so, in our layout."""
    from localmoe.model.sizes import Storage

    if recipe is None:
        return Storage.of(values), None
    from quantize.foreign import converted, form_of
    from quantize.recipes import recipe_named

    form = form_of(values)
    if form is not None:
        plain = {name: value for name, value in values.items() if name != "quantization_config"}
        return Storage.of(plain, converted(form, values)), store.CONVERTED
    quantization = recipe_named(recipe).for_model(values).quantization_config(group_size=32)
    storage = Storage.of(values, quantization)
    return storage, recipe if storage.quantization == quantization else None


def _surroundings(wanted: options.Machine) -> tuple[Machine, Budgets]:
    """The machine's figures, and how much of its memory may be used. Raises DeviceError for a card that is asked for
    and not here, unless --vram says how large it would be."""
    from localmoe.offload.plan import Budgets
    from localmoe.offload.probe import look
    from localmoe.offload.record import machine_here

    vram = None if wanted.device == "cpu" else wanted.vram
    with_card = wanted.device == "cuda" or vram is not None
    facts = look(ask_cards=with_card)
    machine = machine_here(facts, store.home(), wanted.threads or facts.cores, with_card=with_card)
    if with_card and vram is None:
        free = facts.cards[0].free_bytes if facts.cards else None
        if free is None:
            raise DeviceError("there is no NVIDIA card here; --vram 12GiB plans for one of that size")
        vram = int(free * 0.95)
    here = [size for size in (facts.available_bytes, facts.memory_limit) if size is not None]
    ram = wanted.ram if wanted.ram is not None else min(here, default=None)
    return machine, Budgets(ram=ram, vram=vram, context=wanted.context)


def _record(
    name: str, recipe: str | None, subject: Subject, machine: Machine, budgets: Budgets, result: Plan
) -> dict[str, Any]:
    from localmoe.offload.machine import FIGURE_UNITS

    placement = result.placement
    return {
        "model": name,
        "recipe": recipe,
        "device": "cpu" if budgets.vram is None else "cuda",
        "forecast": budgets.vram is not None,
        "threads": machine.cpu.threads,
        "budgets": {"ram": budgets.ram, "vram": budgets.vram},
        "context": placement.context,
        "longest_context": placement.longest_context,
        "parts": [
            {"part": each.part, "tier": each.tier, "size_bytes": each.nbytes, "what": each.what, "why": each.why}
            for each in placement.shares
        ],
        "tiers": {"gpu": placement.nbytes("gpu"), "ram": placement.nbytes("ram"), "disk": placement.nbytes("disk")},
        "latent_cache": {
            "bytes_per_token": subject.cache_per_token,
            "plain_bytes_per_token": subject.plain_cache_per_token,
        },
        "decode": asdict(result.decode),
        "decode_full": asdict(result.decode_full),
        "prefill": asdict(result.prefill),
        "prompt_tokens": result.prompt,
        "stream_from_tokens": result.stream_from,
        "cpu_layers": placement.cpu_layers,
        "without_cpu_layers_tokens_per_second": result.without_cpu_layers,
        "advice": [asdict(each) for each in result.advice],
        "figures": {
            figure_name: asdict(figure) | {"unit": FIGURE_UNITS[figure_name]}
            for figure_name, figure in machine.figures().items()
        },
        "notes": _notes(machine, budgets),
    }


def _notes(machine: Machine, budgets: Budgets) -> list[str]:
    notes = [_FORECAST] if budgets.vram is not None else []
    gpu = machine.gpu
    if gpu is not None and budgets.vram is not None and gpu.memory is not None and budgets.vram > gpu.memory:
        notes.append(f"the card here, {gpu.name}, has {units.size(gpu.memory)}, less than --vram says")
    return [*notes, *machine.notes]


def _text(name: str, subject: Subject, machine: Machine, budgets: Budgets, result: Plan) -> str:
    from localmoe.cli.render import table

    placement = result.placement
    rows = [
        (f"{each.part}, {each.what}" if each.what else each.part, units.size(each.nbytes), _WHERE[each.tier], each.why)
        for each in placement.shares
    ]
    parts = table(("PART", "SIZE", "WHERE", "WHY"), rows, ("left", "right", "left", "left"))
    facts = [
        *((_WHERE[tier], _tier_size(placement.nbytes(tier), limit)) for tier, limit in _limits(budgets)),
        ("context", _context(subject, result)),
        ("latent cache", _cache(subject)),
        ("decode", _speed(result.decode, "with an empty cache")),
        ("", _speed(result.decode_full, f"with all {placement.context:,} tokens in it")),
        ("prefill", _speed(result.prefill, f"of a prompt of {result.prompt:,} tokens")),
        *_of_the_card(result),
        *(("more", line) for line in _gains(budgets, result)),
        ("reckoned by", _figures(machine)),
    ]
    width = max(len(label) for label, _ in facts)
    lines = [f"{label:<{width}}  {value}" for label, value in facts]
    lines += [f"{'note':<{width}}  {note}" for note in _notes(machine, budgets)]
    where = f"CPU, {machine.cpu.threads} threads"
    if machine.gpu is not None:
        where = f"{machine.gpu.name}, beside the {where}"
    head = printable_line(f"{name} on the {where}" if machine.gpu is None else f"{name} on {where}")
    return "\n".join([head, "", parts, "", *map(printable_line, lines)]) + "\n"


def _limits(budgets: Budgets) -> list[tuple[Any, int | None]]:
    tiers: list[tuple[Any, int | None]] = [("ram", budgets.ram), ("disk", None)]
    return tiers if budgets.vram is None else [("gpu", budgets.vram), *tiers]


def _tier_size(nbytes: int, limit: int | None) -> str:
    return units.size(nbytes) + (f" of {units.size(limit)}" if limit is not None else "")


def _context(subject: Subject, result: Plan) -> str:
    placement, maximum = result.placement, subject.config.max_position_embeddings
    least = "the model's longest" if placement.context == maximum else f"of the model's {maximum:,}"
    longest = placement.longest_context
    fits = f"; {longest:,} would fit" if placement.context < longest < maximum else ""
    fits = "; all of it would fit" if placement.context < longest == maximum else fits
    return f"{placement.context:,} tokens, {least}{fits}"


def _cache(subject: Subject) -> str:
    own, plain = subject.cache_per_token, subject.plain_cache_per_token
    return f"{units.size(own)} a token; plain keys and values would take {units.size(plain)}, {plain / own:.3g} times"


def _speed(speed: Speed, when: str) -> str:
    return f"{units.rate(speed.tokens_per_second)} {when}; {speed.bound_share:.0%} of the time is {speed.bound}"


def _of_the_card(result: Plan) -> list[tuple[str, str]]:
    lines = []
    first, last = result.at_first.gpu_experts, result.placement.gpu_experts
    if first > last:
        context = f"{result.placement.context:,}"
        lines.append(
            ("", f"{first:,} routed experts are on the card at first; with {context} tokens {last:,} are left")
        )
    if result.without_cpu_layers is not None:
        layers = result.placement.cpu_layers
        lines.append(
            ("", f"{layers} layers are on the CPU; with all on the card {units.rate(result.without_cpu_layers)}")
        )
    if result.stream_from is not None:
        lines.append(("", f"from {result.stream_from:,} tokens on, experts are carried to the card"))
    return lines


def _gains(budgets: Budgets, result: Plan) -> list[str]:
    """What more memory buys, in decode with an empty cache."""
    now = result.decode.tokens_per_second
    lines = [
        f"{each.change}: {units.rate(each.decode_tokens_per_second)} ({each.decode_tokens_per_second / now - 1:+.0%})"
        for each in result.advice
    ]
    if budgets.ram is not None and not result.placement.experts_on_disk:
        lines.append("1 GiB more of CPU memory: no faster, since all that a token reads is in memory already")
    return lines


def _figures(machine: Machine) -> str:
    """The figures that decide, with where each is from."""

    def said(figure: Figure, what: str, unit: float = 1e9, name: str = "GB/s") -> str:
        note = f", {figure.note}" if figure.note else ""
        return f"{what} {figure.value / unit:.3g} {name} ({figure.origin}{note})"

    cpu, gpu = machine.cpu, machine.gpu
    parts = [
        said(cpu.read, "memory"),
        *(said(figure, form) for form, figure in cpu.weights.items() if form in ("int4", "int8")),
        said(cpu.many["int4"], "many tokens' int4", name="G multiply-adds/s"),
        said(machine.disk, "disk"),
        said(cpu.layer, "a layer", 1e-6, "µs"),
    ]
    if gpu is not None:
        parts += [said(gpu.read, "card"), said(gpu.pcie, "PCIe"), said(gpu.macs, "card", 1e12, "T multiply-adds/s")]
    return "; ".join(parts)
