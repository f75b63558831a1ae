"""The layer-by-layer run: what it reads, what it hands out, and other weights in the place of the source's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import localmoe
from localmoe.errors import InputError
from localmoe.formats.checkpoint import ReadingCheckpoint
from localmoe.formats.weights import dequantize
from quantize.layerwise import LayerByLayer, Statistics, second_moment

WINDOWS = [[0, 5, 6, 7, 8], [0, 9, 10], [0, 11]]


def moments(demo: Path, wanted: set[str], replaced: Callable[[str], Tensor | None] = lambda name: None) -> dict:
    found: dict[str, Statistics] = {}
    with ThreadPoolExecutor(2) as pool:
        model = LayerByLayer(ReadingCheckpoint.open(demo), WINDOWS, pool, wanted, replaced)
        for _ in model.advance(0, lambda name, statistics: found.setdefault(name, statistics)):
            pass
    return found


def test_windows_of_any_length_are_sequences_of_their_own(demo: Path) -> None:
    with ThreadPoolExecutor(2) as pool, localmoe.load(demo, kernels="reference") as engine:
        model = LayerByLayer(ReadingCheckpoint.open(demo), WINDOWS, pool)
        for layer in range(5):
            assert not list(model.advance(layer, lambda name, statistics: None))
        for window, logits in zip(WINDOWS, model.logits(), strict=True):
            assert torch.allclose(logits, engine.logits(window), atol=2e-3)
        assert sum(model.expert_tokens.values()) == 4 * 4 * 10  # MoE layers, experts a token, tokens


def test_what_is_quantized_is_what_the_rest_sees(demo: Path) -> None:
    layer = "model.layers.0"
    wanted = {f"{layer}.mlp.gate_proj", f"{layer}.mlp.down_proj", f"{layer}.self_attn.o_proj"}
    plain = moments(demo, wanted)
    assert plain.keys() == wanted
    assert all(statistics.tokens == 10 and statistics.hessian.abs().sum() > 0 for statistics in plain.values())
    silent = moments(demo, wanted, lambda name: torch.zeros(640, 256) if name.endswith("mlp.up_proj") else None)
    assert torch.equal(silent[f"{layer}.mlp.gate_proj"].hessian, plain[f"{layer}.mlp.gate_proj"].hessian)
    assert not silent[f"{layer}.mlp.down_proj"].hessian.any()
    deaf = moments(demo, wanted, lambda name: torch.zeros(256, 256) if name.endswith("o_proj") else None)
    assert torch.equal(deaf[f"{layer}.self_attn.o_proj"].hessian, plain[f"{layer}.self_attn.o_proj"].hessian)
    assert not torch.equal(deaf[f"{layer}.mlp.gate_proj"].hessian, plain[f"{layer}.mlp.gate_proj"].hessian)


def test_the_embedding_may_be_another_checkpoints(demo: Path, demo_artifacts: Callable[..., Path]) -> None:
    """What is calibrated after it is stored in int8 sees its error."""
    source, written = ReadingCheckpoint.open(demo), ReadingCheckpoint.open(demo_artifacts("local"))
    ids = torch.tensor([token for window in WINDOWS for token in window])
    with ThreadPoolExecutor(1) as pool:
        plain = LayerByLayer(source, WINDOWS, pool).states
        packed = LayerByLayer(source, WINDOWS, pool, embedding=written).states
    assert torch.equal(packed, dequantize(written.weight("model.embed_tokens"))[ids])
    assert 0 < (packed - plain).norm() / plain.norm() < 0.01


def test_a_run_goes_on_from_the_states_of_another(demo: Path) -> None:
    def nothing(name: str, statistics: Statistics) -> None:
        raise AssertionError(name)

    with ThreadPoolExecutor(2) as pool:
        whole = LayerByLayer(ReadingCheckpoint.open(demo), WINDOWS, pool)
        for layer in range(3):
            assert not list(whole.advance(layer, nothing))
        later = LayerByLayer(ReadingCheckpoint.open(demo), WINDOWS, pool, states=whole.states.clone())
        for layer in range(3, 5):
            assert not list(whole.advance(layer, nothing))
            assert not list(later.advance(layer, nothing))
        assert all(map(torch.equal, whole.logits(), later.logits()))


def test_second_moments_are_symmetric_and_those_of_all_rows() -> None:
    rows = torch.randn(70, 600, generator=torch.Generator().manual_seed(1))  # more columns than are computed at a time
    moment = second_moment(rows.split(32))
    assert torch.equal(moment, moment.T)
    assert torch.allclose(moment, rows.T @ rows, atol=1e-4)


def test_tokens_that_the_model_does_not_have(demo: Path) -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(InputError, match="outside the vocabulary of 4096"):
        LayerByLayer(ReadingCheckpoint.open(demo), [[0, 4096]], pool)
