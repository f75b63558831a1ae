"""The sections of `scripts/gpu_check`, each run in a process of its own. A result is a line "ROW {json}".

Bytes are those of weights and scales (of a cache: its rows), read once, whatever the number of rows; device bandwidth
is that of a large copy, reads and writes counted. Times are medians, from CUDA events, of sweeps over enough copies of
the operands that none is still in the L2 cache, which is also flushed before each sweep; a time is a sweep's over its
number of calls. "eager" has Triton's launch in it, "graph" is the same sweep as one CUDA graph.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import gpu_engine
import gpu_knobs
import torch
from torch import Tensor

if TYPE_CHECKING:
    from localmoe.kernels.triton.launch import Launch
    from localmoe.kernels.triton.mla_decode import DecodeWorkspace

ROOT = Path(__file__).resolve().parent.parent
FORMS = ("bf16", "int4", "int8", "nf4")  # as the kernels number them


@dataclass(frozen=True)
class Sizes:
    """What is measured: the models' shapes, or for the interpreter tiny ones."""

    matrices: tuple[tuple[str, int, int], ...]  # name, out, in
    products: tuple[tuple[int, int], ...]  # out, in of the products of many tokens
    tokens: tuple[int, ...]
    experts: tuple[int, int, int, int]  # experts, chosen, hidden, width
    heads: tuple[int, ...]
    latent: tuple[int, int, int]  # rank, rope, nope
    contexts: tuple[int, ...]
    rows: tuple[int, ...]  # of a decode step
    copy_bytes: int
    repeats: int


REAL = Sizes(
    matrices=(
        ("V2-Lite q", 3072, 2048), ("V2-Lite gate", 1408, 2048), ("V2-Lite down", 2048, 1408),
        ("V3 o", 7168, 16384), ("V3 gate", 2048, 7168), ("V3 down", 7168, 2048),
    ),
    products=((1408, 2048), (2048, 7168)), tokens=(512, 4096), experts=(64, 6, 2048, 1408), heads=(16, 128),
    latent=(512, 64, 128), contexts=(4096, 32768, 131072), rows=(1, 2, 4, 8), copy_bytes=2 << 30, repeats=15,
)  # fmt: skip
TINY = Sizes(
    matrices=(("tiny", 16, 128),), products=((16, 64),), tokens=(8,), experts=(4, 2, 64, 64), heads=(4,),
    latent=(16, 8, 8), contexts=(40,), rows=(2,), copy_bytes=1 << 20, repeats=1,
)  # fmt: skip


class Bench:
    """The device, what is measured on it, and how."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.on_gpu = device == "cuda"
        self.sizes = REAL if self.on_gpu else TINY
        self.cold_bytes = 1
        self.used_by_others: int | None = None
        """Bytes of the card's memory before this process took any, where nvidia-smi says."""
        if self.on_gpu:
            self.used_by_others = used_memory()
            torch.cuda.init()
            self._cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            self.cold_bytes = max(4 * self._cache, 128 << 20)
        self.generator = torch.Generator(device=self.device).manual_seed(1)

    @cached_property
    def _flush(self) -> Tensor:
        """Twice the device's cache: made where something is timed alone, and no part of an engine's memory."""
        return torch.empty(max(2 * self._cache, 64 << 20), dtype=torch.uint8, device=self.device)

    def copies(self, nbytes: int, most: int = 256) -> int:
        """How many operands of `nbytes` a sweep goes through."""
        return max(1, min(most, -(-self.cold_bytes // nbytes)))

    def seconds(self, run: Callable[[], object]) -> float:
        """Median of the repeats. The flush keeps the device busy while the first launches are made."""
        times = []
        for _ in range(self.sizes.repeats):
            if not self.on_gpu:
                started = time.perf_counter()
                run()
                times.append(time.perf_counter() - started)
                continue
            self._flush.zero_()
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            run()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
        return statistics.median(times)

    def eager_and_graph(self, run: Callable[[], object], out: Tensor, calls: int) -> dict[str, Any]:
        """Microseconds a call, as launched and as a CUDA graph, whose `out` must have the launched one's bits."""
        out.zero_()
        run()  # compiles
        if not self.on_gpu:
            return {"eager_us": self.seconds(run) / calls * 1e6, "graph_us": None, "graph_same": None}
        torch.cuda.synchronize()
        wanted = out.clone()
        eager = self.seconds(run) / calls
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        same = bool(torch.equal(out, wanted)) and bool(torch.isfinite(out).all())
        row = {"eager_us": eager * 1e6, "graph_us": self.seconds(graph.replay) / calls * 1e6, "graph_same": same}
        return row if same else row | {"error": "the graph's result is another, or not finite"}

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator)

    def matrix(self, form: str, out_features: int, in_features: int, count: int = 1) -> Any:
        """`count` stacked random matrices, as `upload` makes them, made on the device."""
        from localmoe.formats import nf4
        from localmoe.kernels.triton.weights import DeviceMatrix

        height, kind = count * out_features, FORMS.index(form)
        table = torch.tensor(nf4.VALUES, dtype=torch.float32, device=self.device)
        if form == "bf16":
            values = torch.empty(height, in_features, dtype=torch.bfloat16, device=self.device)
            values.normal_(0, in_features**-0.5, generator=self.generator)
            return DeviceMatrix(kind, 32, count, out_features, in_features, values, table[:0], table)
        group = 64 if form == "nf4" else 32
        width = in_features if form == "int8" else in_features // 2  # bytes a row
        octets = torch.randint(0, 256, (height, width), dtype=torch.uint8, device=self.device, generator=self.generator)
        largest = {"int4": 8, "int8": 128, "nf4": 1}[form]
        scales = torch.rand(height, in_features // group, device=self.device, generator=self.generator)
        scales *= 2 * in_features**-0.5 / largest
        values = octets.view(torch.int64 if form == "int8" else torch.int32)
        scales = scales if form == "nf4" else scales.bfloat16()
        return DeviceMatrix(kind, group, count, out_features, in_features, values, scales, table)


def matrix_copies(bench: Bench, form: str, height: int, width: int) -> list[Any]:
    """Enough matrices that a sweep over them reads device memory: slices of one stack."""
    from dataclasses import replace

    nbytes = bench.matrix(form, height, width).nbytes
    count = bench.copies(nbytes)
    stack = bench.matrix(form, height, width, count)
    parts = []
    for at in range(count):
        rows = slice(at * height, (at + 1) * height)
        scales = stack.scales[rows] if stack.octets else stack.scales
        parts.append(replace(stack, count=1, values=stack.values[rows], scales=scales))
    return parts


def environment(bench: Bench) -> Iterator[dict[str, Any]]:
    import triton

    row: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "cpu_threads": os.cpu_count(),
    }  # fmt: skip
    if bench.on_gpu:
        device = torch.cuda.get_device_properties(bench.device)
        free, total = torch.cuda.mem_get_info(bench.device)
        row |= {"gpu": device.name, "capability": f"{device.major}.{device.minor}", "sms": device.multi_processor_count}
        row |= {"l2_mib": device.L2_cache_size >> 20, "memory_gib": total / 2**30, "free_gib": free / 2**30}
        row |= {"driver": driver()}
        if device.major < 8:
            row |= {"error": "the kernels need compute capability 8.0"}
    yield row


def used_memory() -> int | None:
    """Bytes of the card's memory that are in use, by whatever program."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return int(said) << 20 if said.isdigit() else None


def driver() -> str | None:
    """The driver's version, or None where nvidia-smi is missing."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()
    return said[0] if said else None


def extension(bench: Bench) -> Iterator[dict[str, Any]]:
    """Builds the CPU kernels for this Python, asks them for their tiers, and leaves them to the engine's sections."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        built = gpu_engine.build_extension(Path(scratch))
        spec = importlib.util.spec_from_file_location("_cpu", built)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield {"build_s": time.perf_counter() - started, "tiers": list(module.supported_tiers())}
        gpu_engine.keep_extension(built)


def bandwidth(bench: Bench) -> Iterator[dict[str, Any]]:
    """A large copy on the device, and copies over PCIe from and to pinned and pageable memory."""
    if bench.on_gpu:
        size = min(bench.sizes.copy_bytes, torch.cuda.mem_get_info(bench.device)[0] // 4)
    else:
        size = bench.sizes.copy_bytes
    source = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    target.copy_(source)
    yield {"what": "device copy", "gbps": 2 * size / bench.seconds(lambda: target.copy_(source)) / 1e9}
    part = size // 4
    for kind in ("pinned", "pageable"):
        if kind == "pinned" and not bench.on_gpu:
            continue
        host = torch.zeros(part, dtype=torch.uint8, pin_memory=kind == "pinned")
        for way, to, of in (("to", target[:part], host), ("from", host, source[:part])):
            to.copy_(of, non_blocking=True)

            def copy(to: Tensor = to, of: Tensor = of) -> None:
                to.copy_(of, non_blocking=True)

            yield {"what": f"{way} the device, {kind}", "gbps": part / bench.seconds(copy) / 1e9}


def device_gbps(bench: Bench) -> float:
    """Of a large copy: measured in every section, so that a share compares like with like."""
    return float(next(bandwidth(bench))["gbps"])


def check(bench: Bench, kernel: str) -> Iterator[dict[str, Any]]:
    cases = load_cases()
    of_kernel = dict(cases.small_cases()[kernel])
    if bench.on_gpu:
        of_kernel |= cases.real_cases()[kernel]
    for name, case in of_kernel.items():
        torch.manual_seed(3)
        row: dict[str, Any] = {"case": name}
        try:
            case(bench.device)
            if bench.on_gpu:
                torch.cuda.synchronize()
        except Exception as error:
            row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        yield row


def load_cases() -> ModuleType:
    """tests/kernels/triton/cases.py. Its references are torch code, so they do without the built CPU kernels."""
    name = "localmoe.kernels._cpu"
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        sys.modules[name] = ModuleType(name)
    path = ROOT / "tests/kernels/triton/cases.py"
    spec = importlib.util.spec_from_file_location("triton_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def matvec(bench: Bench) -> Iterator[dict[str, Any]]:
    from localmoe.kernels.triton import matvec as kernel
    from localmoe.kernels.triton.launch import launch_for

    launch, most = launch_for(bench.device), device_gbps(bench)
    for name, height, width in bench.sizes.matrices:
        for form in FORMS:
            parts = matrix_copies(bench, form, height, width)
            for rows in bench.sizes.rows:
                x, out = bench.random(rows, width), bench.random(rows, height)

                def run(x: Tensor = x, out: Tensor = out, parts: list[Any] = parts) -> None:
                    for part in parts:
                        kernel.matvec(x, part, out, launch)

                took = bench.eager_and_graph(run, out, len(parts))
                yield {"matrix": name, "form": form, "rows": rows} | shares(took, parts[0].nbytes, most)


def shares(took: dict[str, Any], nbytes: float, most: float) -> dict[str, Any]:
    """GB/s and the share of the device's bandwidth, of the graph where there is one."""
    gbps = nbytes / ((took["graph_us"] or took["eager_us"]) * 1e3)
    return took | {"gbps": gbps, "share": gbps / most}


def matmul(bench: Bench) -> Iterator[dict[str, Any]]:
    """Beside it torch's own product of bf16 matrices, which reads no packed weights."""
    from localmoe.kernels.triton import matmul as kernel
    from localmoe.kernels.triton.launch import launch_for

    launch = launch_for(bench.device)
    for height, width in bench.sizes.products:
        for form in (*FORMS, "torch bf16"):
            parts = matrix_copies(bench, "bf16" if form == "torch bf16" else form, height, width)[:8]
            for tokens in bench.sizes.tokens:
                x, out = bench.random(tokens, width), bench.random(tokens, height)
                if form == "torch bf16":
                    x, out = x.bfloat16(), out.bfloat16()

                def run(x: Tensor = x, out: Tensor = out, form: str = form, parts: list[Any] = parts) -> None:
                    for part in parts:
                        if form == "torch bf16":
                            torch.matmul(x, part.values.T, out=out)
                        else:
                            kernel.matmul(x, part, out, launch)

                took = bench.eager_and_graph(run, out, len(parts))
                if form == "torch bf16":
                    took.pop("error", None)  # cuBLAS may choose another algorithm in a graph
                tflops = 2 * tokens * height * width / ((took["graph_us"] or took["eager_us"]) * 1e6)
                yield {"shape": f"{height}x{width}", "form": form, "tokens": tokens} | took | {"tflops": tflops}


def experts(bench: Bench) -> Iterator[dict[str, Any]]:
    """gate, up and down of the experts chosen at random, all on the card. Bytes: of the distinct ones."""
    from localmoe.kernels.triton.launch import launch_for

    launch, most = launch_for(bench.device), device_gbps(bench)
    for form in FORMS:
        stacks = expert_stacks(bench, form)
        one = sum(matrix.nbytes for matrix in (stacks[0].gate, stacks[0].up, stacks[0].down)) / bench.sizes.experts[0]
        for rows in bench.sizes.rows:
            run, out, calls, distinct = expert_calls(bench, stacks, rows)
            took = bench.eager_and_graph(partial(run, launch), out, calls)
            row = {"form": form, "rows": rows, "distinct": distinct}
            yield row | shares(took, one * distinct, most)


def expert_stacks(bench: Bench, form: str) -> list[Any]:
    """A layer's experts, twice."""
    from localmoe.kernels.triton.experts import ExpertStack

    count, _, hidden, width = bench.sizes.experts
    slots = torch.arange(count, dtype=torch.int32, device=bench.device)
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    return [ExpertStack(*(bench.matrix(form, *shape, count) for shape in shapes), slots) for _ in range(2)]


def expert_calls(bench: Bench, stacks: list[Any], rows: int) -> tuple[Callable[[Launch], None], Tensor, int, float]:
    """A sweep of calls of some rows, its result, the number of calls and of distinct experts a call."""
    from localmoe.kernels.triton.experts import add_experts

    count, top, hidden, width = bench.sizes.experts
    calls = 2 * max(1, count // (2 * top)) if bench.on_gpu else 2
    # one row's calls on a stack share no expert, as long as there are enough
    order = [torch.randperm(count) for _ in range(rows * 2)]
    ids, distinct = [], 0
    for call in range(calls):
        at = call // 2 * top
        chosen = torch.stack([order[2 * row + call % 2].roll(-at)[:top] for row in range(rows)])
        distinct += len(chosen.unique())
        ids.append(chosen.int().to(bench.device))
    x, out = bench.random(rows, hidden), bench.random(rows, hidden)
    weights, room = bench.random(rows, top), bench.random(rows * top, width)

    def run(launch: Launch) -> None:
        for call, chosen in enumerate(ids):
            add_experts(x, stacks[call % 2], chosen, weights, room, out, launch)

    return run, out, calls, distinct / calls


def decode(bench: Bench) -> Iterator[dict[str, Any]]:
    """One row's attention over the latent cache. Bytes: the cache's rows once, whatever the number of heads."""
    from localmoe.kernels.triton.launch import launch_for
    from localmoe.kernels.triton.mla_decode import new_workspace

    launch, most = launch_for(bench.device), device_gbps(bench)
    for context in bench.sizes.contexts:
        for form in ("bf16", "int8"):
            caches = latent_caches(bench, form, context)
            for heads in bench.sizes.heads:
                room = new_workspace(1, heads, bench.sizes.latent[0], launch, bench.device)
                run, out = attention_calls(bench, caches, context, heads)
                took = bench.eager_and_graph(partial(run, launch, room), out, len(caches))
                row = {"context": context, "cache": form, "heads": heads}
                yield row | shares(took, caches[0].nbytes, most)


def attention_calls(
    bench: Bench, caches: list[Tensor], context: int, heads: int
) -> tuple[Callable[[Launch, DecodeWorkspace], None], Tensor]:
    """A sweep over the caches, and its last result."""
    from localmoe.kernels.triton.mla_decode import attend

    rank, rope, nope = bench.sizes.latent
    q_latent, q = bench.random(1, heads, rank), bench.random(1, heads, nope + rope)
    start = torch.tensor([context - 1], dtype=torch.int32, device=bench.device)
    out = torch.empty_like(q_latent)

    def run(launch: Launch, room: DecodeWorkspace) -> None:
        for cache in caches:
            attend(q_latent, q, cache, start, room, out, launch, nope=nope, scale=0.05)

    return run, out


def latent_caches(bench: Bench, form: str, context: int) -> list[Tensor]:
    """Random rows, as many caches as a sweep needs."""
    from localmoe.model.kv_cache import pack_int8
    from localmoe.model.sizes import card_cache_bytes

    rank, rope, _ = bench.sizes.latent
    rows = bench.random(context, rank + rope)
    first = pack_int8(rows, rank) if form == "int8" else rows.bfloat16()
    stride = card_cache_bytes(first.shape[1] * first.itemsize, 1, 1) // first.itemsize  # as the engine's rows lie
    caches = torch.zeros(bench.copies(first.nbytes), context, stride, dtype=first.dtype, device=bench.device)
    caches[..., : first.shape[1]] = first
    return list(caches[..., : first.shape[1]])


def run(name: str, device: str) -> None:
    """A section's rows, printed as they come. What it raises ends the process."""
    bench = Bench(device)
    sections: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
        "environment": environment, "extension": extension, "bandwidth": bandwidth, "matvec": matvec,
        "matmul": matmul, "experts": experts, "decode": decode, "check-engine": gpu_engine.check_engine,
        "check-guesses": gpu_engine.check_guesses, "engine": gpu_engine.engine, "knobs": gpu_knobs.knobs,
        "calls": gpu_engine.calls,
    }  # fmt: skip
    rows = sections[name](bench) if name in sections else check(bench, name.removeprefix("check-"))
    for row in rows:
        print(f"ROW {json.dumps(row)}", flush=True)
