"""How the kernels are launched: every knob in one table. Nothing is tuned while a model runs.

None of these was timed on a GPU yet: they are chosen so that a program's shared memory stays below the 99 KiB of
consumer cards (tests/kernels/triton/test_cubins.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Launch:
    """Rows are of the weight matrix, columns of its input."""

    matvec_rows: int = 8  # of a dense matrix times a few vectors
    matvec_columns: int = 1024
    matvec_warps: int = 4
    packed_rows: int = 4  # of a quantized one: a warp spans a row, so that no threads wait for each other
    packed_columns: int = 1024  # a thread loads 16 bytes at a time
    packed_columns_int8: int = 512
    packed_warps: int = 1
    stack_rows: int = 4  # of a token's experts' down matrices, a warp each, if dense; of quantized ones as above
    stack_columns: int = 256
    fold_rows: int = 128  # of a head's k_b: all of it in DeepSeek's models, so that no load waits for another's sum
    fold_columns: int = 64
    fold_warps: int = 4
    unfold_columns: int = 512
    matmul_tokens: int = 64
    matmul_rows: int = 64
    matmul_columns: int = 128
    grouped_columns: int = 64  # of gate and up, which are multiplied together: with 128 registers spill
    matmul_warps: int = 8
    matmul_stages: int = 2
    decode_keys: int = 32  # of the context, at a time
    decode_programs: int = 128  # split-K: shares of a row's context times blocks of heads. Changes a result's bits
    decode_warps: int = 8  # with 4 an int8 cache's kernel spills registers
    decode_stages: int = 3  # of the cache's rows on their way (cp.async) while others are multiplied
    decode_stages_int8: int = 1  # an int8 cache's rows are converted first, so they are not fetched ahead
    dot: torch.dtype = torch.bfloat16  # operands of tensor-core products; sums are float32


_DEFAULT = Launch()
_TABLE: dict[tuple[int, int], Launch] = {
    (8, 0): _DEFAULT,
    (8, 6): _DEFAULT,
    (8, 9): _DEFAULT,
    (9, 0): replace(_DEFAULT, decode_programs=132),
    (12, 0): replace(_DEFAULT, decode_programs=256),
}
# One program does the work of many: the interpreter's time goes by operations. It multiplies float32 only.
_INTERPRETER = Launch(
    matvec_rows=64,
    matvec_columns=256,
    packed_rows=64,
    packed_columns=256,
    packed_columns_int8=256,
    stack_rows=64,
    fold_columns=64,
    unfold_columns=128,
    matmul_tokens=16,
    decode_keys=16,
    decode_programs=4,
    dot=torch.float32,
)


def launch_for(device: torch.device) -> Launch:
    """The knobs for a CUDA device (an unknown one takes the nearest older one's), or the interpreter's."""
    if device.type != "cuda":
        return _INTERPRETER
    capability = torch.cuda.get_device_capability(device)
    known = [key for key in _TABLE if key <= capability]
    return _TABLE[max(known)] if known else _DEFAULT
