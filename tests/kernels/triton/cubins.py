"""Compile the kernels to cubins of the compute capabilities named, and print what they take, as JSON.

Run as a program of its own, without TRITON_INTERPRET: needs no GPU. Shapes are V2-Lite's.
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

from localmoe.kernels.triton import experts, latent, launch, matmul, matvec, mla_decode, norm, router

WEIGHTS = {0: ("*bf16", "*fp32"), 1: ("*i32", "*bf16"), 2: ("*i64", "*bf16"), 3: ("*i32", "*fp32")}  # by kind
POINTERS = {"expert_ids": "*i32", "slots": "*i32", "start": "*i32", "cache_bytes": "*u8"}
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
    vector = {"BLOCK_N": knobs.matvec_rows, "BLOCK_K": knobs.matvec_columns}
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
    form = {"KIND": 1, "GROUP": 32}
    route = {
        "COUNT": 256, "TOP": 8, "GROUPS": 8, "TOP_GROUPS": 4, "SIGMOID": True, "BIASED": True, "NORMALISE": True,
        "SCALE": True, "BLOCK": 256, "TOP_BLOCK": 8,
    }  # fmt: skip
    store = {"RANK": 512, "NOPE": 128, "ROPE": 64, "BLOCK_R": 512, "BLOCK_P": 32}
    merge = {"RANK": 512, "SPLITS": 128, "BLOCK_S": knobs.decode_keys, "BLOCK_R": 512}
    mv, mm = (knobs.matvec_warps, 3), (knobs.matmul_warps, knobs.matmul_stages)
    attention = (knobs.decode_warps, knobs.decode_stages)
    return [
        *(
            (f"matvec {k}", matvec.matvec_kernel, {"KIND": k, "GROUP": 32, "ADD": True} | vector, k, *mv)
            for k in (1, 2)
        ),
        *((f"matmul {k}", matmul.matmul_kernel, {"KIND": k, "GROUP": 32} | tile, k, *mm) for k in (1, 2)),
        ("matvec nf4", matvec.matvec_kernel, {"KIND": 3, "GROUP": 64, "ADD": False} | vector, 3, *mv),
        ("gate and up", experts.gate_up_kernel, form | {"OCTETS": True} | vector, 1, *mv),
        ("down", experts.down_kernel, form | vector, 1, *mv),
        ("norm", norm.norm_kernel, {"ADD": True, "OCTETS": True, "BLOCK": 2048}, 0, 4, 3),
        ("router", router.router_kernel, route, 0, 1, 3),
        *((f"latent {i}", latent.latent_kernel, store | {"PACKED": bool(i)}, 0, 4, 3) for i in (0, 1)),
        *((f"decode {i}", mla_decode.decode_kernel, heads | {"PACKED": bool(i)}, 0, *attention) for i in (0, 1)),
        ("merge", mla_decode.merge_kernel, merge, 0, 4, 3),
    ]


def spilled(ptx: str, capability: int) -> int | None:
    """Bytes of registers spilled, as ptxas says, or None where it cannot be asked."""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin" / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    architecture = re.search(r"\.target (\w+)", ptx)
    if not ptxas.exists() or architecture is None:
        return None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(ptxas), "-v", f"-arch={architecture[1]}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True).stderr
    found = re.search(r"(\d+) bytes spill stores", said)
    return int(found[1]) if found else None


def main() -> None:
    wanted, capabilities = sys.argv[1], [int(each) for each in sys.argv[2:]]
    for name, kernel, constants, kind, warps, stages in cases():
        if wanted not in ("all", name):
            continue
        types = signature(kernel, constants, kind)
        aligned = {
            (at,): [["tt.divisibility", 16]]
            for at, argument in enumerate(kernel.arg_names)
            if types[argument].startswith("*") or argument in ("length", "height") or argument.endswith("_stride")
        }
        for capability in capabilities:
            source = ASTSource(kernel, types, constants, aligned)
            options = {"num_warps": warps, "num_stages": stages}
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            found = {"name": name, "capability": capability, "bytes": len(made.asm["cubin"])}
            spills = spilled(made.asm["ptx"], capability)
            print(json.dumps(found | {"shared": made.metadata.shared, "spilled": spills}), flush=True)


if __name__ == "__main__":
    main()
