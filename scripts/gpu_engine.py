"""The engine as a whole on a card: `check-engine`, `check-guesses`, `calls` and `engine` of `scripts/gpu_check`.

The checks run the demo, which is in the checkout, against the reference on the CPU and against itself. The timings run
`localmoe.benchmark` on a random checkpoint of V2-Lite's shape, made on the spot, with as much memory as --vram gives.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
KLD = 1e-3
AGREE = 0.97  # of 160 tokens: a near-tie or two of a small model may fall the other way
NEAR = 1e-3  # logits that another order of summation may turn around
_GIB = 1 << 30
_CONTEXT, _LONG = 4096, 131072  # tokens
_ANSWER = 64
_LOOKED_AT = 20  # answers: where guessing is broken, all are other ones


def build_extension(folder: Path) -> Path:
    """The CPU kernels for this Python, built in `folder`. Raises CalledProcessError."""
    nanobind = subprocess.run(
        [sys.executable, "-m", "nanobind", "--cmake_dir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release", f"-Dnanobind_DIR={nanobind}",
        f"-DPython_EXECUTABLE={sys.executable}", *(["-G", "Ninja"] if shutil.which("ninja") else []),
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(folder), "--parallel"]):
        subprocess.run(command, check=True, stdout=sys.stderr)
    (built,) = folder.glob("_cpu*.so")
    return built


def keep_extension(built: Path) -> None:
    """Puts it beside the package's modules (git ignores it there) where there is none."""
    if importlib.util.find_spec("localmoe.kernels._cpu") is None:
        shutil.copy2(built, ROOT / "localmoe/kernels" / built.name)
        importlib.invalidate_caches()


def ensure_extension() -> None:
    """Builds it where there is none."""
    if importlib.util.find_spec("localmoe.kernels._cpu") is None:
        with tempfile.TemporaryDirectory() as scratch:
            keep_extension(build_extension(Path(scratch)))


@contextmanager
def opened(
    model: str, device: torch.device, vram: int | None, context: int, *, deterministic: bool = False, mtp: int = 0
) -> Iterator[Any]:
    """The model on the card; without one, on the interpreter as if the CPU's memory were a card's."""
    import localmoe.load as loading
    from localmoe.offload.device import CardMemory, choose_card

    def choose(wanted: str, given: int | None) -> Any:
        return choose_card(wanted, given) if device.type == "cuda" else CardMemory(device, vram or 4 * _GIB)

    given = vram if device.type == "cuda" else None
    with mock.patch.object(loading, "choose_card", choose):
        engine = loading.load(
            model,
            device="auto" if given is None else "cuda",
            vram=given,
            ctx=context,
            deterministic=deterministic,
            mtp=mtp,
        )
    with engine:
        yield engine


def check_engine(bench: Any) -> Iterator[dict[str, Any]]:
    """The demo with all, some and none of its experts on the card, against the reference: KLD, top-1, greedy tokens."""
    ensure_extension()
    from localmoe.load import load
    from localmoe.model.sizes import card_workspace
    from localmoe.offload.plan import CUDA_CONTEXT, STAGING

    count, start, answer = (160, 16, 24) if bench.on_gpu else (6, 2, 1)
    text = "Once upon a time there was a little dragon who lived by the sea. " * 12
    with load("demo:source", device="cpu", kernels="reference", ctx=256) as reference:
        ids = reference.prompt_ids(text)[:count]
        wanted = reference.logits(ids).log_softmax(-1)
        greedy = [step.token_id for step in reference.generate(ids[:start], max_tokens=answer)]
        config = reference.config
    least = CUDA_CONTEXT + STAGING + card_workspace(config, 512)
    for what, room in (("all", 64 << 20), ("some", 14 << 20), ("none", 11 << 19)):
        with opened("demo:source", bench.device, least + room, 256, deterministic=True) as engine:
            held = sum(share.nbytes for share in engine.placement.shares if share.part == "routed experts")
            here = sum(s.nbytes for s in engine.placement.shares if s.part == "routed experts" and s.tier == "gpu")
            ours = engine.logits(ids).log_softmax(-1)
            own = [step.token_id for step in engine.generate(ids[:start], max_tokens=answer)]
            again = [step.token_id for step in engine.generate(ids[:start], max_tokens=answer)]
        kld = float((wanted.exp() * (wanted - ours)).sum(-1).mean())
        agree = float((wanted.argmax(-1) == ours.argmax(-1)).float().mean())
        row = {"case": what, "experts_on_card": here / held, "kld": kld, "top1": agree, "greedy_same": own == greedy}
        if kld > KLD or agree < AGREE or own != again:
            row["error"] = "another model" if own == again else "the same prompt gives another answer"
        yield row
    yield _giving_back(bench, least + (14 << 20), text)


def _giving_back(bench: Any, vram: int, text: str) -> dict[str, Any]:
    """The demo as its cache grows into the places of experts, and as these come back after it: the same logits. It is
    FP8, which the CPU's kernels don't compute, so that passes with experts there are in no graph."""
    from localmoe.load import load

    count, answer = (480, 24) if bench.on_gpu else (2, 1)
    with load("demo:source", device="cpu", kernels="reference", ctx=512) as reference:
        ids = (reference.prompt_ids(text) * 8)[:count]
        wanted = reference.logits(ids).log_softmax(-1)
    with opened("demo:source", bench.device, vram, 512, deterministic=False) as engine:
        tables = [layer._mlp._experts.table for layer in engine.model._layers if layer.uses is not None]
        slots = [sum(len(table.slots()) for table in tables)]
        list(engine.generate(ids[:16], max_tokens=answer))
        ours = engine.logits(ids).log_softmax(-1)
        list(engine.generate(ids, max_tokens=answer))
        slots.append(sum(len(table.slots()) for table in tables))
        for _ in range(8 if bench.on_gpu else 0):
            list(engine.generate(ids[:16], max_tokens=answer))
        slots.append(sum(len(table.slots()) for table in tables))
        short = engine.logits(ids[:8]).log_softmax(-1)
    kld = float((wanted.exp() * (wanted - ours)).sum(-1).mean())
    after = float((wanted[:8].exp() * (wanted[:8] - short)).sum(-1).mean())
    row = {"case": "giving back", "kld": kld, "kld_after": after, "slots": slots}
    if max(kld, after) > KLD:
        row["error"] = "another model"
    elif bench.on_gpu and not slots[1] < slots[0] == slots[2]:
        row["error"] = "nothing was given back, or it did not come back"
    return row


def check_guesses(bench: Any) -> Iterator[dict[str, Any]]:
    """Greedy answers of the demo with one guess at a time and with three, against those without: how many differ, how
    many of these where two logits nearly tie, and what guessing gains."""
    ensure_extension()
    prompts, answer, lengths = (200, 32, (1, 3)) if bench.on_gpu else (1, 3, (1,))
    beginnings = torch.randint(300, 4000, (prompts, 8), generator=torch.Generator().manual_seed(3))
    ids = [row[: 1 + i % 8].tolist() for i, row in enumerate(beginnings)]
    if not bench.on_gpu:
        ids = [[310]]  # whose next token is guessed right: a row takes seconds

    def answers(mtp: int) -> tuple[list[list[int]], float, list[Any]]:
        with opened("demo:source", bench.device, None, 64, deterministic=True, mtp=mtp) as engine:
            list(engine.generate(ids[0], max_tokens=2 * answer if bench.on_gpu else 1, temperature=0))  # graphs
            runs = [list(engine.generate(prompt, max_tokens=answer, temperature=0)) for prompt in ids]
            last = [steps[-1].stats for steps in runs]
            seconds = sum(stats.decode_seconds for stats in last)
            return [[step.token_id for step in steps] for steps in runs], seconds, [stats.speculation for stats in last]

    wanted, plain_seconds, _ = answers(0)
    for mtp in lengths:
        found, seconds, guessed = answers(mtp)
        others = [each for each in zip(ids, wanted, found, strict=True) if each[1] != each[2]]
        margins = sorted(margins_of(bench, others[:_LOOKED_AT]), reverse=True)
        drafted = sum(each.drafted_tokens for each in guessed)
        row = {
            "case": f"{mtp} at a time", "answers": prompts, "other": len(others), "looked_at": len(margins),
            "near_ties": sum(each < NEAR for each in margins), "gain": plain_seconds / seconds,
            "right": sum(each.accepted_tokens for each in guessed) / max(drafted, 1),
        }  # fmt: skip
        if {each.drafter for each in guessed} != {"mtp"} or not drafted:
            row["error"] = "the MTP layer guessed nothing"
        elif margins and margins[0] >= NEAR:
            row["error"] = f"another answer where its logit is {margins[0]:.3g} below the largest"
        yield row


def margins_of(bench: Any, answers: list[tuple[list[int], list[int], list[int]]]) -> list[float]:
    """Of prompts with two answers each: where these part, by how much the lower of their two logits is below the
    largest."""
    margins = []
    with opened("demo:source", bench.device, None, 64, deterministic=True) as engine:
        for prompt, one, two in answers:
            place = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
            if place is None:  # one is longer
                margins.append(math.inf)
                continue
            logits = engine.logits(prompt + one[:place])[-1]
            margins.append(float(logits.max() - torch.minimum(logits[one[place]], logits[two[place]])))
    return margins


def calls(bench: Any) -> Iterator[dict[str, Any]]:
    """What a call of the CPU costs inside a CUDA graph, by each way that the driver has."""
    ensure_extension()
    from localmoe.kernels.calls import callers, round_trip

    if not bench.on_gpu:
        yield {"by": "nothing", "skipped": "no driver to call by"}
        return
    for name, caller in callers().items():
        taken = round_trip(caller, bench.device)
        yield (
            {"by": name, "us": taken * 1e6} if math.isfinite(taken) else {"by": name, "skipped": "not in a graph here"}
        )


def engine(bench: Any) -> Iterator[dict[str, Any]]:
    """Prefill and decode of V2-Lite's shape, `balanced`: everything on the card, no expert there, and 6 GiB; then the
    memory that is taken with long contexts."""
    ensure_extension()
    from localmoe.errors import LocalMoeError
    from localmoe.formats.checkpoint import Checkpoint
    from localmoe.model.config import ModelConfig
    from localmoe.offload.device import subject_of

    shared = Path("/dev/shm")
    roomy = bench.on_gpu and shared.is_dir() and shutil.disk_usage(shared).free > 20 * _GIB
    with tempfile.TemporaryDirectory(dir=shared if roomy else None) as folder:
        directory = Path(folder) / "model"
        make = [sys.executable, str(ROOT / "scripts/make_random_checkpoint"), str(directory), "--recipe", "balanced"]
        like = ["--like", "deepseek-v2-lite", "--context", str(_LONG)] if bench.on_gpu else ["--like", "tiny"]
        subprocess.run([*make, *like], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        with Checkpoint.open(directory) as checkpoint:
            config = ModelConfig.from_dict(checkpoint.config)
            subject = subject_of(config, checkpoint, 2 * config.latent_width, None)
        if not bench.on_gpu:
            yield {"what": "no expert"} | _timed(bench, directory, Run(_without_experts(subject, 16), 16, 10, answer=2))
            return
        settings = [("everything", None), ("no expert", _without_experts(subject, _CONTEXT)), ("6 GiB", 6 * _GIB)]
        for what, vram in settings:
            for prompt in (512, _CONTEXT):
                yield {"what": what} | _timed(bench, directory, Run(vram, _CONTEXT, prompt))
        for size, held in ((6, 32768), (8, 32768), (12, _LONG), (24, _LONG)):  # the ceiling, as the context grows
            run = Run(size * _GIB, held, 512, held - _ANSWER - 1, repeats=1)
            try:
                row = _timed(bench, directory, run)
            except LocalMoeError as error:
                row = {"error": str(error)}
            yield {"what": f"{size} GiB, {held} tokens", **row}


@dataclass(frozen=True)
class Run:
    """What is timed: tokens of a prompt from an empty cache, and `answer` decoded from a cache that holds `held`."""

    vram: int | None
    context: int
    prompt: int
    held: int = 0
    answer: int = _ANSWER
    repeats: int = 3


def _without_experts(subject: Any, context: int) -> int:
    """Memory for all but the routed experts."""
    from localmoe.offload.plan import gpu_workspace

    always = subject.sizes.always + context * subject.cache_per_token
    return int(gpu_workspace(subject.config, 3 * _GIB) + always + subject.sizes.expert // 2)


def _timed(bench: Any, directory: Path, run: Run) -> dict[str, Any]:
    from localmoe.benchmark import measure

    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    holder = opened(str(directory), bench.device, run.vram, run.context)
    engines: list[Any] = []

    def open_engine() -> Any:
        engines.append(holder.__enter__())
        return engines[0]

    seen: dict[str, Any] = {}

    def look(what: str) -> None:
        if what.startswith("decode"):  # after the prefill, while it is open
            seen.update(chunk=engines[0].model.prefill_chunk, troubles=engines[0].troubles)

    try:
        found = measure(
            open_engine, prompt_tokens=run.prompt, completion_tokens=run.answer, context=run.held,
            repeats=run.repeats if bench.on_gpu else 1, progress=look,
        )  # fmt: skip
    finally:
        holder.__exit__(None, None, None)
    shares = engines[0].placement.shares
    experts = {share.tier: share.nbytes for share in shares if share.part == "routed experts"}
    row = {
        "prompt": run.prompt,
        "prefill_tps": found.prefill_tokens_per_second,
        "decode_tps": found.decode_tokens_per_second,
        "open_s": found.open_seconds,
        "first_token_s": found.first_token_seconds,
        "experts_on_card": experts.get("gpu", 0) / max(sum(experts.values()), 1),
        **seen,
    }
    return row | _memory(bench, run.vram) if bench.on_gpu else row


def _memory(bench: Any, vram: int | None) -> dict[str, Any]:
    """The most that an engine that is closed took of the card, CUDA's own part measured where nvidia-smi is there."""
    from localmoe.offload.plan import CUDA_CONTEXT

    beside = CUDA_CONTEXT
    if bench.used_by_others is not None:
        free, total = torch.cuda.mem_get_info(bench.device)
        beside = total - free - bench.used_by_others - torch.cuda.memory_reserved(bench.device)
    most = torch.cuda.max_memory_reserved() + beside
    row = {"peak_gib": most / _GIB, "cuda_gib": beside / _GIB}
    return row | {"error": f"more than --vram {vram / _GIB:.2f} GiB"} if vram is not None and most > vram else row
