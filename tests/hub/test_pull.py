"""`pull` through the real huggingface_hub, from a server on 127.0.0.1."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

from localmoe.errors import (
    HubError,
    LocalMoeError,
    StorageError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
)
from localmoe.hub import ModelRef, Progress, PullReport, cache, partial, pull, survey, verify_source

REPO = "maker/Tiny-MoE"
COMMIT = "a" * 40
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
SMALL = ["config.json", "tokenizer.json", "model.safetensors.index.json", "LICENSE"]
CHECKOUT = Path(__file__).parents[2]


def pull_repo(repo: str = REPO, **options) -> PullReport:
    return pull(ModelRef(repo, None, None), **options)


def states(report: PullReport) -> dict[str, str]:
    return {file.name: file.state for file in report.files}


def blob(hub, name: str) -> Path:
    return (cache.repo_directory(REPO) / "snapshots" / hub.commit / name).resolve()


def flip_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x10]))


def test_a_full_pull_brings_the_wanted_files_and_nothing_else(hub):
    seen: list[Progress] = []
    report = pull_repo(progress=seen.append)

    assert states(report) == dict.fromkeys([*SMALL, *SHARDS], "downloaded")
    assert sorted(file.name for file in report.path.iterdir()) == sorted([*SMALL, *SHARDS])
    for name in [*SMALL, *SHARDS]:
        assert (report.path / name).read_bytes() == hub.files[name]
    assert hub.fetched() == {name: [None] for name in [*SMALL, *SHARDS]}
    total = sum(len(hub.files[name]) for name in [*SMALL, *SHARDS])
    assert report.size_bytes == report.received_bytes == total == sum(hub.sent.values())
    assert (seen[-1].done_bytes, seen[-1].total_bytes) == (total, total)
    done = [progress.done_bytes for progress in seen]
    assert done == sorted(done)
    assert (report.repo, report.commit) == (REPO, COMMIT)


def test_the_token_goes_to_the_hub_and_not_to_the_cdn(hub):
    pull_repo()
    by_host = {request.host: request.authorization for request in hub.requests}
    assert by_host == {"127.0.0.1": "Bearer hf_secret", "localhost": None}


def test_the_client_finds_the_download_and_fetches_nothing_again(hub):
    from huggingface_hub import hf_hub_download, snapshot_download

    report = pull_repo()
    hub.forget_requests()
    assert Path(snapshot_download(REPO, local_files_only=True)) == report.path
    assert Path(hf_hub_download(REPO, SHARDS[0])) == report.path / SHARDS[0]
    assert hub.fetched() == {}


def test_a_download_of_the_client_is_taken_over(hub):
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    hf_hub_download(REPO, SHARDS[1])
    hub.forget_requests()
    report = pull_repo()
    assert states(report)[SHARDS[1]] == "present"
    assert SHARDS[1] not in hub.fetched()


def test_a_second_pull_checks_and_fetches_nothing(hub):
    pull_repo()
    hub.forget_requests()
    report = pull_repo()
    assert set(states(report).values()) == {"present"}
    assert report.received_bytes == 0
    assert len(hub.requests) == 1  # the listing


def test_a_renamed_repository_is_followed(hub):
    report = pull_repo("maker/Old-Name")
    assert (report.path / SHARDS[2]).read_bytes() == hub.files[SHARDS[2]]


def test_a_cut_connection_is_taken_up_within_the_run(hub):
    hub.cuts = {SHARDS[0]: [1 << 20, 1 << 19]}
    report = pull_repo()
    first, second, third = hub.fetched()[SHARDS[0]]
    assert first is None
    assert second is not None
    assert third is not None
    assert int(third[6:-1]) >= int(second[6:-1]) > 0
    assert report.received_bytes == report.size_bytes
    assert (report.path / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]


def test_a_later_run_goes_on_where_the_cut_was(hub, monkeypatch):
    monkeypatch.setattr(partial, "RETRIES", 0)
    monkeypatch.setattr("localmoe.hub.download.WORKERS", 1)
    hub.cuts = {SHARDS[1]: [2 << 20]}
    with pytest.raises(HubError, match=rf"the connection broke while downloading {SHARDS[1]}; run the same command"):
        pull_repo()
    # The client hands the bytes over in whole chunks, so the end of the last one may be lost.
    (part,) = cache.repo_directory(REPO).glob("blobs/*.incomplete")
    kept = part.stat().st_size
    assert (2 << 20) - partial.CHUNK <= kept <= 2 << 20

    hub.forget_requests()
    report = pull_repo()
    assert hub.fetched() == {SHARDS[1]: [f"bytes={kept}-"], SHARDS[2]: [None]}
    assert states(report) == {
        **dict.fromkeys([*SMALL, SHARDS[0]], "present"),
        SHARDS[1]: "resumed",
        SHARDS[2]: "downloaded",
    }
    assert hub.sent[SHARDS[1]] == (3 << 20) - kept
    assert not list(cache.repo_directory(REPO).glob("blobs/*.incomplete"))


def test_a_server_without_range_still_gives_the_right_file(hub, monkeypatch):
    hub.cuts = {SHARDS[1]: [2 << 20]}
    hub.ignores_range = True
    report = pull_repo()
    assert (report.path / SHARDS[1]).read_bytes() == hub.files[SHARDS[1]]


def test_a_damaged_part_is_thrown_away_and_fetched_whole(hub):
    pull_repo()
    part = blob(hub, SHARDS[0])
    left = part.read_bytes()[: 1 << 20]
    part.with_name(part.name + ".localmoe.incomplete").write_bytes(b"\xff" + left[1:])
    part.unlink()
    hub.forget_requests()
    report = pull_repo()
    assert hub.fetched() == {SHARDS[0]: [f"bytes={1 << 20}-", None]}
    assert (report.path / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]


@pytest.mark.parametrize("name", [SHARDS[2], "tokenizer.json"])
def test_a_flipped_byte_is_found_named_and_repaired(hub, name):
    path = pull_repo().path
    flip_a_byte(blob(hub, name))

    found = verify_source(path)
    assert [problem.file for problem in found.problems] == [name]
    with pytest.raises(VerificationError, match=name):
        found.raise_if_bad()

    hub.forget_requests()
    report = pull_repo()
    assert report.repaired == (name,)
    assert hub.fetched() == {name: [None]}
    assert (path / name).read_bytes() == hub.files[name]
    assert verify_source(path).ok


def test_a_truncated_file_is_repaired(hub):
    path = pull_repo().path
    os.truncate(blob(hub, SHARDS[0]), 1000)
    assert pull_repo().repaired == (SHARDS[0],)
    assert (path / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]


@pytest.mark.parametrize("name", [SHARDS[1], "config.json"])
def test_bytes_that_differ_from_the_listing_are_refused(hub, name):
    data = hub.files[name]
    hub.other_bytes = {name: data[:-1] + bytes([data[-1] ^ 1])}
    with pytest.raises(VerificationError, match=rf"{name} of {REPO} does not have the hash"):
        pull_repo()
    assert not (cache.repo_directory(REPO) / "snapshots" / COMMIT / name).exists()
    hub.other_bytes = {}
    assert states(pull_repo())[name] == "downloaded"


def test_a_body_that_is_too_long_is_refused(hub):
    hub.other_bytes = {SHARDS[1]: hub.files[SHARDS[1]] + b"more"}
    with pytest.raises(VerificationError, match="sent more"):
        pull_repo()


def test_a_new_commit_fetches_only_what_changed(hub):
    pull_repo()
    hub.commit = "b" * 40
    hub.files["LICENSE"] = b"other terms\n"
    hub.forget_requests()
    report = pull_repo()
    assert hub.fetched() == {"LICENSE": [None]}
    assert cache.find_snapshot(REPO) == report.path
    assert cache.find_snapshot(REPO, "main") == report.path
    assert cache.find_snapshot(REPO, COMMIT) is not None


def test_two_shards_of_the_same_content(hub):
    hub.files[SHARDS[1]] = hub.files[SHARDS[0]]
    report = pull_repo()
    assert (report.path / SHARDS[1]).read_bytes() == hub.files[SHARDS[0]]
    assert len(report.files) == len(SMALL) + 3


def test_a_second_process_at_the_same_file_is_told(hub, monkeypatch):
    from localmoe.hub.listing import ask_hub

    file = next(file for file in ask_hub(REPO, "main").files if file.name == SHARDS[0])
    path = cache.repo_directory(REPO) / "blobs" / f"{file.digest}.localmoe.incomplete"
    with partial.PartialFile(path, file, lambda count: None), pytest.raises(HubError, match="another process"):
        pull_repo()


UNSAFE = ["../../evil.safetensors", "/etc/evil.safetensors", "a/../../b.json", "evil\x1b[2J.safetensors", "..", "a\\b"]


@pytest.mark.parametrize("name", UNSAFE)
def test_an_unsafe_name_in_the_listing_refuses_the_repository(hub, name):
    hub.extra_names = [name]
    with pytest.raises(HubError, match="not safe; nothing was downloaded") as caught:
        pull_repo()
    assert str(caught.value).isprintable()
    assert hub.fetched() == {}
    assert not cache.root().exists()


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"sha": "../../../tmp/x"}, "without a commit"),
        ({"sha": None}, "without a commit"),
        ({"siblings": [{"rfilename": "config.json", "size": 3, "blobId": "../x"}]}, "without a usable size and hash"),
        ({"siblings": [{"rfilename": "config.json", "size": -3, "blobId": "a" * 40}]}, "without a usable size"),
        ({"siblings": [{"rfilename": "config.json", "blobId": "a" * 40}]}, "without a usable size"),
        ({"siblings": [{"rfilename": "README.md", "size": 3, "blobId": "a" * 40}]}, "no config.json"),
        ({"siblings": 3}, "cannot understand"),
    ],
)
def test_a_malformed_listing_is_one_line(hub, info, message):
    hub.info = info
    with pytest.raises(HubError, match=message):
        pull_repo()


def test_a_shard_that_only_the_index_knows(hub):
    del hub.files[SHARDS[1]]
    with pytest.raises(HubError, match=rf"incomplete: it has no {SHARDS[1]}"):
        pull_repo()


def test_an_architecture_we_do_not_run_is_refused_before_its_weights(hub):
    hub.files["config.json"] = b'{"model_type": "llama\\u001b[2J"}'
    with pytest.raises(UnsupportedModelError) as caught:
        pull_repo()
    assert str(caught.value).isprintable()
    assert not set(hub.fetched()) & set(SHARDS)


def test_a_repository_without_a_tokenizer_is_refused_before_anything(hub):
    del hub.files["tokenizer.json"]
    with pytest.raises(UnsupportedModelError, match=r"no tokenizer\.json and no tiktoken\.model"):
        pull_repo()
    assert hub.fetched() == {}


def with_tiktoken(hub, config: object) -> None:
    hub.files["tiktoken.model"] = hub.files.pop("tokenizer.json")
    if config is not None:
        hub.files["tokenizer_config.json"] = json.dumps(config).encode()


@pytest.mark.parametrize("module", ["tokenization_moonshot", "maker/Other--tokenization_kimi"])
def test_a_tiktoken_repository_is_pulled_without_its_code(hub, module):
    with_tiktoken(hub, {"auto_map": {"AutoTokenizer": [f"{module}.TikTokenTokenizer", None]}})
    hub.files["tokenization_moonshot.py"] = b"raise SystemExit"
    assert survey(ModelRef(REPO, None, None)).repo == REPO
    report = pull_repo()
    assert {"tiktoken.model", "tokenizer_config.json"} < set(states(report))
    assert not list(report.path.glob("*.py"))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer\x1b", None]}}, r"'tokenization_qwen.*\\x1b'"),
        ({"tokenizer_class": "TikTokenTokenizer"}, "no class"),
        (None, "no class"),
        ([1], "not a JSON object"),
    ],
)
@pytest.mark.parametrize("ask", [pull, survey], ids=["pull", "survey"])
def test_an_unknown_tiktoken_class_is_refused_by_name_before_the_weights(hub, config, named, ask):
    with_tiktoken(hub, config)
    with pytest.raises((UnsupportedModelError, HubError), match=named) as caught:
        ask(ModelRef(REPO, None, None))
    assert str(caught.value).isprintable()
    assert not set(hub.fetched()) & set(SHARDS)


def test_errors_of_the_hub_are_one_line_each(hub, monkeypatch):
    with pytest.raises(HubError, match="has no model maker/Nothing"):
        pull_repo("maker/Nothing")
    with pytest.raises(HubError, match="has no revision nowhere"):
        pull_repo(revision="nowhere")
    hub.gated = "listing"
    with pytest.raises(HubError, match="is gated: accept its terms"):
        pull_repo()
    hub.gated = "files"
    with pytest.raises(HubError, match="is gated: accept its terms"):
        pull_repo()
    hub.gated, hub.down = None, True
    with pytest.raises(HubError, match="HTTP 503"):
        pull_repo()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"cannot reach http://127\.0\.0\.1:9"):
        pull_repo()


@pytest.mark.parametrize("revision", ["../x", "a b", "", "-x", "\x1b"])
def test_a_revision_that_is_none_is_wrong_usage(hub, revision):
    with pytest.raises(UsageError):
        pull_repo(revision=revision)
    assert hub.requests == []


def test_offline_checks_what_is_here(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        pull_repo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    pull_repo()
    hub.forget_requests()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    report = pull_repo()
    assert states(report) == dict.fromkeys([*SMALL, *SHARDS], "present")
    flip_a_byte(blob(hub, SHARDS[0]))
    with pytest.raises(VerificationError, match=SHARDS[0]):
        pull_repo()
    assert hub.requests == []


def test_too_little_disk_space_is_said_before_the_weights(hub, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 5_000_000))
    with pytest.raises(StorageError, match=r"needs 0\.0 GB more .* 0\.0 GB is free: free some space"):
        pull_repo()
    assert not set(hub.fetched()) & set(SHARDS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 9 << 20))  # exactly the three shards
    pull_repo()


def test_a_disk_that_fills_up_keeps_the_part(hub, monkeypatch):
    write = partial.PartialFile.write

    def full(self, chunk):
        if self.size >= 1 << 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(partial.PartialFile, "write", full)
        with pytest.raises(StorageError, match="the disk is full while downloading model-"):
            pull_repo()
    report = pull_repo()
    assert "resumed" in states(report).values()
    assert (report.path / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]


def test_an_interrupted_pull_ends_at_once_and_is_resumed(hub):
    def interrupt(progress: Progress) -> None:
        if progress.item == SHARDS[1] and progress.done_bytes > 4 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull_repo(progress=interrupt)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
    received = sum(path.stat().st_size for path in cache.repo_directory(REPO).glob("blobs/*"))
    report = pull_repo()
    assert report.received_bytes == report.size_bytes - received
    assert (report.path / SHARDS[1]).read_bytes() == hub.files[SHARDS[1]]


def test_pull_takes_sources_only(hub, tmp_path, refused_model):
    with pytest.raises(UsageError, match="not recipes"):
        pull(ModelRef("demo", "compact", None))
    with pytest.raises(UsageError, match="is a directory"):
        pull(ModelRef("x", None, tmp_path))
    with pytest.raises(UnsupportedModelError, match=f"{refused_model} is not supported: .*secret"):
        pull(ModelRef(refused_model, None, None))
    assert hub.requests == []


def test_the_demo_is_here_already(hub):
    report = pull(ModelRef("demo", None, None))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(states(report))
    assert report.received_bytes == 0
    assert hub.requests == []


CLIENT = f"""
import sys
from localmoe.hub import ModelRef, pull
from localmoe.errors import LocalMoeError
try:
    print(pull(ModelRef({REPO!r}, None, None)).path)
except LocalMoeError as error:
    sys.exit(f"{{error.kind}}: {{error}}")
"""


def client(hub, home: Path, **environment: str) -> subprocess.Popen[str]:
    clean = {key: value for key, value in os.environ.items() if "proxy" not in key.lower() and key[:3] != "HF_"}
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "PYTHONPATH": str(CHECKOUT)}
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT],
        env={**clean, **own, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_client_goes_on_in_the_next_run(server, tmp_path):
    server.stall = {SHARDS[0]: (2 << 20) + 17}
    first = client(server, tmp_path)
    blobs = tmp_path / "hub" / f"models--{REPO.replace('/', '--')}" / "blobs"
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:  # until the other shards are finished and one hangs half-way
        parts = list(blobs.glob("*.incomplete"))
        sizes = [path.stat().st_size for path in parts if path.exists()]
        done = [path for path in blobs.glob("*") if len(path.name) == 64]
        if len(done) == 2 and sizes and sizes[0] >= 2 << 20:
            break
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    server.release.set()
    server.forget_requests()

    second = client(server, tmp_path)
    out, err = second.communicate(timeout=30)
    assert (second.returncode, err) == (0, "")
    assert server.fetched() == {SHARDS[0]: [f"bytes={2 << 20}-"]}
    assert (Path(out.strip()) / SHARDS[0]).read_bytes() == server.files[SHARDS[0]]


def test_the_environment_is_honoured(server, tmp_path):
    process = client(server, tmp_path, HF_HUB_OFFLINE="1")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.startswith("hub: HF_HUB_OFFLINE is set")
    assert server.requests == []

    process = client(server, tmp_path, HF_TOKEN="hf_other")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert Path(out.strip()).is_relative_to(tmp_path / "hub")
    assert {r.authorization for r in server.requests if r.host == "127.0.0.1"} == {"Bearer hf_other"}


def test_every_error_is_a_localmoe_error():
    for kind in (HubError, StorageError, UnsupportedModelError, UsageError, VerificationError):
        assert issubclass(kind, LocalMoeError)
