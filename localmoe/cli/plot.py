"""`bench --plot`: decode speed by context length, and which experts a text uses, as a picture."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmoe.cli import streams
from localmoe.errors import CheckpointError, StorageError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from localmoe.cli.options import Machine
    from localmoe.engine import Engine
    from localmoe.store import Resolved

KEYS = (
    "plot (the file), decode_by_context [{context, tokens_per_second}], expert_uses {tokens, text (false: "
    "random tokens), layers {index: [uses of each expert]}}"
)
FORMATS = (".png", ".svg", ".pdf")
_MOST_CONTEXT = 16384
_TEXT_TOKENS = 2048
_DECODED = 16


@dataclass(frozen=True)
class Charts:
    """What is drawn. `uses` are tokens by layer and expert, of `tokens` in all; `is_text`: they were of a text."""

    decode: list[tuple[int, float]]
    uses: dict[int, list[int]]
    tokens: int
    is_text: bool

    def as_json(self, path: Path) -> dict[str, Any]:
        """The keys that `bench --json` has of it."""
        return {
            "plot": str(path),
            "decode_by_context": [{"context": held, "tokens_per_second": rate} for held, rate in self.decode],
            "expert_uses": {"tokens": self.tokens, "text": self.is_text, "layers": self.uses},
        }


def check(path: Path) -> None:
    """Raises UsageError and StorageError before anything is measured: a format that is not one, no matplotlib, no
    directory."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot: {path} does not end in {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot draws with matplotlib, which is not installed: pip install 'localmoe[plot]'")
    if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise StorageError(f"--plot: {path.absolute().parent} is not a directory that can be written")


def measure(resolved: Resolved, machine: Machine, context: int) -> Charts:
    """Open the model once more and run it: timed without counting, then counting without a clock."""
    from localmoe.benchmark import decode_by_context, prefill_ids
    from localmoe.cli.opening import load_engine
    from localmoe.model.config import ModelConfig
    from localmoe.offload.counts import ExpertCounts
    from localmoe.text.files import read_json_object

    with load_engine(resolved.path, machine) as engine:
        most = max(context, _MOST_CONTEXT)
        decode = decode_by_context(engine, most, _DECODED, lambda what: streams.passing_remark(f"{what} ..."))
    streams.passing_remark("counting experts ...")
    config = ModelConfig.from_dict(read_json_object(resolved.path / "config.json"))
    counts = ExpertCounts(config.n_routed_experts)
    with load_engine(resolved.path, replace(machine, device="cpu", vram=None), counts) as engine:
        ids, is_text = _ids(engine)
        prefill_ids(engine, ids)
    return Charts(decode, counts.uses(), len(ids), is_text)


def _ids(engine: Engine) -> tuple[Tensor, bool]:
    """Tokens of the text that calibration uses, or random ones for a model without a tokenizer."""
    import torch

    from quantize.calibration import DEFAULT_TEXT

    most = min(_TEXT_TOKENS, engine.max_context)
    try:
        text = DEFAULT_TEXT.read_text(encoding="utf-8")[: 16 * most]
        return torch.tensor(engine.prompt_ids(text)[:most]), True
    except CheckpointError:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(engine.config.vocab_size, (most,), generator=generator), False


def draw(charts: Charts, title: str, path: Path) -> None:
    """Write the picture whole or not at all. Raises StorageError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    speed, heat = figure.subplots(1, 2, width_ratios=(2, 3))
    figure.suptitle(title, fontsize=10, parse_math=False)  # a directory's name may hold a $
    speed.plot(*zip(*charts.decode, strict=True), marker="o", color="#3b528b")
    speed.set(xlabel="tokens in the cache", ylabel="decode, tokens/s", title="Speed by context length")
    speed.set_xlim(left=0)
    speed.set_ylim(0, 1.1 * max(rate for _, rate in charts.decode))
    speed.grid(alpha=0.3)
    _heat_map(heat, charts)
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=".localmoe-", suffix=path.suffix)
    os.close(handle)
    try:
        figure.savefig(name)
        with open(name, "rb") as file:  # noqa: PTH123  (a name from mkstemp)
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError as error:
        raise StorageError(f"--plot: {path} cannot be written: {error.strerror or error}") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _heat_map(axes: Any, charts: Charts) -> None:
    layers = list(charts.uses)
    shares = []
    for uses in charts.uses.values():
        even = sum(uses) / len(uses) or 1.0
        shares.append([count / even for count in uses])
    what = "a text" if charts.is_text else "random tokens"
    axes.set(xlabel="expert", ylabel="layer", title=f"Experts chosen over {charts.tokens:,} tokens of {what}")
    image = axes.imshow(shares, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    step = max(1, len(layers) // 8)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.figure.colorbar(image, ax=axes, label="times the even share")
