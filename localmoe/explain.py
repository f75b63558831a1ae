"""Why decoding is as fast as it is: where a token's time went, what it read, and the change that would help most.

Every number is this run's: times from the model's own profile, bytes from the config, the limit from what `localmoe
doctor` recorded or measured now. A change is reckoned from those: what a part waited for its bytes at the limit's rate
shrinks with the bytes or the rate, and the rest of its time stays. So the gains are the least to expect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from localmoe.card_parts import CARD, bytes_by_card_part, split_up
from localmoe.formats.scheme import QuantizationConfig
from localmoe.kernels.profile import Profile
from localmoe.model.kv_cache import row_bytes
from localmoe.model.sizes import Storage, model_sizes
from localmoe.offload.machine import GIB, Figure, Machine
from localmoe.offload.plan import Budgets, Placement, place
from localmoe.offload.predict import Subject, decode

if TYPE_CHECKING:
    from pathlib import Path

    from localmoe.engine import Engine
    from localmoe.offload.probe import Facts

OTHER = "other"
"""What no part was timed for: norms, Python, torch's own calls."""
_LEAST_GAIN = 0.01


@dataclass(frozen=True)
class Sample:
    """Decoding as it was timed: `parts` seconds by part of `seconds` in all, for `tokens` tokens with `held` tokens in
    the cache on average. `several` is set where a pass computed several tokens (guesses): what it read is not known.
    `hit_rates` are those of the MoE layers meanwhile (None: no card, or not counted). `beside` are seconds a token of
    what ran at the same time as a card's parts."""

    tokens: int
    seconds: float
    parts: Mapping[str, float]
    held: int
    several: bool = False
    hit_rates: Sequence[float] | None = None
    beside: Mapping[str, float] = field(default_factory=dict)


class PartTimer:
    """The parts' seconds of one answer, and the experts found on a card, from its first token on: what came before was
    the prompt."""

    def __init__(
        self,
        profile: Profile,
        expert_hits: Callable[[], Tensor | None] = lambda: None,
        hit_rates: Callable[[Tensor | None], list[float] | None] = lambda since: None,
    ) -> None:
        self._profile = profile
        self._expert_hits = expert_hits
        self._hit_rates = hit_rates
        self._before: dict[str, float] | None = None
        self._hits_before: Tensor | None = None

    def first_token(self) -> None:
        """To be told when a token came; only the first call counts."""
        if self._before is None:
            self._before = self._profile.seconds()
            self._hits_before = self._expert_hits()

    def sample(self, tokens: int, seconds: float, sampling: float, held: int, several: bool) -> Sample | None:
        """What was timed, `tokens` of them after the first; None where there was none."""
        if self._before is None or tokens < 1 or seconds <= 0:
            return None
        parts = {name: now - self._before.get(name, 0.0) for name, now in self._profile.seconds().items()}
        rates = None if self._hits_before is None else self._hit_rates(self._hits_before)
        return Sample(tokens, seconds, parts | {"sampling": sampling}, held, several, rates)


@dataclass(frozen=True)
class Limit:
    """Bytes/s that a token's weights could come at. `what` is what sets it, `all_threads` the same with a thread a core
    where fewer are used."""

    bytes_per_second: float
    origin: str
    what: Literal["memory", "the CPU's cache"] = "memory"
    all_threads: float | None = None


@dataclass(frozen=True)
class Change:
    """One thing done otherwise, and the decode speed it should give; `gain` as a fraction of the speed now."""

    change: str
    tokens_per_second: float
    gain: float


@dataclass(frozen=True)
class Explanation:
    """`milliseconds_per_token` by part, adding up to a token's; `bytes_per_token` by the parts that read weights or
    cache (empty where that is not known); `limit_share` is bytes a second over the limit; `hit_rate_by_layer` is the
    share of expert uses that the card's memory served, or was placed to serve where none was counted (None: no card);
    `changes` the best first. `beside_milliseconds_per_token` is what ran at the same time as a card's parts: the CPU's
    experts and the copies for them, of which the card's "waiting" is what it had to wait for. `troubles` make a card
    slower than it need be."""

    tokens: int
    tokens_per_second: float
    milliseconds_per_token: dict[str, float]
    bytes_per_token: dict[str, int]
    limit_bytes_per_second: float | None
    limit: str | None
    limit_share: float | None
    hit_rate_by_layer: list[float] | None
    changes: list[Change]
    beside_milliseconds_per_token: dict[str, float] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)


def explain_engine(
    engine: Engine, sample: Sample, home: Path, recipes: Mapping[str, QuantizationConfig]
) -> Explanation:
    """Explain what `engine` did. `home` holds doctor's record, `recipes` are those that may be advised.

    Takes a quarter of a second where doctor has measured nothing.
    """
    from localmoe.offload.heat import known_heat
    from localmoe.offload.probe import look
    from localmoe.offload.record import machine_here
    from localmoe.text.files import read_json_object

    values = read_json_object(engine.path / "config.json")
    storage = Storage.of(values)
    row = row_bytes(engine.config, engine.kernels.cache_dtype)
    subject = Subject(engine.config, model_sizes(engine.config, storage), row)
    others = {
        name: replace(subject, sizes=model_sizes(engine.config, Storage(recipe, storage.dtype)))
        for name, recipe in recipes.items()
    }
    facts = look(ask_cards=False)
    threads = engine.kernels.threads
    int8_row = None if engine.kernels.cache_dtype == torch.int8 else row_bytes(engine.config, torch.int8)
    if engine.placement is not None:
        heat = known_heat(home, engine.path, engine.config)
        machine = machine_here(look(), home, threads or facts.cores, with_card=True)
        placed = replace(subject, heat=heat.shares(engine.config))
        if CARD in sample.parts:
            split = engine.card_split(sample.held)
            sample = replace(sample, parts=split_up(sample.parts, split), beside=split.beside if split else {})
        found = explain_card(sample, placed, machine, engine.placement, int8_row)
        return replace(found, troubles=engine.troubles)
    return explain(
        sample,
        subject,
        _limit(engine, subject, home, facts),
        others,
        int8_row=int8_row,
        idle_cores=(threads, facts.cores) if threads is not None and threads < facts.cores else None,
    )


def _limit(engine: Engine, subject: Subject, home: Path, facts: Facts) -> Limit | None:
    """By doctor's record where there is one of these threads, else measured; None where torch computes."""
    from localmoe.kernels.dispatch import Kernels
    from localmoe.offload.measure import from_cache
    from localmoe.offload.record import machine_here, read

    backend, record = engine.kernels.backend, read(home)[0]
    if backend is None:
        return None

    def known(threads: int, name: str) -> tuple[float | None, str]:
        figure = machine_here(facts, home, threads, with_card=False).cpu.figures()[name]
        if figure.origin == "cached" and record is not None:
            return figure.value, f"doctor, {record.measured}"
        return None, "measured now"

    held = subject.sizes.nbytes <= facts.cache_bytes  # then a token's weights come from the cache
    name = "cached" if held else "read"

    def measured(kernels: Kernels) -> float:
        if held:
            return from_cache(kernels, facts.cache_bytes).value
        return kernels.backend.read_bandwidth() if kernels.backend else 0.0

    rate, origin = known(backend.threads, name)
    more = None
    if backend.threads < facts.cores:
        more = known(facts.cores, name)[0] or measured(Kernels.choose(engine.kernels.tier))
    return Limit(rate or measured(engine.kernels), origin, "the CPU's cache" if held else "memory", more)


def explain(
    sample: Sample,
    subject: Subject,
    limit: Limit | None,
    recipes: Mapping[str, Subject],
    *,
    int8_row: int | None = None,
    idle_cores: tuple[int, int] | None = None,
) -> Explanation:
    """The same from plain numbers: `recipes` are the model as others would store it, `int8_row` the bytes of a token's
    latents in int8 where they are held otherwise, `idle_cores` (threads used, cores there are) where some are idle."""
    now = 1.0 / sample.tokens
    seconds = {part: spent * now for part, spent in sample.parts.items() if spent > 0}
    seconds[OTHER] = max(sample.seconds * now - sum(seconds.values()), 0.0)
    read = {} if sample.several else bytes_by_part(subject, sample.held)
    read = {part: count for part, count in read.items() if part in seconds}
    total = sum(seconds.values())
    changes = []
    if read and limit is not None:
        rate = limit.bytes_per_second
        waited = {part: min(seconds[part], count / rate) for part, count in read.items()}
        saved = _otherwise_stored(sample, subject, recipes, waited, read) + _other_machine(limit, idle_cores, waited)
        if int8_row is not None and read.get("attention"):  # over a long context arithmetic, too, goes with the bytes
            smaller = sample.held * (subject.cache_per_token - int8_row * len(subject.sizes.layers))
            saved.append(("--cache-dtype int8", seconds["attention"] * smaller / read["attention"]))
        found = [(change, total - less) for change, less in saved]
        changes = [
            Change(what, 1 / after, total / after - 1) for what, after in found if total / after > 1 + _LEAST_GAIN
        ]
    return Explanation(
        tokens=sample.tokens,
        tokens_per_second=1 / total,
        milliseconds_per_token={part: 1e3 * spent for part, spent in seconds.items()},
        bytes_per_token=read,
        limit_bytes_per_second=limit.bytes_per_second if limit else None,
        limit=f"{limit.what} ({limit.origin})" if limit else None,
        limit_share=sum(read.values()) / total / limit.bytes_per_second if limit and read else None,
        hit_rate_by_layer=None,
        changes=sorted(changes, key=lambda change: -change.gain),
    )


def explain_card(
    sample: Sample, subject: Subject, machine: Machine, placement: Placement, int8_row: int | None
) -> Explanation:
    """The same where a card computes: what a change does is reckoned as `plan` does it, as a ratio of two predictions,
    and applied to the speed that was measured."""
    plain = explain(replace(sample, several=True), subject, None, {})
    moe = [home for home, layer in zip(placement.layers, subject.sizes.layers, strict=True) if layer.experts]
    vram = placement.vram

    def predicted(other: Subject, card: int, there: Machine) -> float:
        placed = place(other, Budgets(vram=card, context=placement.context), held=sample.held)
        return decode(other, there, placed.layers, placed.head_on_gpu, sample.held).tokens_per_second

    found = [
        ("2 GiB more of --vram", subject, vram + 2 * GIB, machine),
        ("CPU memory twice as fast (a second channel, say)", subject, vram, _faster_memory(machine)),
    ]
    if int8_row is not None:
        found.append(("--cache-dtype int8", replace(subject, cache_row=int8_row), vram, machine))
    now = predicted(subject, vram, machine)
    changes = []
    for what, other, card, there in found:
        gain = predicted(other, card, there) / now - 1
        if gain > _LEAST_GAIN:
            changes.append(Change(what, plain.tokens_per_second * (1 + gain), gain))
    changes.sort(key=lambda change: -change.gain)
    rates = [home.gpu_hits for home in moe] if sample.hit_rates is None else list(sample.hit_rates)
    read: dict[str, int] = {}
    if not sample.several:
        timed = {*plain.milliseconds_per_token, *sample.beside}
        found_bytes = bytes_by_card_part(subject, placement, rates, sample.held)
        read = {part: count for part, count in found_bytes.items() if part in timed}
    beside = {part: 1e3 * spent for part, spent in sample.beside.items()}
    return replace(
        plain, bytes_per_token=read, hit_rate_by_layer=rates, changes=changes, beside_milliseconds_per_token=beside
    )


def _faster_memory(machine: Machine) -> Machine:
    def twice(figure: Figure) -> Figure:
        return replace(figure, value=2 * figure.value)

    cpu = machine.cpu
    weights = {form: twice(figure) for form, figure in cpu.weights.items()}
    return replace(machine, cpu=replace(cpu, read=twice(cpu.read), weights=weights))


def bytes_by_part(subject: Subject, held: int) -> dict[str, int]:
    """What one token reads with `held` tokens in the cache, by the names of the profile's parts: its experts with the
    shared one, which one call computes."""
    config, sizes = subject.config, subject.sizes
    read = {
        "attention": held * subject.cache_per_token,
        "router": 0,
        "experts": 0,
        "dense": 0,
        "head": sizes.head.nbytes,
    }
    for layer in sizes.layers:
        read["attention"] += layer.attention.nbytes
        if layer.experts:
            router = config.n_routed_experts * config.hidden_size * (4 if "float32" in layer.mlp.stored else 2)
            read["router"] += router
            read["experts"] += layer.mlp.nbytes - router + config.num_experts_per_tok * layer.expert.nbytes
        else:
            read["dense"] += layer.mlp.nbytes
    return read


def _otherwise_stored(
    sample: Sample,
    subject: Subject,
    recipes: Mapping[str, Subject],
    waited: Mapping[str, float],
    read: Mapping[str, int],
) -> list[tuple[str, float]]:
    """(change, seconds a token less) of each recipe."""
    found = []
    for name, other in recipes.items():
        after = bytes_by_part(other, sample.held)
        less = sum(waited[part] * (1 - after[part] / count) for part, count in read.items() if count)
        found.append((f"the recipe {name}", less))
    return found


def _other_machine(
    limit: Limit, idle_cores: tuple[int, int] | None, waited: Mapping[str, float]
) -> list[tuple[str, float]]:
    """(change, seconds a token less) of memory and threads."""
    found, total = [], sum(waited.values())
    if limit.what == "memory":
        found.append(("memory twice as fast (a second channel, say)", total / 2))
    if idle_cores is not None and limit.all_threads:
        found.append((f"--threads {idle_cores[1]}", total * (1 - limit.bytes_per_second / limit.all_threads)))
    return found
