"""What MODEL means, what is here, and what `rm` may delete."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from localmoe.errors import ModelNotFoundError, StorageError, UnsupportedModelError, UsageError
from localmoe.hub.verify import demo_directory
from localmoe.store import (
    RECIPES,
    ModelRef,
    artifact_dir,
    find_source,
    home,
    list_artifacts,
    list_sources,
    parse_ref,
    remove,
    resolve,
)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, an empty hub cache, an empty working directory."""
    from huggingface_hub import constants

    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def make_artifact(name: str, recipe: str, *, made: float = 1000.0, complete: bool = True) -> Path:
    path = artifact_dir(name, recipe)
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(bytes(100))
    if complete:
        tensors = {"a": {"scheme": "int4", "relative_error": 0.1}, "b": {"scheme": "int8", "relative_error": 0.02}}
        manifest = {"format": 1, "localmoe": "0.1.0", "recipe": recipe, "group_size": 32, "tensors": tensors}
        (path / "localmoe.json").write_text(json.dumps(manifest))
        os.utime(path / "localmoe.json", (made, made))
    return path


def make_source(tmp_path: Path, repo: str, *, commit: str = "c" * 40, pulled: float = 1000.0, complete: bool = True):
    path = tmp_path / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / commit
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "deepseek_v2"}')
    if complete:
        (path / "model.safetensors").write_bytes(bytes(10))
    os.utime(path, (pulled, pulled))
    return path


def test_home(monkeypatch, tmp_path):
    assert home() == tmp_path / "home"
    monkeypatch.delenv("LOCALMOE_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert home() == tmp_path / "data" / "localmoe"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert home() == Path.home() / ".local" / "share" / "localmoe"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("demo", ("demo", None)),
        ("demo:compact", ("demo", "compact")),
        ("demo:source", ("demo", "source")),
        ("deepseek-v2.5:experts-only", ("deepseek-v2.5", "experts-only")),
        ("somebody/Some-MoE", ("somebody/Some-MoE", None)),
        ("somebody/Some-MoE:nf4", ("somebody/Some-MoE", "nf4")),
        ("deepseek-ai/DeepSeek-R1", ("deepseek-r1", None)),
        ("deepseek-ai/deepseek-r1:balanced", ("deepseek-r1", "balanced")),
    ],
)
def test_names_and_endings(text, expected):
    assert parse_ref(text) == ModelRef(*expected, None)


def test_directories(tmp_path, monkeypatch):
    for text in ("/data/model", "./model", "../model", "/x:compact"):
        assert parse_ref(text) == ModelRef(Path(text).resolve().name, None, Path(text))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_ref("~/model").directory == tmp_path / "model"
    assert parse_ref(".") == ModelRef("here", None, Path())
    for name in ("out", "owner/model", "demo"):
        Path(name).mkdir(parents=True)
        (Path(name) / "config.json").touch()
    assert parse_ref("out").directory == Path("out")
    assert parse_ref("owner/model").directory == Path("owner/model")
    assert parse_ref("demo").directory is None  # models.toml comes first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("demo:compct", "did you mean :compact?"),
        (
            "demo:xyz",
            "it can be :balanced, :experts-only, :local, :compact, :smallest, :int8, :nf4, :converted, :source",
        ),
        ("demo:", "unknown ending ':'"),
        ("demo:a:b", "unknown ending"),
    ],
)
def test_an_unknown_ending_is_wrong_usage(text, message):
    with pytest.raises(UsageError) as caught:
        parse_ref(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("deepseek-v2-lite", "deepseek-v2-lite-chat"),
        ("DeepSeek-R1", "deepseek-r1"),
        ("dmeo", "did you mean demo?"),
        ("qqqqqq", "`localmoe list` shows the names"),
        ("a/../../b", "no model is called"),
        ("a\x1b[2Jb", "no model is called"),
        ("", "no model is called"),
    ],
)
def test_an_unknown_name_gets_a_hint(text, message):
    with pytest.raises(ModelNotFoundError) as caught:
        parse_ref(text)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_artifact_directories(store):
    assert artifact_dir("demo", "balanced") == store / "models" / "demo" / "balanced"
    assert artifact_dir("Owner/Name", "nf4") == store / "models" / "Owner--Name" / "nf4"
    with pytest.raises(UsageError, match="unknown recipe"):
        artifact_dir("demo", "../../x")
    for name in ("..", ".", "a/b/c", "../a", "a--b", "", "/etc", "a\n"):
        with pytest.raises(UsageError):
            artifact_dir(name, "balanced")


def test_the_demo_is_always_here():
    found = resolve("demo")
    assert (found.name, found.kind, found.recipe, found.path) == ("demo", "source", None, demo_directory())
    assert find_source("demo") == demo_directory()


def test_a_bare_name_is_balanced_else_the_newest_else_the_source():
    make_artifact("demo", "nf4", made=2000)
    make_artifact("demo", "compact", made=3000)
    assert resolve("demo").recipe == "compact"
    make_artifact("demo", "experts-only", made=9000, complete=False)
    assert resolve("demo").recipe == "compact"
    path = make_artifact("demo", "balanced", made=1000)
    found = resolve("demo")
    assert (found.kind, found.recipe, found.path) == ("artifact", "balanced", path)
    assert resolve("demo:nf4").recipe == "nf4"
    assert resolve("demo:source").kind == "source"


def test_a_directory_is_what_its_manifest_says(tmp_path):
    artifact = make_artifact("demo", "compact")
    found = resolve(str(artifact))
    assert (found.kind, found.recipe, found.path) == ("artifact", "compact", artifact)
    assert resolve(str(demo_directory())).kind == "source"
    with pytest.raises(ModelNotFoundError, match="is not a directory"):
        resolve("/nowhere/at/all")
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        resolve(str(tmp_path))


def test_a_model_that_is_not_here_says_what_to_type(tmp_path):
    def message(text: str) -> str:
        with pytest.raises(ModelNotFoundError) as caught:
            resolve(text)
        return str(caught.value)

    name = "deepseek-v2-lite-chat"
    assert f"`localmoe pull {name}` and then `localmoe quantize {name}`" in message(name)
    assert f"`localmoe quantize {name} --recipe nf4`" in message(f"{name}:nf4")
    assert message(f"{name}:source").endswith(f"type `localmoe pull {name}`")
    assert "`localmoe pull a/b` and then `localmoe quantize a/b`" in message("a/b")
    assert message("demo:nf4") == "demo:nf4 is not made yet: type `localmoe quantize demo --recipe nf4`"
    make_source(tmp_path, "deepseek-ai/DeepSeek-V2-Lite-Chat", complete=False)
    assert "localmoe pull" in message(name)


def test_models_that_are_refused_by_name(refused_model):
    for name in (refused_model, f"{refused_model}:nf4", "moonshotai/Kimi-K2-Instruct"):
        with pytest.raises(UnsupportedModelError, match="secret"):
            resolve(name)


def test_a_pulled_source_is_found_by_name_and_by_id(tmp_path):
    older = make_source(tmp_path, "deepseek-ai/DeepSeek-V2-Lite-Chat", commit="d" * 40, pulled=1000)
    newer = make_source(tmp_path, "deepseek-ai/DeepSeek-V2-Lite-Chat", commit="c" * 40, pulled=2000)
    make_source(tmp_path, "deepseek-ai/DeepSeek-V2-Lite-Chat", commit="e" * 40, pulled=3000, complete=False)
    assert resolve("deepseek-v2-lite-chat").path == newer
    assert resolve("deepseek-ai/DeepSeek-V2-Lite-Chat:source").path == newer
    os.utime(older, (5000, 5000))
    assert resolve("deepseek-v2-lite-chat").path == older


def test_a_name_of_ones_own_that_was_quantized():
    make_artifact("my-model", "compact")
    assert resolve("my-model").recipe == "compact"
    with pytest.raises(ModelNotFoundError, match="my-model:nf4 is not on this machine"):
        resolve("my-model:nf4")


def test_the_list(tmp_path, store):
    assert list_artifacts() == []
    make_artifact("demo", "balanced")
    make_artifact("Owner/Name", "nf4", complete=False)
    (store / "models" / "notes").mkdir()
    (store / "models" / "a file").touch()
    (store / "models" / "demo" / "elsewhere").mkdir()
    unfinished, demo = list_artifacts()
    assert (demo.name, demo.recipe, demo.complete, demo.group_size, demo.version) == (
        "demo", "balanced", True, 32, "0.1.0",
    )  # fmt: skip
    assert demo.mean_relative_error == pytest.approx(0.06)
    assert demo.size_bytes == sum(file.stat().st_size for file in demo.path.iterdir()) > 100
    assert (unfinished.name, unfinished.recipe, unfinished.complete, unfinished.group_size) == (
        "Owner/Name", "nf4", False, None,
    )  # fmt: skip

    make_source(tmp_path, "deepseek-ai/DeepSeek-R1")
    make_source(tmp_path, "some/Other")
    llama = make_source(tmp_path, "meta/Llama")
    (llama / "config.json").write_text('{"model_type": "llama"}')
    assert [source.name for source in list_sources()] == ["demo", "deepseek-r1", "some/Other"]


@pytest.mark.parametrize("manifest", ["", "[]", '{"group_size": "x", "localmoe": 3, "tensors": [1]}', "[" * 100_000])
def test_a_damaged_manifest_does_not_break_the_list(manifest):
    path = make_artifact("demo", "balanced")
    (path / "localmoe.json").write_text(manifest)
    (artifact,) = list_artifacts()
    assert (artifact.group_size, artifact.version, artifact.mean_relative_error) == (None, None, None)


def test_the_list_while_files_are_renamed_and_deleted(monkeypatch):
    path = make_artifact("demo", "balanced", complete=False)
    (path / "model-2.safetensors.partial").write_bytes(bytes(50))
    plain = Path.stat

    def renames(self, **options):
        """Whoever looks at a file of quantize's looks just before it gets its last name."""
        status = plain(self, **options)
        if self.suffix == ".partial":
            self.rename(self.with_suffix(""))
        return status

    monkeypatch.setattr(Path, "stat", renames)
    (artifact,) = list_artifacts()
    assert artifact.size_bytes == 152
    monkeypatch.setattr("localmoe.store._read_manifest", lambda path: shutil.rmtree(path) or {})
    (artifact,) = list_artifacts()
    assert (artifact.size_bytes, artifact.complete) == (0, False)


def test_rm_one_artifact():
    kept = make_artifact("demo", "balanced")
    gone = make_artifact("demo", "nf4")
    assert remove(parse_ref("demo:nf4")) == [gone]
    assert (kept.exists(), gone.exists()) == (True, False)
    assert remove(parse_ref("demo")) == [kept]
    assert not kept.parent.exists()


def test_rm_finishes_what_was_interrupted(store, monkeypatch):
    path = make_artifact("demo", "nf4")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            remove(parse_ref("demo:nf4"))
    assert not path.exists()
    assert list_artifacts() == []
    assert (store / "models" / ".removing" / "model.safetensors").exists()
    make_artifact("demo", "compact")
    remove(parse_ref("demo:compact"))
    assert list((store / "models").iterdir()) == []


def _interrupted(path):
    raise KeyboardInterrupt


def test_rm_of_several_needs_a_word():
    for recipe in RECIPES[:2]:
        make_artifact("demo", recipe)
    with pytest.raises(UsageError, match=r"demo:balanced, demo:experts-only.*--all"):
        remove(parse_ref("demo"))
    with pytest.raises(UsageError, match="without an ending"):
        remove(parse_ref("demo:balanced"), all=True)
    assert len(list_artifacts()) == 2
    (gone,) = remove(parse_ref("demo"), all=True)
    assert not gone.exists()
    assert list_artifacts() == []


def test_rm_of_nothing():
    for text, all_of_it in (("demo", False), ("demo", True), ("demo:nf4", False), ("a/b", False)):
        with pytest.raises(ModelNotFoundError, match="there is no artifact"):
            remove(parse_ref(text), all=all_of_it)


def test_rm_leaves_sources_and_directories_alone(tmp_path):
    source = make_source(tmp_path, "deepseek-ai/DeepSeek-R1")
    with pytest.raises(UsageError, match="hf cache rm model/deepseek-ai/DeepSeek-R1"):
        remove(parse_ref("deepseek-r1:source"))
    with pytest.raises(UsageError, match="a part of localmoe"):
        remove(parse_ref("demo:source"))
    with pytest.raises(UsageError, match="not in the store"):
        remove(parse_ref(str(source)))
    assert (source / "model.safetensors").exists()
    for name in ("..", "../..", "", ".", "/etc"):
        with pytest.raises(UsageError):
            remove(ModelRef(name, None, None), all=True)


def test_rm_does_not_follow_links(tmp_path, store):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "localmoe.json").write_text("{}")
    inside = make_artifact("demo", "nf4")
    (inside / "link").symlink_to(precious, target_is_directory=True)
    (inside / "file-link").symlink_to(precious / "localmoe.json")
    remove(parse_ref("demo:nf4"))
    assert not inside.exists()

    (store / "models" / "demo").mkdir(exist_ok=True)
    (store / "models" / "demo" / "compact").symlink_to(precious, target_is_directory=True)
    with pytest.raises(StorageError, match="a link"):
        remove(parse_ref("demo:compact"))
    remove(parse_ref("demo"), all=True)  # the link goes, what it points to stays
    assert not (store / "models" / "demo").exists()
    (store / "models" / "a--b").symlink_to(precious, target_is_directory=True)
    with pytest.raises(StorageError, match="a link"):
        remove(parse_ref("a/b"), all=True)
    assert (precious / "localmoe.json").read_text() == "{}"


def test_a_store_on_another_disk_behind_a_link(tmp_path, store):
    (tmp_path / "disk").mkdir()
    store.mkdir()
    (store / "models").symlink_to(tmp_path / "disk", target_is_directory=True)
    path = make_artifact("demo", "balanced")
    assert resolve("demo").path == path
    remove(parse_ref("demo"))
    assert not (tmp_path / "disk" / "demo").exists()
