"""Kernels compile to machine code for the cards we name, in the shared memory that consumer cards have.

Every kernel once, spread over the cards; all for all take two minutes (`python tests/kernels/triton/cubins.py all`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MOST_SHARED = 99 << 10
WANTED = (
    "matvec bf16@80", "matvec nf4@120", "matmul int8@89", "gate and up int4@86", "down int4@90", "norm@86", "router@80",
    "latents int8@90", "decode int8@120", "decode bf16@86", "merge@89", "grouped gate and up int4@86",
    "grouped down nf4@89", "fold int8@80", "unfold bf16@120", "fold int8 g128@89", "shared down int8@86",
)  # fmt: skip


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each of WANTED takes, compiled in one process that keeps no cache."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cubins"))
    command = [sys.executable, str(Path(__file__).with_name("cubins.py")), *WANTED]
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return dict(zip(WANTED, map(json.loads, made.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", WANTED)
def test_cubin(name: str, cubins: dict[str, dict[str, Any]]) -> None:
    found = cubins[name]
    assert found["bytes"] > 0
    assert found["shared"] <= MOST_SHARED
    assert not found["spilled"]  # None where ptxas is missing
