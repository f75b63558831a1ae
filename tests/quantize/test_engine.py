"""The CPU engine on the real demo model against the reference path on the same weights.

The engine rounds activations to int8 and the latent cache to bfloat16; the reference does neither. In this small model
that flips a close choice of experts now and then, so a few tokens make the mean of the KL divergence (0.0004 to 0.004
over 270 tokens, by recipe) and the median says what rounding itself costs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import localmoe
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.weights import DenseWeight, Int8Weight
from localmoe.load import Engine
from localmoe.model.kv_cache import LatentCache
from quantize.pipeline import quantize
from quantize.recipes import RECIPES, Recipe

MOST_IN_THE_MEAN, MOST_IN_THE_MIDDLE = 8e-3, 1e-3
PROMPT = "Tell me a story about a goat and a drum."


def assert_close(logits: Tensor, reference: Tensor) -> None:
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)  # [T]
    assert divergence.mean() < MOST_IN_THE_MEAN
    assert divergence.median() < MOST_IN_THE_MIDDLE


def token_by_token(engine: Engine, ids: list[int]) -> Tensor:
    """Logits [T, V] of decode: a pass a token."""
    model = engine.model
    cache = LatentCache(engine.config, len(ids), engine.kernels.cache_dtype)
    with torch.inference_mode():
        return torch.cat([model.forward(torch.tensor([token_id]), cache) for token_id in ids])


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_engine_is_the_reference_within_rounding(recipe: str, demo_artifacts: Callable[..., Path]) -> None:
    directory = demo_artifacts(recipe)
    with localmoe.load(directory) as engine, localmoe.load(directory, kernels="reference") as reference:
        assert engine.kernels.backend is not None
        prompt = reference.prompt_ids([{"role": "user", "content": PROMPT}])
        answer = [step.token_id for step in reference.generate(prompt, max_tokens=256)]
        ids = prompt + answer
        wanted = reference.logits(ids)
        assert_close(engine.logits(ids), wanted)
        decoded = token_by_token(engine, ids)
        assert_close(decoded, wanted)
        again = token_by_token(engine, ids)
        assert torch.equal(decoded, again), "the same bits from run to run"


def test_a_compact_model_of_before_still_runs(
    demo: Path, tmp_path: Path, demo_artifacts: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its embedding was stored as in the source."""
    kinds = {part: kind for part, kind in RECIPES["compact"].kinds.items() if part != "embedding"}
    monkeypatch.setitem(RECIPES, "compact", Recipe("compact", kinds))  # type: ignore[arg-type]  # it is a dict
    quantize(demo, tmp_path / "compact", "compact", gate=None)
    with Checkpoint.open(tmp_path / "compact") as checkpoint:
        written = checkpoint.config["quantization_config"]
        assert written["ignore"] == [r"re:.*\.mlp\.gate$", r"re:.*embed_tokens$", r"re:.*\.eh_proj$"]
        assert "model.embed_tokens.weight" in checkpoint
    ids = list(range(40, 90))
    with localmoe.load(tmp_path / "compact", threads=1) as before, localmoe.load(demo, threads=1) as source:
        assert isinstance(before.model._embedding, DenseWeight)
        assert torch.equal(before.model.embed(torch.tensor(ids)), source.model.embed(torch.tensor(ids)))
        with localmoe.load(demo_artifacts("compact"), threads=1) as now:
            assert isinstance(now.model._embedding, Int8Weight)
            assert_close(before.logits(ids), now.logits(ids))
