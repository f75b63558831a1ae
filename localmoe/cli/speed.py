"""`--explain-speed`: the table of where a token's time went, for run, chat and bench."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from localmoe import store
from localmoe.cli import streams
from localmoe.cli.sanitize import printable_line

if TYPE_CHECKING:
    from localmoe.benchmark import Benchmark
    from localmoe.cli.answer import Answer
    from localmoe.engine import Engine
    from localmoe.explain import Explanation, PartTimer, Sample

KEYS = (
    "speed {tokens, tokens_per_second, milliseconds_per_token {part: ms}, bytes_per_token {part: bytes}, "
    "limit_bytes_per_second, limit, limit_share, hit_rate_by_layer (null: no card), changes [{change, "
    "tokens_per_second, gain}], beside_milliseconds_per_token {part: ms} (at the same time as a card's parts), "
    "troubles [what makes a card slower than it need be]} or null"
)
_NAMES = {
    "experts": "experts, shared one too",
    "dense": "dense layers",
    "sampling": "sampling, text",
    "other": "norms, Python, the rest",
}
_TRIALS = 0.1  # guesses a pass: fewer only try whether guessing pays, and change no figure
_ADVISED = ("balanced", "local", "compact")  # recipes of which the names say what they cost; the others are special


def timer(engine: Engine) -> PartTimer:
    """To be told of an answer's tokens."""
    from localmoe.explain import PartTimer

    return PartTimer(engine.kernels.profile, engine.expert_hits, engine.hit_rates)


def of_answer(engine: Engine, timed: PartTimer, answer: Answer) -> Explanation | None:
    """Why `answer` came as fast as it did; None where fewer than two tokens came."""
    guessed = answer.speculation
    several = guessed is not None and guessed.drafted_tokens > _TRIALS * guessed.passes
    held = answer.prompt_tokens + answer.completion_tokens // 2
    sample = timed.sample(answer.completion_tokens - 1, answer.decode_seconds, answer.sampling_seconds, held, several)
    return None if sample is None else _explained(engine, sample)


def of_benchmark(engine: Engine, result: Benchmark) -> Explanation:
    """Why the benchmark's decoding is as fast as it is, by its mean milliseconds of a token."""
    from localmoe.explain import OTHER, Sample

    parts = {part: ms / 1e3 for part, ms in result.breakdown.items()}
    total = sum(parts.values())
    parts.pop("overhead", None)
    parts.pop(OTHER, None)
    held = result.context + result.completion_tokens // 2
    beside = {part: ms / 1e3 for part, ms in result.beside.items()}
    return _explained(engine, Sample(1, total, parts, held, hit_rates=result.hit_rate_by_layer, beside=beside))


def as_json(explanation: Explanation | None) -> dict[str, Any] | None:
    """The value of the key `speed`."""
    return None if explanation is None else asdict(explanation)


def tell(explanation: Explanation | None) -> None:
    """Put the table on standard error."""
    if explanation is None:
        streams.tell("--explain-speed: fewer than two tokens came, so nothing was timed")
    else:
        streams.tell(text(explanation))


def text(found: Explanation) -> str:
    """The explanation as lines."""
    from localmoe.cli.render import table

    total = sum(found.milliseconds_per_token.values())
    rows = []
    for part, ms in sorted(found.milliseconds_per_token.items(), key=lambda item: -item[1]):
        read = found.bytes_per_token.get(part)
        rate = "" if read is None else _rate(read / ms * 1e3)
        amount = "" if read is None else f"{read / 1e6:,.1f} MB"
        rows.append((_NAMES.get(part, part), f"{ms:.3f}", f"{ms / total:.0%}", amount, rate))
    read = sum(found.bytes_per_token.values())
    amount = f"{read / 1e6:,.1f} MB" if read else ""
    rows.append(("a token", f"{total:.3f}", "100%", amount, _rate(read / total * 1e3) if read else ""))
    lines = [
        table(
            (f"{found.tokens_per_second:.1f} TOKENS/S", "MS", "SHARE", "READS", "AT"),
            rows,
            ("left", "right", "right", "right", "right"),
        )
    ]
    for part, ms in found.beside_milliseconds_per_token.items():
        read = found.bytes_per_token.get(part, 0) if part not in found.milliseconds_per_token else 0
        rate = f", {read / 1e6:,.1f} MB at {_rate(read / ms * 1e3)}" if read and ms else ""
        lines.append(f"beside them: {part} {ms:.3f} ms{rate}")
    if found.limit_share is not None and found.limit_bytes_per_second is not None:
        lines.append(f"{found.limit_share:.0%} of what {found.limit} gives, {_rate(found.limit_bytes_per_second)}")
    elif not found.bytes_per_token and not found.hit_rate_by_layer:
        lines.append("bytes are not counted where guesses let a pass compute several tokens")
    if found.hit_rate_by_layer:
        lines.append("experts on the card, by layer: " + " ".join(f"{rate:.0%}" for rate in found.hit_rate_by_layer))
    lines += [f"slower than it need be: {printable_line(trouble)}" for trouble in found.troubles]
    if found.changes:
        best = found.changes[0]
        lines.append(f"what would help most: {best.change}: {best.tokens_per_second:.1f} tokens/s ({best.gain:+.0%})")
        lines += [f"next: {each.change} ({each.gain:+.0%})" for each in found.changes[1:2]]
    elif found.limit_share is not None:
        lines.append("nothing that can be reckoned from this would give even 1 %: the time is in fixed costs")
    return "\n".join(lines)


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.1f} GB/s"


def _explained(engine: Engine, sample: Sample) -> Explanation:
    from localmoe.explain import explain_engine
    from quantize.recipes import recipe_named

    shape = {"intermediate_size": engine.config.intermediate_size}
    recipes = {name: recipe_named(name).for_model(shape).quantization_config(group_size=32) for name in _ADVISED}
    return explain_engine(engine, sample, store.home(), recipes)
