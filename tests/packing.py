"""Checkpoints as others pack them, built word by word: GPTQ, AWQ and compressed-tensors with zero points."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # AWQ: column c of eight lies in this nibble of its word


class Matrix:
    """u, z and s of w = (u - z) s, chosen here; `zeros` are drawn from, `wide` lets u - z reach as far as it can."""

    def __init__(self, rows: int, columns: int, group: int, bits: int, zeros: tuple[int, ...], seed: int) -> None:
        dice = np.random.default_rng(seed)
        self.bits, self.group = bits, group if group > 0 else columns
        groups = columns // self.group
        self.z = dice.choice(zeros, size=(rows, groups)).astype(np.int64)
        self.u = dice.integers(0, 1 << bits, size=(rows, columns))
        scales = torch.from_numpy(dice.uniform(0.004, 0.02, size=(rows, groups))).bfloat16()
        self.s = scales.float().numpy()

    def truth(self) -> Tensor:
        difference = self.u - np.repeat(self.z, self.group, axis=1)
        return torch.from_numpy(difference.astype(np.float32) * np.repeat(self.s, self.group, axis=1))


def words(lanes: np.ndarray, bits: int) -> Tensor:
    """[n, m] unsigned -> int32 [n, m * bits / 32], the first in the lowest bits."""
    per = 32 // bits
    total = np.zeros((lanes.shape[0], lanes.shape[1] // per), np.uint64)
    for lane in range(per):
        total |= lanes[:, lane::per].astype(np.uint64) << np.uint64(bits * lane)
    return torch.from_numpy(total.astype(np.uint32).view(np.int32).copy())


def awq_words(lanes: np.ndarray) -> Tensor:
    total = np.zeros((lanes.shape[0], lanes.shape[1] // 8), np.uint64)
    for column, nibble in enumerate(NIBBLES):
        total |= lanes[:, column::8].astype(np.uint64) << np.uint64(4 * nibble)
    return torch.from_numpy(total.astype(np.uint32).view(np.int32).copy())


def packed(packing: str, module: str, matrix: Matrix) -> dict[str, Tensor]:
    scales = torch.from_numpy(matrix.s).half()
    assert torch.equal(scales.float(), torch.from_numpy(matrix.s)), "float16 holds these bf16 numbers exactly"
    if packing == "compressed-tensors":
        return {
            f"{module}.weight_packed": words(matrix.u, matrix.bits),
            f"{module}.weight_zero_point": words(matrix.z.T.copy(), matrix.bits).T.contiguous(),
            f"{module}.weight_scale": scales,
            f"{module}.weight_shape": torch.tensor(matrix.u.shape),
        }
    if packing == "awq":
        tensors = {"qweight": awq_words(matrix.u.T.copy()), "qzeros": awq_words(matrix.z.T.copy())}
    else:
        stored = matrix.z - (packing == "gptq")  # v1 stores one less
        qweight = words(matrix.u, matrix.bits).T.contiguous()  # [I / lanes, O]
        tensors = {"qweight": qweight, "qzeros": words(stored.T.copy() % (1 << matrix.bits), matrix.bits)}
        tensors["g_idx"] = torch.arange(matrix.u.shape[1], dtype=torch.int32) // matrix.group
    tensors["scales"] = scales.T.contiguous()
    return {f"{module}.{name}": tensor for name, tensor in tensors.items()}


def quantization_config(packing: str, group: int, bits: int) -> dict[str, Any]:
    if packing == "awq":
        return {"quant_method": "awq", "bits": bits, "group_size": group, "zero_point": True, "version": "gemm"}
    if packing == "compressed-tensors":
        weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group}
        group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        shared = {"quant_method": packing, "format": "pack-quantized", "ignore": ["lm_head"]}
        return shared | {"config_groups": {"group_0": group_0}}
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True,
        "checkpoint_format": packing,
    }  # fmt: skip


def convert_source(
    source: Path,
    packing: str,
    *,
    group: int = 32,
    bits: int = 4,
    zeros: tuple[int, ...] = (7, 8),
    changes: Mapping[str, Any] = {},  # of the quantization_config
) -> dict[str, Matrix]:
    """Replace the experts', dense and o_proj matrices of an unquantized directory by packed ones."""
    tensors = load_file(source / "model.safetensors")
    matrices = {}
    names = [name for name in sorted(tensors) if name.endswith(("gate_proj.weight", "up_proj.weight", "o_proj.weight"))]
    names += [name for name in sorted(tensors) if name.endswith("down_proj.weight")]
    for seed, name in enumerate(names):
        rows, columns = tensors.pop(name).shape
        tensors.pop(f"{name}_scale_inv", None)
        module = name.removesuffix(".weight")
        matrices[module] = Matrix(rows, columns, group, bits, zeros, seed)
        tensors |= packed(packing, module, matrices[module])
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(packing, group, bits) | dict(changes)
    (source / "config.json").write_text(json.dumps(config))
    return matrices


def pack_demo(demo: Path, source: Path, packing: str) -> dict[str, Matrix]:
    """The demo with its matrices packed by others in a new directory; what stays is bf16, as in such files."""
    source.mkdir()
    for path in demo.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if f"{name}_scale_inv" in tensors]:
        tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05)
        del tensors[f"{name}_scale_inv"]
    save_file(tensors, source / "model.safetensors")
    return convert_source(source, packing)
