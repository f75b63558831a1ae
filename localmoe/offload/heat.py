"""How often each routed expert fired: what decides which of them are on the card, kept from one run to the next."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localmoe.errors import CheckpointError
from localmoe.formats.files import write_atomically
from localmoe.formats.manifest import Manifest
from localmoe.model.config import ModelConfig

_VERSION = 1
_MOST_TOKENS = 200_000
"""What older runs count for at most: what a user does today shows after some conversations."""
_EXPERT = re.compile(r"model\.layers\.(\d{1,6})\.mlp\.experts\.(\d{1,6})\.gate_proj")
_MOST_BYTES = 16 << 20  # of a file; V3's has 15,000 numbers


class Heat:
    """Counts [L, E] float64, 0 in dense layers: in how many tokens an expert was among the chosen."""

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts

    @classmethod
    def none(cls, config: ModelConfig) -> Heat:
        """Nobody counted yet."""
        return cls(torch.zeros(config.num_hidden_layers, config.n_routed_experts, dtype=torch.float64))

    @classmethod
    def read(cls, path: Path, config: ModelConfig) -> Heat:
        """What was written there, or nothing where the file is missing, damaged or another model's: it is a hint, and
        counting begins again."""
        empty = cls.none(config)
        try:
            if path.stat().st_size > _MOST_BYTES:
                return empty
            content: Any = json.loads(path.read_bytes())
            counts = torch.tensor(content["counts"], dtype=torch.float64)
        except (OSError, ValueError, TypeError, KeyError, RecursionError, RuntimeError, OverflowError):
            return empty
        good = (
            content["version"] == _VERSION
            and counts.shape == empty.counts.shape
            and bool(torch.isfinite(counts).all() and (counts >= 0).all())
        )
        return cls(counts) if good else empty

    @classmethod
    def calibrated(cls, model: Path, config: ModelConfig) -> Heat:
        """The calibration tokens that reached each expert, as the manifest in `model` has them; nothing where there is
        no manifest or nothing was calibrated."""
        heat = cls.none(config)
        with suppress(CheckpointError):
            for name, record in Manifest.read(model).tensors.items():
                found = _EXPERT.fullmatch(name)
                if found is None or record.tokens is None:
                    continue
                layer, expert = map(int, found.groups())
                if layer < len(heat.counts) and expert < config.n_routed_experts:
                    heat.counts[layer, expert] = record.tokens
        return heat

    def write(self, path: Path) -> None:
        """Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [[round(count, 3) for count in row] for row in self.counts.tolist()]
        write_atomically(path, json.dumps({"version": _VERSION, "counts": rows}).encode())

    @property
    def tokens(self) -> float:
        """How many tokens were counted, over the experts that a token takes."""
        return float(self.counts.sum(1).max()) if self.counts.numel() else 0.0

    def plus(self, counts: Tensor) -> Heat:
        """With more counts [L, E] beside what counted before, which fades."""
        faded = min(1.0, _MOST_TOKENS / self.tokens) if self.tokens else 1.0
        return Heat(self.counts * faded + counts.double())

    def shares(self, config: ModelConfig) -> Sequence[Sequence[float]] | None:
        """Layer by layer, the part of all tokens that takes each expert, as `localmoe.offload.predict.Subject` wants
        it; None where nothing was counted. An expert that never fired may still fire: one use is taken for granted."""
        if not self.tokens:
            return None
        smoothed = self.counts + 1.0
        shares = smoothed / smoothed.sum(1, keepdim=True) * config.num_experts_per_tok
        return [row if is_moe else [] for row, is_moe in zip(shares.tolist(), config.moe_layers, strict=True)]


def known_heat(home: Path, model: Path, config: ModelConfig) -> Heat:
    """What earlier runs counted, or before the first what calibration did."""
    counted = Heat.read(heat_file(home, model), config)
    return counted if counted.tokens else Heat.calibrated(model, config)


def heat_file(home: Path, model: Path) -> Path:
    """Where a model's heat is kept: by what its config and its manifest say, not by what it is called."""
    digest = hashlib.sha256()
    for name in ("config.json", "localmoe.json"):
        try:
            content = (model / name).read_bytes()
        except OSError:
            content = b""
        digest.update(len(content).to_bytes(8, "little") + content)
    return home / "heat" / f"{digest.hexdigest()[:32]}.json"
