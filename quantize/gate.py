"""The end of a quantization: what it lost, measured on a held-out text before the output is called finished."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from localmoe.errors import CheckpointError, GateError, InputError, UnsupportedModelError
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.manifest import Measured
from localmoe.model.config import ModelConfig
from localmoe.model.shapes import check_checkpoint
from localmoe.text import Tokenizer
from quantize.evaluate import LayerwiseModel, evaluate
from quantize.following import FollowedModel, Following
from quantize.foreign import ForeignCheckpoint
from quantize.positions import Evaluation
from quantize.progress import Meter
from quantize.stream import one_thread_each

GATE_TEXT = Path(__file__).parent / "data" / "gate.txt"
"""Ships with the package; nothing of it is in the calibration text."""

_DIGITS = 6  # significant, of the figures in the manifest


@dataclass(frozen=True)
class Gate:
    """Measure the output; a mean divergence above `limit` (nats a token; None: any will do) is an error."""

    limit: float | None = None

    def check(self, measured: Measured | None, output: Path) -> None:
        """Raises GateError when `measured` does not pass."""
        if self.limit is None:
            return
        if measured is None or measured.kld_mean is None:
            raise GateError(f"{output}: its loss is not known, so it cannot pass --gate {self.limit:g}")
        if measured.kld_mean > self.limit:
            raise GateError(
                f"{output}: the mean KLD on the held-out text is {measured.kld_mean:.5f}, above --gate {self.limit:g}; "
                "the same command with a larger --gate, or --no-gate, takes the output as it is; "
                "--method auto or another recipe loses less"
            )


def measure(
    source: Checkpoint | Following | None, output: Checkpoint, tokens_from: Path, meter: Meter
) -> tuple[Measured | None, str]:
    """What `output` lost of `source` on the held-out text; where that cannot be measured, None and the reason.
    Without a source there is the perplexity alone; one that was followed to its end is not run again.

    `tokens_from` is the directory with the tokenizer. Raises GateError for an output that computes no numbers,
    CheckpointError for a file that ends early.
    """
    text = GATE_TEXT.read_text(encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_directory(tokens_from)
    except CheckpointError:
        return None, "the source has no usable tokenizer"
    models = [output, source] if isinstance(source, Checkpoint) else [output]
    try:
        for checkpoint in models:
            if not isinstance(checkpoint, ForeignCheckpoint):  # whose names are others'; each is checked as it is read
                check_checkpoint(ModelConfig.from_dict(checkpoint.config), checkpoint)
    except (UnsupportedModelError, CheckpointError):
        return None, "localmoe does not run this model"
    sizes = {id(model): sum(info.nbytes for info in model.tensors.values()) for model in models}
    meter.restart("measure", sum(sizes.values()))

    def model(checkpoint: Checkpoint) -> LayerwiseModel:
        size = sizes[id(checkpoint)]
        return LayerwiseModel(checkpoint, tokenizer, lambda done, layers: meter.add(size // layers, f"layer {done}"))

    try:
        with one_thread_each():
            reference = model(source) if isinstance(source, Checkpoint) else None
            if isinstance(source, Following):
                reference = FollowedModel(output, tokenizer, following=source)
            found = evaluate(model(output), text, reference=reference).summary()
    except InputError:
        return None, "the held-out text has tokens that the model does not know"
    if source is not None and not math.isfinite(found.reference_perplexity or math.inf):
        return None, "the source's own predictions of the held-out text are not finite"
    if not (math.isfinite(found.perplexity) and math.isfinite(found.kld_mean or 0.0)):
        raise GateError(f"{output.directory}: the quantized model computes no finite predictions of the held-out text")
    return measured_of(found, text), ""


def measured_of(found: Evaluation, text: str) -> Measured:
    """The figures as the manifest holds them."""

    def short(value: float | None) -> float | None:
        return None if value is None else float(f"{value:.{_DIGITS}g}")

    return Measured(
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        tokens=found.tokens,
        perplexity=float(f"{found.perplexity:.{_DIGITS}g}"),
        perplexity_error=short(found.perplexity_error),
        reference_perplexity=short(found.reference_perplexity),
        reference_perplexity_error=short(found.reference_perplexity_error),
        kld_mean=short(found.kld_mean),
        kld_error=short(found.kld_error),
        kld_median=short(found.kld_median),
        kld_p90=short(found.kld_p90),
        kld_p99=short(found.kld_p99),
        kld_max=short(found.kld_max),
        same_top1=short(found.same_top1),
    )
