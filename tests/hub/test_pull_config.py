"""config.json alone: for a plan, before any download."""

from __future__ import annotations

import json

import pytest

from localmoe.errors import HubError, ModelNotFoundError, UnsupportedModelError, VerificationError
from localmoe.hub import ModelRef, cache, pull, pull_config
from localmoe.hub.verify import demo_directory

REPO = "maker/Tiny-MoE"
REF = ModelRef(REPO, None, None)


def test_one_file_is_fetched_and_found_again_without_asking(hub):
    path = pull_config(REF)
    assert json.loads(path.read_bytes())["model_type"] == "deepseek_v3"
    assert set(hub.fetched()) == {"config.json"}
    assert cache.find_snapshot(REPO) is None  # nothing pretends that the weights are here
    hub.forget_requests()
    assert pull_config(REF) == path
    assert hub.fetched() == {}


def test_a_pull_after_it_brings_the_rest(hub):
    path = pull_config(REF)
    report = pull(REF)
    assert path.parent == report.path
    assert {file.name: file.state for file in report.files}["config.json"] == "present"
    assert pull_config(REF) == path


def test_bytes_that_are_not_the_listed_ones_are_refused(hub):
    data = hub.files["config.json"]
    hub.other_bytes = {"config.json": data[:-1] + bytes([data[-1] ^ 1])}
    with pytest.raises(VerificationError, match=r"config\.json of maker/Tiny-MoE does not have the hash"):
        pull_config(REF)
    assert cache.find_config(REPO) is None


def test_offline_says_what_is_missing(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set and the config\.json of maker/Tiny-MoE is not here"):
        pull_config(REF)


def test_the_demo_and_what_is_refused_ask_nobody(hub, refused_model):
    assert pull_config(ModelRef("demo", None, None)) == demo_directory() / "config.json"
    with pytest.raises(UnsupportedModelError, match="secret"):
        pull_config(ModelRef(refused_model, None, None))
    with pytest.raises(ModelNotFoundError, match="not a repository"):
        pull_config(ModelRef("my-own-name", None, None))
    assert hub.fetched() == {}
