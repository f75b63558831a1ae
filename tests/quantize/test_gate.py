"""The end of a quantization: what was lost is measured, written down, and may be too much."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import localmoe
from localmoe import store
from localmoe.cli import show
from localmoe.errors import GateError
from localmoe.formats.manifest import Manifest
from quantize import gate as gating
from quantize import stream
from quantize.calibration import DEFAULT_TEXT
from quantize.evaluate import evaluate
from quantize.gate import GATE_TEXT, Gate
from quantize.pipeline import quantize
from quantize.progress import Progress


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_figures_are_those_of_the_reference_engine(demo: Path, demo_artifacts: Callable[..., Path]) -> None:
    directory = demo_artifacts("balanced")
    measured = Manifest.read(directory).measured
    assert measured is not None
    text = GATE_TEXT.read_text()
    with localmoe.load(directory, kernels="reference") as engine, localmoe.load(demo, kernels="reference") as source:
        wanted = evaluate(engine, text, reference=source).summary()
    assert measured.tokens == wanted.tokens > 1500
    for name in ("perplexity", "perplexity_error", "reference_perplexity", "kld_mean", "kld_error", "kld_p99"):
        assert getattr(measured, name) == pytest.approx(getattr(wanted, name), rel=1e-3), name
    assert measured.same_top1 == pytest.approx(wanted.same_top1, abs=2e-3)


def test_nothing_held_out_is_calibrated_on() -> None:
    words = [re.findall(r"\w+", path.read_text().lower()) for path in (GATE_TEXT, DEFAULT_TEXT)]
    runs = [{tuple(some[at : at + 6]) for at in range(len(some) - 5)} for some in words]
    assert len(runs[0]) > 900
    assert not runs[0] & runs[1]


def test_what_fails_the_gate_has_no_manifest_and_is_finished_later(demo: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with pytest.raises(GateError, match=r"mean KLD on the held-out text is 0\.0[0-9]+, above --gate 0\.001"):
        quantize(demo, output, "balanced", gate=Gate(0.001))
    assert {path.name for path in output.iterdir()} == {"localmoe.journal", "model.safetensors.partial"}
    report = quantize(demo, output, "balanced", gate=Gate(0.05))
    assert report.resumed_bytes == report.source_bytes
    again = quantize(demo, output, "balanced", gate=Gate(0.05))
    assert again.already_there
    before = contents(output)
    with pytest.raises(GateError, match=r"above --gate 0\.001"):
        quantize(demo, output, "balanced", gate=Gate(0.001))
    assert contents(output) == before


def test_an_interruption_while_measuring_gives_the_same_bytes(
    demo: Path, demo_artifacts: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(step: Progress) -> None:
        if step.stage == "measure" and step.item == "layer 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(demo, tmp_path / "output", "balanced", progress=interrupt)
    assert not (tmp_path / "output" / "README.md").exists()
    monkeypatch.setattr(stream, "_MOST_WORKERS", 1)
    torch.set_num_threads(2)
    quantize(demo, tmp_path / "output", "balanced")
    assert contents(tmp_path / "output") == contents(demo_artifacts("balanced"))


def test_without_the_gate_nothing_is_measured(demo: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        manifest = quantize(demo, tmp_path / "output", "experts-only", gate=None).manifest
    finally:
        os.umask(before)
    assert manifest.measured is None
    assert any("--no-gate was given" in note for note in manifest.notes)
    assert "Not measured." in (tmp_path / "output" / "README.md").read_text()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "output").iterdir()} == {0o644}
    assert quantize(demo, tmp_path / "output", "experts-only").already_there
    with pytest.raises(GateError, match="its loss is not known"):
        quantize(demo, tmp_path / "output", "experts-only", gate=Gate(1))


def test_a_source_that_cannot_be_measured_says_why(make_source: Callable[..., Path], tmp_path: Path) -> None:
    source = make_source()
    manifest = quantize(source, tmp_path / "output", "balanced").manifest
    assert manifest.measured is None
    assert any("no usable tokenizer" in note for note in manifest.notes)
    with pytest.raises(GateError, match="its loss is not known"):
        quantize(source, tmp_path / "other", "balanced", gate=Gate(1))
    assert not (tmp_path / "other" / "localmoe.json").exists()


def test_an_output_that_computes_no_numbers_never_passes(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = gating.evaluate

    def broken(*arguments, **options):  # type: ignore[no-untyped-def]
        found = honest(*arguments, **options)
        found.kld[0] = found.nll[0] = torch.nan
        return found

    monkeypatch.setattr(gating, "evaluate", broken)
    with pytest.raises(GateError, match="no finite predictions"):
        quantize(demo, tmp_path / "output", "balanced")
    assert not (tmp_path / "output" / "localmoe.json").exists()


def test_the_card_and_show_say_what_was_lost(demo_artifacts: Callable[..., Path]) -> None:
    directory = demo_artifacts("balanced")
    manifest = Manifest.read(directory)
    assert manifest.measured is not None
    text = (directory / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head == {"library_name": "transformers", "tags": ["localmoe", "compressed-tensors"]}
    for fact in (
        f"{manifest.measured.kld_mean:.5f} +- {manifest.measured.kld_error:.5f}",
        f"{manifest.totals.bytes:,} bytes, 7.51 bits a weight",
        "240 int4-g32, 42 int8-g32",
        f"{manifest.measured.same_top1:.2%}",
        "localmoe run DIR",
    ):
        assert fact in text
    assert "README.md" in manifest.files
    shown = show.as_text(show.describe(store.resolve(str(directory))))
    assert f"mean KLD {manifest.measured.kld_mean:.5f} +- " in shown
