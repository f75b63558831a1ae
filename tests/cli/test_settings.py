"""Sampling settings: each from the first place that has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from localmoe.cli import config_file, settings
from localmoe.cli.options import parse_size
from localmoe.errors import CheckpointError, UsageError


def write_config(text: str) -> Path:
    path = config_file.path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_greedy_when_nobody_says_anything():
    assert settings.sampling({}, "no-such-model", {}) == settings.GREEDY
    assert settings.GREEDY["temperature"] == 0


def test_flag_before_user_config_before_models_toml_before_the_checkpoint(monkeypatch):
    checkpoint = {"temperature": 0.1, "top_p": 0.1, "top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1}
    monkeypatch.setattr(settings, "advised", lambda name: {"temperature": 0.2, "top_p": 0.2, "top_k": 2})
    write_config("[sampling]\ntemperature = 0.3\ntop_p = 0.3\n")
    assert settings.sampling({"temperature": 0.4}, "x", checkpoint) == {
        "temperature": 0.4,
        "top_p": 0.3,
        "top_k": 2,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def test_models_toml_is_asked():
    assert settings.advised("deepseek-r1")["temperature"] == 0.6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sampling]\ntemp = 1\n", "has no setting 'temp'"),
        ("[sampling]\ntemperature = 'hot'\n", "'hot' is not a number"),
        ("[sampling]\ntop_p = 7\n", "top_p"),
        ("[colours]\n", "'colours' is not a setting"),
        ("sampling = 1\n", "not a table"),
        ("][", "cannot be read"),
    ],
)
def test_a_wrong_user_config_is_refused_by_name(text, message):
    path = write_config(text)
    with pytest.raises(UsageError, match=r"config\.toml") as caught:
        config_file.read()
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"do_sample": false, "temperature": 0.7}', {}),
        ('{"temperature": 0.7, "top_k": null}', {"temperature": 0.7}),
        ('{"do_sample": true, "temperature": 0.8, "top_p": 0.95}', {"temperature": 0.8, "top_p": 0.95}),
    ],
)
def test_generation_config(tmp_path, content, expected):
    (tmp_path / "generation_config.json").write_text(content)
    assert settings.from_checkpoint(tmp_path) == expected


def test_a_wrong_generation_config_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": -1}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: temperature"):
        settings.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GiB", 12 * 2**30), ("12GB", 12 * 10**9), ("1.5MiB", 3 * 2**19), ("512KiB", 2**19), ("7B", 7)],
)
def test_sizes(text, size):
    assert parse_size(text, "--ram") == size


@pytest.mark.parametrize("text", ["", "12", "12G", "12gib", "-1GiB", "0GiB", "1e3MB", "12 GiB", "GiB", "nanGB", "１GB"])
def test_sizes_are_strict(text):
    with pytest.raises(UsageError, match="--ram"):
        parse_size(text, "--ram")
