"""Calibrated quantization of the demo: closer to the source, and the same bytes each time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from localmoe import store
from localmoe.cli import show
from localmoe.errors import InputError, UsageError
from localmoe.formats.manifest import Manifest
from localmoe.formats.scheme import Scheme
from quantize import calibration, stream
from quantize.calibration import DEFAULT_TEXT, WINDOW, Statistics, windows_of
from quantize.methods import choose, error_through
from quantize.pipeline import quantize
from quantize.progress import Progress


@pytest.fixture(autouse=True)
def _few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MOST_TOKENS", 3 * WINDOW)


@pytest.fixture(scope="module")
def calibrated(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("calibrated") / "auto"
    patch = pytest.MonkeyPatch()
    patch.setattr(calibration, "MOST_TOKENS", 3 * WINDOW)
    quantize(demo, output, "compact", method="auto")
    patch.undo()
    return output


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_every_int4_matrix_of_the_layers_is_calibrated(calibrated: Path) -> None:
    manifest = Manifest.read(calibrated)
    int4 = {name: record for name, record in manifest.tensors.items() if record.scheme.startswith("int4")}
    assert any(name.startswith("model.layers.5.") for name in int4), "the MTP layer too"
    assert all(record.method in ("gptq", "weighted", "mse") for record in int4.values())
    assert {record.method for record in int4.values()} >= {"gptq"}
    assert int4["model.layers.0.mlp.gate_proj"].tokens == 3 * WINDOW
    routed = [r.tokens or 0 for n, r in int4.items() if ".3.mlp.experts." in n and n.endswith("up_proj")]
    assert sum(routed) == 4 * 3 * WINDOW  # four experts a token
    assert manifest.tensors["lm_head"].method is None
    assert manifest.settings.calibration is not None


def test_show_names_the_method_and_the_rarest_expert(calibrated: Path) -> None:
    shown = show.describe(store.resolve(str(calibrated)))
    manifest = Manifest.read(calibrated)
    assert shown.calibration is not None
    assert shown.calibration.method == "auto"
    assert shown.calibration.rounded.keys() <= {"gptq", "weighted", "mse"}
    assert sum(shown.calibration.rounded.values()) == sum(r.method is not None for r in manifest.tensors.values())
    seen = [r.tokens for n, r in manifest.tensors.items() if ".mlp.experts." in n and r.tokens is not None]
    assert shown.calibration.rarest_expert_tokens == min(seen)
    assert manifest.tensors[f"{shown.calibration.rarest_expert}.up_proj"].tokens == min(seen)
    text = show.as_text(shown)
    assert f"auto, on text {shown.calibration.text_sha256[:12]}; matrices rounded by gptq " in text
    assert f"{shown.calibration.rarest_expert}, {min(seen):,} tokens of that text" in text


def test_an_interruption_and_one_core_give_the_same_bytes(
    calibrated: Path, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_MOST_WORKERS", 1)
    count = 0

    def interrupt(step: Progress) -> None:
        nonlocal count
        count += 1
        if count == 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(demo, tmp_path / "output", "compact", method="auto", progress=interrupt)
    assert not (tmp_path / "output" / "localmoe.json").exists()
    quantize(demo, tmp_path / "output", "compact", method="auto")
    assert contents(tmp_path / "output") == contents(calibrated)


def test_another_text_is_another_output(calibrated: Path, demo: Path) -> None:
    with pytest.raises(UsageError, match="holds another output"):
        quantize(demo, calibrated, "compact", method="auto", calibration_text="x" * 9000)


@pytest.mark.parametrize("tokens", [0, 8, 400])
def test_auto_is_never_worse_than_rounding_on_the_calibration_inputs(tokens: int) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(48, 128, generator=generator)
    inputs = torch.randn(tokens, 128, generator=generator) * torch.rand(128, generator=generator) ** 3
    statistics = Statistics(tokens, inputs.T @ inputs)
    auto, rtn = (choose(weight, Scheme("int4", 32), statistics, method) for method in ("auto", "rtn"))
    assert auto.output_error <= rtn.output_error
    assert auto.method in {0: ("mse",), 8: ("mse", "weighted"), 400: ("gptq",)}[tokens]


def test_the_error_through_the_inputs() -> None:
    generator = torch.Generator().manual_seed(4)
    matrix, inputs = torch.randn(600, 300, generator=generator), torch.randn(90, 300, generator=generator)
    exact = float((inputs.double() @ matrix.double().T).square().sum())
    found = error_through(matrix, inputs.T @ inputs)
    assert found == pytest.approx(exact, rel=1e-5)
    enough = 0.1 * exact  # what is seen to be more than that need not be known
    assert enough < error_through(matrix, inputs.T @ inputs, enough) < 0.7 * exact


def test_texts(demo: Path, tmp_path: Path) -> None:
    assert all(len(window) == WINDOW for window in windows_of(demo, DEFAULT_TEXT.read_text()))
    with pytest.raises(InputError, match="at least 511 are needed"):
        windows_of(demo, "too short")
    with pytest.raises(UsageError, match="unknown method"):
        quantize(demo, tmp_path / "output", "compact", method="awq")  # type: ignore[arg-type]


def test_calibration_lowers_the_models_divergence(
    calibrated: Path, demo: Path, demo_artifacts: Callable[..., Path]
) -> None:
    import localmoe
    from quantize.evaluate import evaluate

    text = DEFAULT_TEXT.read_text()[-6_000:]  # beyond the windows that were used
    found = {}
    with localmoe.load(demo, kernels="reference") as reference:
        for name, path in (("auto", calibrated), ("rtn", demo_artifacts("compact"))):
            with localmoe.load(path, kernels="reference") as engine:
                found[name] = evaluate(engine, text, reference=reference).summary().kld_mean or 0.0
    assert found["auto"] < 0.9 * found["rtn"]
