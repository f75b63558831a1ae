"""Where every part of a model goes: sizes, budgets and bandwidths in, a placement with the reason of each choice out.

Pure. The order of what gets the card's memory: its own workspace, whole layers (attention, router, shared expert or
dense MLP) with the latent cache of the context, the head, then routed experts, the hottest first: these have the
cache's place until the context needs it. CPU memory takes the layers that the card has no room for and the experts in
order of heat; the coldest stay on the disk, mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from localmoe.errors import DeviceError, UsageError
from localmoe.memory import LEAST_CONTEXT, USABLE, MemoryNeeds, choose_context
from localmoe.model.config import ModelConfig
from localmoe.model.sizes import card_cache_bytes, card_workspace
from localmoe.offload.machine import GIB, Machine
from localmoe.offload.predict import CHUNK, GPU_CHUNK, Residence, Speed, Subject, decode, prefill, stream_from
from localmoe.offload.shares import Share, Tier, always_shares, cache_share, expert_shares, rest

CUDA_CONTEXT = 512 << 20  # the driver's and the libraries' own, in every process that computes on a card
STAGING = 128 << 20  # two buffers of 64 MiB that experts are streamed through, on either side

_SLOT_UNIT = 256  # localmoe.kernels.triton.weights.SLOT_UNIT, which is not imported: a plan needs no Triton


@dataclass(frozen=True)
class Budgets:
    """Bytes that may be used: `ram` of CPU memory, of which a tenth stays free (None: not known); `vram` of the card's,
    a hard ceiling (None: no card is used). `context` in tokens, None for the smaller of the model's and what fits."""

    ram: int | None = None
    vram: int | None = None
    context: int | None = None


@dataclass(frozen=True)
class Placement:
    """`layers` says where each layer and its experts are; `longest_context` what the memory would hold at most."""

    context: int
    longest_context: int
    layers: tuple[Residence, ...]
    head_on_gpu: bool
    shares: tuple[Share, ...]
    arena: int = 0
    """Bytes of the card that the latent cache and the experts' slots share: what one gives back the other takes."""

    @property
    def cpu_layers(self) -> int:
        """Layers computed on the CPU."""
        return sum(not layer.on_gpu for layer in self.layers)

    @property
    def gpu_experts(self) -> int:
        """Routed experts on the card."""
        return sum(layer.gpu_experts for layer in self.layers)

    @property
    def disk_experts(self) -> int:
        """Routed experts that stay on the disk."""
        return sum(layer.disk_experts for layer in self.layers)

    def nbytes(self, tier: Tier) -> int:
        """Bytes in one place."""
        return sum(share.nbytes for share in self.shares if share.tier == tier)

    @property
    def vram(self) -> int:
        """Bytes of the card that are taken from the beginning, whatever of the arena is cache or slots yet."""
        sharing = [s.nbytes for s in self.shares if s.tier == "gpu" and s.part in ("latent cache", "routed experts")]
        return self.nbytes("gpu") - (sum(sharing) - self.arena if self.arena else 0)

    @property
    def experts_on_disk(self) -> int:
        """Bytes of routed experts that memory does not hold: each use of one waits."""
        return sum(share.nbytes for share in self.shares if (share.part, share.tier) == ("routed experts", "disk"))


@dataclass(frozen=True)
class Advice:
    """A change, and what decode would then be in tokens/s, with an empty cache."""

    change: str
    decode_tokens_per_second: float


@dataclass(frozen=True)
class Plan:
    """`placement` with the whole context in the cache and `at_first` with none of it. `decode` with an empty cache and
    `decode_full` with the whole context in it; `prefill` of `prompt` tokens.
    `without_cpu_layers` is decode as it would be if the card held every layer, where it does not."""

    budgets: Budgets
    placement: Placement
    at_first: Placement
    decode: Speed
    decode_full: Speed
    prefill: Speed
    prompt: int
    stream_from: int | None
    without_cpu_layers: float | None
    advice: tuple[Advice, ...]


def make_plan(subject: Subject, machine: Machine, budgets: Budgets, prompt: int = CHUNK) -> Plan:
    """Place a model and say how fast that will be.

    Raises UsageError for a context that the model cannot have, DeviceError, with the number that would do, for a card
    that cannot hold one layer and its cache, or CPU memory that cannot hold what every token reads there.
    """
    full = place(subject, budgets)
    empty = place(subject, budgets, held=0)
    speed = decode(subject, machine, empty.layers, empty.head_on_gpu, 0)
    prompt = min(prompt, full.context)
    without = None
    if full.cpu_layers and budgets.vram is not None:
        everything = tuple(Residence(True) for _ in full.layers)
        without = decode(subject, machine, everything, True, 0).tokens_per_second
    return Plan(
        budgets=budgets,
        placement=full,
        at_first=empty,
        decode=speed,
        decode_full=decode(subject, machine, full.layers, full.head_on_gpu, full.context),
        prefill=prefill(subject, machine, empty.layers, empty.head_on_gpu, prompt),
        prompt=prompt,
        stream_from=stream_from(subject, machine, empty.layers),
        without_cpu_layers=without,
        advice=_advice(subject, machine, budgets, empty),
    )


def place(subject: Subject, budgets: Budgets, held: int | None = None) -> Placement:
    """Place a model with `held` tokens in the cache, the whole context if None or more: what the cache does not take
    yet holds more experts. Raises as `make_plan` does."""
    if budgets.vram is None:
        return _place_on_cpu(subject, budgets, held)
    return _place_on_gpu(subject, budgets, budgets.vram, held)


def prompt_chunk(config: ModelConfig, vram: int) -> int:
    """Tokens of a prompt that the card computes at a time: more of them share what is carried over PCIe, but what they
    work in should not cost the card many experts."""
    chunks = (GPU_CHUNK >> shift for shift in range(4))
    return next((chunk for chunk in chunks if card_workspace(config, chunk) <= vram // 8), CHUNK)


def gpu_workspace(config: ModelConfig, vram: int) -> int:
    """Bytes of the card that hold neither weights nor cache: CUDA's own, staging buffers, one chunk's activations."""
    return CUDA_CONTEXT + STAGING + card_workspace(config, prompt_chunk(config, vram))


def experts_on_card(subject: Subject, layers: Sequence[Residence]) -> list[list[int]]:
    """Layer by layer, the experts that `place` put on the card: the hottest, in ascending order."""
    chosen: list[list[int]] = [[] for _ in layers]
    for _, expert, index in _by_heat(subject):
        if len(chosen[index]) < layers[index].gpu_experts:
            chosen[index].append(expert)
    return [sorted(experts) for experts in chosen]


def _place_on_cpu(subject: Subject, budgets: Budgets, held: int | None) -> Placement:
    sizes, config = subject.sizes, subject.config
    needs = MemoryNeeds(sizes.always, sizes.experts, subject.cache_per_token)
    longest = config.max_position_embeddings
    context = choose_context(needs, longest, budgets.context, budgets.ram)
    room = None
    if budgets.ram is not None:
        usable = int(budgets.ram * USABLE)
        longest = min(longest, (usable - sizes.always) // subject.cache_per_token)
        room = usable - sizes.always - (context if held is None else held) * subject.cache_per_token
    layers = _place_experts(subject, [False] * len(sizes.layers), 0, room)
    cached = context if held is None else min(held, context)
    shares = [
        *always_shares(subject, layers, "ram", "every token reads it, and there is no card to hold it"),
        Share("head", "ram", sizes.head.nbytes, "", "every token reads it"),
        cache_share(subject, "ram", cached, len(layers), "it grows with the context; all of it is reserved here"),
        *expert_shares(subject, layers),
        *rest(subject),
    ]
    return Placement(context, longest, layers, False, tuple(share for share in shares if share.nbytes))


def _place_on_gpu(subject: Subject, budgets: Budgets, vram: int, held: int | None) -> Placement:
    sizes = subject.sizes
    room = vram - gpu_workspace(subject.config, vram)
    context, longest = _context_on_gpu(subject, budgets, room)
    on_gpu, head = _layers_on_gpu(subject, room, context)
    _refuse_less_than_a_layer(subject, vram, room, context, on_gpu)
    cached = context if held is None else min(held, context)
    used = sum(layer.always for layer, here in zip(sizes.layers, on_gpu, strict=True) if here)
    arena, slots = _arena(subject, room - used - sizes.head.nbytes * head, on_gpu, context, cached)
    layers = _place_experts(subject, on_gpu, slots, _ram_room(subject, budgets, on_gpu, head, context))
    shares = [
        Share(
            "workspace", "gpu", gpu_workspace(subject.config, vram), "", "CUDA's own, staging, a chunk's activations"
        ),
        *always_shares(subject, layers, "gpu", "every token reads it, so it is worth most on the card"),
        cache_share(
            subject, "gpu", cached, sum(on_gpu), "it grows with the context, and the coldest experts make room"
        ),
        Share("head", "gpu" if head else "ram", sizes.head.nbytes, "", "every token reads it"),
        *always_shares(subject, layers, "ram", "--vram has no room for these layers: the CPU computes them"),
        cache_share(subject, "ram", cached, len(on_gpu) - sum(on_gpu), "beside the layers that it belongs to"),
        *expert_shares(subject, layers),
        Share("staging", "ram", STAGING, "pinned", "a mapped file cannot be pinned: weights go to the card through it"),
        *rest(subject),
    ]
    return Placement(context, longest, layers, head, tuple(share for share in shares if share.nbytes), arena)


def _arena(subject: Subject, room: int, on_gpu: Sequence[bool], context: int, cached: int) -> tuple[int, int]:
    """(bytes that cache and slots share, slots in it behind `cached` tokens): never more than the whole context and all
    experts of these layers need. Slots are numbered through the arena: one that the cache has begun to take is lost."""
    slot = -(-subject.sizes.expert // _SLOT_UNIT) * _SLOT_UNIT
    whole = card_cache_bytes(subject.cache_row, sum(on_gpu), context)
    experts = sum(layer.experts for layer, here in zip(subject.sizes.layers, on_gpu, strict=True) if here)
    if not experts:
        return whole, 0
    arena = min(room, (-(-whole // slot) + experts) * slot)
    taken = -(-card_cache_bytes(subject.cache_row, sum(on_gpu), cached) // slot)
    return arena, max(0, arena // slot - taken)


def _context_on_gpu(subject: Subject, budgets: Budgets, room: int) -> tuple[int, int]:
    """(context, the longest one with every layer on the card)."""
    maximum = subject.config.max_position_embeddings
    a_token = card_cache_bytes(subject.cache_row, len(subject.sizes.layers), 1)
    fits = max(0, (room - subject.sizes.always) // a_token)
    asked = budgets.context
    if asked is not None and not 1 <= asked <= maximum:
        raise UsageError(f"--ctx {asked}: the model was made for 1 to {maximum} tokens")
    # Rather than less than this, layers leave the card
    chosen = asked if asked is not None else min(maximum, max(fits, LEAST_CONTEXT))
    return chosen, min(maximum, max(fits, chosen))


def _layers_on_gpu(subject: Subject, room: int, context: int) -> tuple[list[bool], bool]:
    """(which layers are on the card with their cache, whether the head is): as many of the first as there is room for.

    A byte on the card saves the same time whichever layer it belongs to; that the last ones leave keeps the hidden
    state's way between card and CPU to one change."""
    cache = card_cache_bytes(subject.cache_row, 1, context)
    layers = [layer.always + cache for layer in subject.sizes.layers]
    head = room >= layers[0] + subject.sizes.head.nbytes
    left = room - subject.sizes.head.nbytes * head
    on_gpu: list[bool] = []
    for size in layers:
        on_gpu.append(left >= size and all(on_gpu))
        left -= size * on_gpu[-1]
    return on_gpu, head


def _refuse_less_than_a_layer(subject: Subject, vram: int, room: int, context: int, on_gpu: Sequence[bool]) -> None:
    if any(on_gpu):
        return
    least = subject.sizes.layers[0].always + card_cache_bytes(subject.cache_row, 1, context)
    needed = vram - room + least
    raise DeviceError(
        f"--vram {vram / GIB:.2f} GiB cannot hold one layer with its cache of {context} tokens; "
        f"{_round_up(needed)} GiB would do, or --device cpu, which uses no card"
    )


def _ram_room(subject: Subject, budgets: Budgets, on_gpu: Sequence[bool], head: bool, context: int) -> int | None:
    """Bytes of CPU memory for experts, after what every token reads there."""
    if budgets.ram is None:
        return None
    sizes = subject.sizes
    always = STAGING + sizes.head.nbytes * (not head)
    for layer, here in zip(sizes.layers, on_gpu, strict=True):
        always += 0 if here else layer.always + context * subject.cache_row
    room = int(budgets.ram * USABLE) - always
    if room < 0:
        raise DeviceError(
            f"the parts that the card has no room for need {_round_up(always / USABLE)} GiB of CPU memory "
            f"and there are {budgets.ram / GIB:.2f}: a shorter --ctx or more --vram leaves fewer of them"
        )
    return room


def _place_experts(subject: Subject, on_gpu: Sequence[bool], slots: int, room: int | None) -> tuple[Residence, ...]:
    """Experts by heat: `slots` of them on the card, then as many as `room` bytes of CPU memory hold (None: all)."""
    sizes, k = subject.sizes, subject.config.num_experts_per_tok
    counts = [[0, 0] for _ in sizes.layers]  # [on the card, on the disk]
    uses = [[0.0, 0.0] for _ in sizes.layers]
    for heat, _, index in _by_heat(subject):
        if on_gpu[index] and slots > 0:
            slots -= 1
            place = 0
        elif room is None or room >= sizes.layers[index].expert.nbytes:
            room = None if room is None else room - sizes.layers[index].expert.nbytes
            continue
        else:
            room = 0  # nothing colder gets in before something hotter
            place = 1
        counts[index][place] += 1
        uses[index][place] += heat
    return tuple(
        Residence(here, counts[index][0], uses[index][0] / k, counts[index][1], uses[index][1] / k)
        for index, here in enumerate(on_gpu)
    )


def _by_heat(subject: Subject) -> list[tuple[float, int, int]]:
    """(heat, expert, layer) of every routed expert, the hottest first; equals are spread over the layers evenly."""
    k = subject.config.num_experts_per_tok
    found = []
    for index, layer in enumerate(subject.sizes.layers):
        heat = [1.0] * layer.experts if subject.heat is None else subject.heat[index]
        total = sum(heat)
        found += [(k * each / total if total else 0.0, expert, index) for expert, each in enumerate(heat)]
    return sorted(found, key=lambda item: (-item[0], item[1], item[2]))


def _advice(subject: Subject, machine: Machine, budgets: Budgets, now: Placement) -> tuple[Advice, ...]:
    """What would help, the best first."""
    found = []
    for change, other in _changes(subject, budgets, now):
        try:
            there = place(subject, other, held=0)
        except DeviceError:
            continue
        found.append(Advice(change, decode(subject, machine, there.layers, there.head_on_gpu, 0).tokens_per_second))
    return tuple(sorted(found, key=lambda advice: -advice.decode_tokens_per_second))


def _changes(subject: Subject, budgets: Budgets, now: Placement) -> list[tuple[str, Budgets]]:
    changes = []
    if budgets.vram is not None:
        changes.append(("1 GiB more of --vram", Budgets(budgets.ram, budgets.vram + GIB, budgets.context)))
    on_disk = sum(home.disk_experts for home in now.layers) * subject.sizes.expert
    if on_disk and budgets.ram is not None:
        enough = budgets.ram + int(on_disk / USABLE) + GIB
        changes.append((f"{_round_up(enough)} GiB of CPU memory, which holds every expert",
                        Budgets(enough, budgets.vram, budgets.context)))  # fmt: skip
        changes.append(("1 GiB more of CPU memory", Budgets(budgets.ram + GIB, budgets.vram, budgets.context)))
    return changes


def _round_up(nbytes: float) -> str:
    """GiB with two digits after the point, never less than needed."""
    return f"{-(-int(nbytes) * 100 // GIB) / 100:.2f}"
