"""The source's run in steps: what is kept between two of them, and that it predicts what the source does."""

from pathlib import Path

import pytest
import torch

from localmoe.formats.checkpoint import Checkpoint, ReadingCheckpoint
from quantize.evaluate import LayerwiseModel
from quantize.following import Following, follow
from quantize.stream import one_thread_each

WINDOWS = [[0, 5, 6, 7, 8], [0, 9, 10]]


def test_a_run_in_steps_goes_on_and_predicts_what_the_source_does(demo: Path, tmp_path: Path) -> None:
    place = tmp_path / "states"
    with Checkpoint.open(demo) as checkpoint:
        with Following(checkpoint, WINDOWS, place, "one") as first:
            assert first.steps == range(6)  # the embedding and five layers
            with pytest.raises(ValueError, match="step 1 is not the next one, 0"):
                first.run(1)
            for step in range(3):
                first.run(step)
        assert place.stat().st_size >= first.states_bytes == 4 * 8 * 256
        for fingerprint, windows in (("another", WINDOWS), ("one", WINDOWS[:1])):
            assert Following(checkpoint, windows, place, fingerprint).done == 0
        with Following(checkpoint, WINDOWS, place, "one") as second, one_thread_each():
            assert second.steps == range(3, 6)
            for step in second.steps:
                second.run(step)
            found = list(second.logits())
            wanted = list(LayerwiseModel(ReadingCheckpoint.open(demo), None).predictions(WINDOWS))  # type: ignore[arg-type]
        assert all(map(torch.equal, found, wanted))
        place.write_bytes(place.read_bytes()[:-5])  # cut off: no more than not there
        assert Following(checkpoint, WINDOWS, place, "one").done == 0


def test_files_of_the_steps(demo: Path, tmp_path: Path) -> None:
    with Checkpoint.open(demo) as checkpoint, Following(checkpoint, WINDOWS, tmp_path / "states", "one") as following:
        assert {following.files(step) for step in following.steps} == {("model.safetensors",)}
        assert following.last_files() == ("model.safetensors",)


def test_what_cannot_be_run_is_not_followed(demo: Path, tmp_path: Path) -> None:
    with Checkpoint.open(demo) as checkpoint:
        assert follow(checkpoint, tmp_path, "a text", tmp_path / "states", "one") is None  # no tokenizer
        assert follow(checkpoint, demo, "", tmp_path / "states", "one") is None
        assert follow(checkpoint, demo, "a text", tmp_path / "states", "one") is not None
