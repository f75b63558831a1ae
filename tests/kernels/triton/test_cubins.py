"""Kernels compile to machine code for the cards we name, in the shared memory that consumer cards have.

A few a card: all for all take minutes (`python tests/kernels/triton/cubins.py all 80 86 89 90 120`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOST_SHARED = 99 << 10
MOST_SPILLED = 1024  # bytes; the matrix product and the int8 cache's attention spill a little


@pytest.mark.parametrize(
    ("capability", "name"),
    [(80, "matvec 1"), (86, "norm"), (89, "down"), (90, "latent 1"), (120, "decode 0")],
)
def test_cubin(capability: int, name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("cubins.py")), name, str(capability)]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(made.stdout)
    assert found["bytes"] > 0
    assert found["shared"] <= MOST_SHARED
    assert (found["spilled"] or 0) <= MOST_SPILLED
