"""How fast a model runs on this machine, and how near that is to what its memory allows."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from localmoe.card_parts import split_up
from localmoe.errors import ContextOverflowError
from localmoe.model.kv_cache import row_bytes

if TYPE_CHECKING:
    from localmoe.engine import Engine
    from localmoe.formats.safetensors import TensorInfo
    from localmoe.model.config import ModelConfig

_FIRST_PROMPT = 16  # tokens of the prompt whose first token is waited for


@dataclass(frozen=True)
class Benchmark:
    """Medians over the repeats. Seconds, bytes, and tokens a second.

    `first_token_seconds` is from the beginning of opening to the first token of a 16-token prompt. `bytes_per_token`
    counts what a decoded token reads once: weights as stored and, at the middle of the run, the latent cache;
    `disk_bytes_per_token` what this process read from the disk meanwhile, a mean (None: the kernel does not tell);
    `bandwidth_fraction` is that times tokens a second over the read bandwidth, which was measured before and after.
    `breakdown` is milliseconds of a decoded token by part, `beside` what ran at the same time as a card's parts;
    `hit_rate_by_layer` the share of the MoE layers' expert uses
    that the card served in the last repeat's decoding (None: no card).
    """

    kernels: str
    threads: int
    prompt_tokens: int
    completion_tokens: int
    context: int
    open_seconds: float
    first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    read_bandwidth_bytes_per_second: float | None
    bytes_per_token: int
    disk_bytes_per_token: int | None
    bandwidth_fraction: float | None
    peak_rss_bytes: int
    rss_anon_bytes: int | None
    breakdown: dict[str, float]
    hit_rate_by_layer: list[float] | None = None
    beside: dict[str, float] = field(default_factory=dict)


def bytes_per_token(config: ModelConfig, tensors: Iterable[TensorInfo]) -> int:
    """Bytes of weights that one decoded token reads: all that every token needs, its share of the routed experts, one
    row of the embedding, nothing of the MTP layers."""
    mtp = tuple(f"model.layers.{config.num_hidden_layers + i}." for i in range(config.num_nextn_predict_layers))
    total = 0
    for info in tensors:
        if info.name.startswith(mtp) and mtp:
            continue
        if ".mlp.experts." in info.name:
            total += info.nbytes * config.num_experts_per_tok
        elif info.name.startswith("model.embed_tokens.") and not config.tie_word_embeddings:
            total += info.nbytes // config.vocab_size * config.n_routed_experts
        else:
            total += info.nbytes * config.n_routed_experts
    return total // config.n_routed_experts


def measure(
    open_engine: Callable[[], Engine],
    *,
    prompt_tokens: int,
    completion_tokens: int,
    context: int = 0,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda _: None,
) -> Benchmark:
    """Open the model and time it: random token ids, greedy, from a cache that holds `context` random tokens.

    Raises ContextOverflowError where the tokens asked for do not fit, and what opening raises.
    """
    progress("opening")
    started = time.perf_counter()
    engine = open_engine()
    with engine:
        opened = time.perf_counter() - started
        most = max(prompt_tokens, context + completion_tokens, _FIRST_PROMPT)
        if most > engine.max_context:
            raise ContextOverflowError(f"{most:,} tokens are asked for and the context holds {engine.max_context:,}")
        _prefill(engine, _FIRST_PROMPT)
        first = time.perf_counter() - started
        backend = engine.kernels.backend
        bandwidths = [backend.read_bandwidth()] if backend else []
        prefills, decodes, parts, disk = [], [], [], []
        for repeat in range(repeats):
            progress(f"prefill {repeat + 1} of {repeats}")
            prefills.append(_prefill(engine, prompt_tokens))
            progress(f"decode {repeat + 1} of {repeats}")
            hits, before = engine.expert_hits(), _read_from_disk()
            seconds, breakdown = _decode(engine, completion_tokens, context)
            disk.append(_less(_read_from_disk(), before))
            decodes.append(seconds)
            parts.append(breakdown)
        rates = engine.hit_rates(hits)
        split = engine.card_split(context + completion_tokens // 2)
        peak, anonymous = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, _rss_anon()
        bandwidths += [backend.read_bandwidth()] if backend else []
        decode = statistics.median(decodes)
        row = row_bytes(engine.config, engine.kernels.cache_dtype) * engine.config.num_hidden_layers
        size = bytes_per_token(engine.config, engine.tensors) + row * (context + completion_tokens // 2)
        bandwidth = statistics.mean(bandwidths) if bandwidths else None
        return Benchmark(
            kernels=engine.kernels.tier,
            threads=engine.kernels.threads or torch.get_num_threads(),
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            context=context,
            open_seconds=opened,
            first_token_seconds=first,
            prefill_tokens_per_second=prompt_tokens / statistics.median(prefills),
            decode_tokens_per_second=1 / decode,
            read_bandwidth_bytes_per_second=bandwidth,
            bytes_per_token=size,
            disk_bytes_per_token=_a_token(disk, completion_tokens + 1),  # the first is not timed, but it reads
            bandwidth_fraction=size / decode / bandwidth if bandwidth else None,
            peak_rss_bytes=peak,
            rss_anon_bytes=anonymous,
            breakdown=split_up({part: statistics.median(each[part] for each in parts) for part in parts[0]}, split),
            hit_rate_by_layer=rates,
            beside={part: 1e3 * seconds for part, seconds in split.beside.items()} if split else {},
        )


def decode_by_context(
    engine: Engine, most: int, count: int, progress: Callable[[str], None] = lambda _: None
) -> list[tuple[int, float]]:
    """(tokens in the cache, tokens/s) with an empty cache and with `most` tokens, halved five times; `count` tokens are
    decoded each time."""
    most = max(min(most, engine.max_context - count - 1), 0)
    _decode(engine, count, 0)  # weights come into memory
    found = []
    for held in sorted({0, *(most >> halvings for halvings in range(6))}):
        progress(f"decode after {held:,} tokens")
        found.append((held, 1 / _decode(engine, count, held)[0]))
    return found


def _random_ids(engine: Engine, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, engine.config.vocab_size, (count,), generator=generator)


def _prefill(engine: Engine, count: int) -> float:
    """Seconds to the last token's logits."""
    return prefill_ids(engine, _random_ids(engine, count))


def prefill_ids(engine: Engine, ids: torch.Tensor) -> float:
    """Seconds to the logits of the last of these ids int64 [T], from an empty cache."""
    count = len(ids)
    cache = engine.model.new_cache(count)
    started = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, count, engine.model.prefill_chunk):
            engine.model.forward(ids[start : start + engine.model.prefill_chunk], cache, last_only=True)
    return time.perf_counter() - started


def _decode(engine: Engine, count: int, context: int) -> tuple[float, dict[str, float]]:
    """Median seconds a token, and the mean milliseconds of its parts."""
    cache = engine.model.new_cache(context + count + 1)
    generator = torch.Generator().manual_seed(0)
    for layer in range(engine.config.num_hidden_layers):
        cache.append(layer, torch.randn(context, engine.config.latent_width, generator=generator))
    cache.advance(context)
    profile, seconds, sampling = engine.kernels.profile, [], 0.0
    ids = _random_ids(engine, count + 1)  # not the tokens drawn: a random model soon says the same one always
    with torch.inference_mode():
        engine.model.forward(ids[:1], cache, last_only=True)  # the first is not timed: threads wake up
        profile.reset()
        for i in range(count):
            started = time.perf_counter()
            logits = engine.model.forward(ids[i + 1 : i + 2], cache, last_only=True)
            computed = time.perf_counter()
            int(logits[0].argmax())
            ended = time.perf_counter()
            seconds.append(ended - started)
            sampling += ended - computed
    parts = profile.seconds() | {"sampling": sampling}
    parts["overhead"] = sum(seconds) - sum(parts.values())
    return statistics.median(seconds), {part: 1e3 * value / count for part, value in parts.items()}


def _rss_anon(status: Path = Path("/proc/self/status")) -> int | None:
    """Bytes of resident memory that are no file's, or None where the kernel does not tell."""
    kib = _field(status, "RssAnon:")
    return None if kib is None else kib * 1024


def _read_from_disk(io: Path = Path("/proc/self/io")) -> int | None:
    """Bytes that this process has had read from disks so far, or None where the kernel does not tell."""
    return _field(io, "read_bytes:")


def _field(file: Path, name: str) -> int | None:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), None)


def _less(now: int | None, before: int | None) -> int | None:
    return None if now is None or before is None else now - before


def _a_token(read: list[int | None], tokens: int) -> int | None:
    known = [each for each in read if each is not None]
    return int(statistics.median(known) / tokens) if known else None
