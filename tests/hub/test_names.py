"""models.toml, and which names may become paths and messages."""

from __future__ import annotations

import hashlib

import pytest

from localmoe.hub import registry
from localmoe.hub.names import is_file_name, is_plain_name, is_repo_id, known_name, printable, repo_of
from localmoe.hub.verify import demo_directory

PROMISED = {
    "demo",
    "deepseek-v2-lite-chat",
    "deepseek-coder-v2-lite-instruct",
    "deepseek-v2-chat",
    "deepseek-v2.5",
    "deepseek-v3",
    "deepseek-v3-0324",
    "deepseek-v3.1",
    "deepseek-r1",
    "deepseek-r1-0528",
    "moonlight-16b-a3b-instruct",
    "kimi-k2-instruct",
    "glm-4.7-flash",
}


def test_the_models_known_by_name():
    assert set(registry()) == PROMISED
    for name, model in registry().items():
        assert name == model.name == name.lower()
        assert is_plain_name(name)
        assert model.what
        assert model.parameters
        assert model.licence
        assert model.size_bytes > 10_000_000
        assert set(model.sampling) <= {"temperature", "top_p", "top_k", "min_p"}
        assert all(0 < value <= 2 for value in model.sampling.values())
        if name != "demo":
            assert is_repo_id(model.repo)
            assert model.repo.rpartition("/")[2].lower() == name
    assert not [name for name, model in registry().items() if model.refused]


def test_sampling_that_the_makers_advise():
    assert registry()["deepseek-r1"].sampling == {"temperature": 0.6, "top_p": 0.95}
    assert registry()["deepseek-v3-0324"].sampling == {"temperature": 0.3}


def test_the_demo_is_the_one_that_models_toml_describes():
    files = registry()["demo"].files
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(files)
    for name, digest in files.items():
        assert hashlib.sha256((demo_directory() / name).read_bytes()).hexdigest() == digest
    size = sum((demo_directory() / name).stat().st_size for name in files)
    assert registry()["demo"].size_bytes == pytest.approx(size, rel=0.005)


def test_a_repository_has_one_name():
    assert known_name("deepseek-ai/DeepSeek-R1") == "deepseek-r1"
    assert known_name("Deepseek-AI/deepseek-r1") == "deepseek-r1"
    assert known_name("somebody/DeepSeek-R1") is None
    assert repo_of("deepseek-r1") == "deepseek-ai/DeepSeek-R1"
    assert repo_of("somebody/else") == "somebody/else"
    assert repo_of("demo") is None
    assert repo_of("my-directory") is None


@pytest.mark.parametrize("name", ["a/b", "deepseek-ai/DeepSeek-V2.5", "a_b/c-d.e"])
def test_repository_ids(name):
    assert is_repo_id(name)


@pytest.mark.parametrize(
    "name", ["a", "a/b/c", "../b", "a/..", "a/b..c", "a--b/c", "/b", "a/", "a/b\n", "a/ b", "-a/b", ".a/b", "ä/b", ""]
)
def test_not_repository_ids(name):
    assert not is_repo_id(name)


def test_file_names():
    assert is_file_name("model-00001-of-000163.safetensors")
    for name in ("", ".", "..", ".hidden", "a/b", "/a", "a\\b", "a b", "a\x1b", "a\n", "x" * 256):
        assert not is_file_name(name)


def test_printable_is_one_line_without_control_characters():
    text = printable("a\x1b[31mb\nc\u202ed\x00", 100)
    assert text == "a\ufffd[31mb\ufffdc\ufffdd\ufffd"
    assert printable("x" * 300) == "x" * 199 + "…"
