"""Compile kernels to cubins and print what they take, a JSON object a line. Needs no GPU. Shapes are V2-Lite's.

    python tests/kernels/triton/cubins.py "matvec int4@80" norm@120     these kernels for these compute capabilities
    python tests/kernels/triton/cubins.py all                           every kernel for every one: two minutes
    python tests/kernels/triton/cubins.py all --table                   the same as a table

A program of its own because TRITON_INTERPRET, which the tests set, must not be.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from localmoe.kernels.triton import absorb, experts, grouped, latent, launch, matmul, matvec, mla_decode, norm, router
from localmoe.kernels.triton.weights import stack_knobs, vector_knobs

WEIGHTS = {0: ("*bf16", "*fp32"), 1: ("*i32", "*bf16"), 2: ("*i64", "*bf16"), 3: ("*i32", "*fp32")}  # by kind
FORMS = ("bf16", "int4", "int8", "nf4")  # as the kernels number them
CAPABILITIES = (80, 86, 89, 90, 120)
POINTERS = {
    "order": "*i32", "block_expert": "*i32", "block_start": "*i32", "block_count": "*i32", "expert_ids": "*i32",
    "slots": "*i32", "start": "*i32", "cache_bytes": "*u8", "counts": "*i32",
}  # fmt: skip
INTEGERS = {"length", "height", "width", "tokens", "heads", "top"}


def signature(kernel: Any, constants: dict[str, Any], kind: int) -> dict[str, str]:
    """The type of every argument, from its name."""
    values, scales = WEIGHTS[kind]
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in INTEGERS or name.endswith("_stride"):
            types[name] = "i32"
        elif name in ("epsilon", "scale", "factor"):
            types[name] = "fp32"
        elif name in ("values", "gate", "up", "down"):
            types[name] = values
        elif name.endswith("scales"):
            types[name] = scales
        else:
            types[name] = POINTERS.get(name, "*bf16" if name == "cache" else "*fp32")
    return types


def cases() -> list[tuple[str, Any, dict[str, Any], int, int, int]]:
    """Name, kernel, constants, kind of weights, warps, stages."""
    knobs = launch.Launch()
    tile = {
        "BLOCK_M": knobs.matmul_tokens,
        "BLOCK_N": knobs.matmul_rows,
        "BLOCK_K": knobs.matmul_columns,
        "DOT": tl.bfloat16,
    }
    heads = {
        "RANK": 512, "NOPE": 128, "ROPE": 64, "SPLITS": 128, "BLOCK_H": 16, "BLOCK_S": knobs.decode_keys,
        "BLOCK_R": 512, "BLOCK_P": 64, "DOT": tl.bfloat16,
    }  # fmt: skip
    route = {
        "COUNT": 256, "TOP": 8, "GROUPS": 8, "TOP_GROUPS": 4, "SIGMOID": True, "BIASED": True, "NORMALISE": True,
        "SCALE": True, "COUNTED": True, "BLOCK": 256, "TOP_BLOCK": 8,
    }  # fmt: skip
    store = {"RANK": 512, "NOPE": 128, "ROPE": 64, "BLOCK_R": 512, "BLOCK_P": 32}
    merge = {"RANK": 512, "SPLITS": 128, "OCTETS": True, "BLOCK_S": knobs.decode_keys, "BLOCK_R": 32}
    merge |= {"BLOCK_N": 128, "BLOCK_M": 64}
    pair = tile | {"BLOCK_K": knobs.grouped_columns}
    head = {"NOPE": 128, "VALUE": 128}
    folded = head | {"ROPE": 64, "BLOCK_N": knobs.fold_rows, "BLOCK_K": knobs.fold_columns}
    one, six = ({"FRESH": top == 1, "TOP": top, "TOP_BLOCK": block} for top, block in ((1, 1), (6, 8)))
    unfolded = head | {"OCTETS": True}
    mm = (knobs.matmul_warps, knobs.matmul_stages)
    forms = [(name, kind, {"KIND": kind, "GROUP": 64 if kind == 3 else 32}) for kind, name in enumerate(FORMS)]
    caches = (("bf16", {"PACKED": False}), ("int8", {"PACKED": True}))
    stages = {"bf16": knobs.decode_stages, "int8": knobs.decode_stages_int8}

    def vectors(
        name: str, kernel: Any, kind: int, constants: dict[str, Any], blocks: dict[str, int] | None = None
    ) -> tuple[str, Any, dict[str, Any], int, int, int]:
        """A kernel of a few vectors."""
        blocks = blocks or vector_knobs(kind, knobs)
        warps = blocks.pop("num_warps")
        return name, kernel, forms[kind][2] | constants | blocks, kind, warps, 3

    return [
        *(vectors(f"matvec {name}", matvec.matvec_kernel, k, {"ADD": True}) for name, k, _ in forms),
        *((f"matmul {name}", matmul.matmul_kernel, form | tile, k, *mm) for name, k, form in forms),
        *(vectors(f"gate and up {name}", experts.gate_up_kernel, k, {"OCTETS": k > 0}) for name, k, _ in forms),
        *(vectors(f"down {name}", experts.down_kernel, k, six, stack_knobs(k, knobs, 8)) for name, k, _ in forms),
        *(vectors(f"shared down {name}", experts.down_kernel, k, one) for name, k, _ in forms),
        *(
            (f"grouped gate and up {name}", grouped.grouped_gate_up_kernel, form | pair, k, *mm)
            for name, k, form in forms
        ),
        *((f"grouped down {name}", grouped.grouped_down_kernel, form | tile, k, *mm) for name, k, form in forms),
        *(
            (f"fold {name}", absorb.fold_kernel, form | folded, k, knobs.fold_warps, 3)
            for name, k, form in forms
            if name in ("bf16", "int8")
        ),
        *(
            vectors(f"unfold {name}", absorb.unfold_kernel, k, unfolded, vector_knobs(k, knobs, knobs.unfold_columns))
            for name, k, _ in forms
            if name in ("bf16", "int8")
        ),
        ("grouped gate and up int4 g128", grouped.grouped_gate_up_kernel, {"KIND": 1, "GROUP": 128} | tile, 1, *mm),
        (
            "fold int8 g128",
            absorb.fold_kernel,
            {"KIND": 2, "GROUP": 128} | folded | {"BLOCK_K": 128},
            2,
            knobs.fold_warps,
            3,
        ),
        ("norm", norm.norm_kernel, {"ADD": True, "OCTETS": True, "BLOCK": 2048}, 0, 4, 3),
        ("router", router.router_kernel, route, 0, 1, 3),
        *((f"latents {name}", latent.latent_kernel, store | cache, 0, 4, 3) for name, cache in caches),
        *(
            (f"decode {name}", mla_decode.decode_kernel, heads | cache, 0, knobs.decode_warps, stages[name])
            for name, cache in caches
        ),
        ("merge", mla_decode.merge_kernel, merge, 0, 4, 3),
    ]


def registers(ptx: str, capability: int) -> dict[str, int | None]:
    """A thread's registers and the bytes of them spilled, as ptxas says, or None where it cannot be asked."""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin" / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    architecture = re.search(r"\.target (\w+)", ptx)
    if not ptxas.exists() or architecture is None:
        return {"registers": None, "spilled": None}
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(ptxas), "-v", f"-arch={architecture[1]}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True).stderr
    patterns = {"registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill stores"}
    found = {name: re.search(pattern, said) for name, pattern in patterns.items()}
    return {name: int(number[1]) if number else None for name, number in found.items()}


def compiled(case: tuple[str, Any, dict[str, Any], int, int, int], capability: int) -> dict[str, Any]:
    """Name, capability, bytes of the cubin and of a program's shared memory, a thread's registers, bytes spilled."""
    name, kernel, constants, kind, warps, stages = case
    types = signature(kernel, constants, kind)
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, argument in enumerate(kernel.arg_names)
        if types[argument].startswith("*") or argument in ("length", "height") or argument.endswith("_stride")
    }
    source = ASTSource(kernel, types, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    found = {"name": name, "capability": capability, "bytes": len(made.asm["cubin"])}
    return found | {"shared": made.metadata.shared} | registers(made.asm["ptx"], capability)


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a kernel a line, a capability a column, each "shared KiB / spilled bytes"."""
    lines = ["| kernel | " + " | ".join(f"{c // 10}.{c % 10}" for c in CAPABILITIES) + " |"]
    lines.append("| --- |" + " --- |" * len(CAPABILITIES))
    for name in dict.fromkeys(each["name"] for each in found):
        cells = [f"{each['shared'] / 1024:.3g} / {each['spilled']}" for each in found if each["name"] == name]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    wanted = [each for each in sys.argv[1:] if each != "--table"]
    known = {case[0]: case for case in cases()}
    if wanted == ["all"]:
        wanted = [f"{name}@{capability}" for name in known for capability in CAPABILITIES]
    found = []
    for each in wanted:
        name, _, capability = each.partition("@")
        found.append(compiled(known[name], int(capability)))
        if "--table" not in sys.argv:
            print(json.dumps(found[-1]), flush=True)
    if "--table" in sys.argv:
        print(table(found))


if __name__ == "__main__":
    main()
