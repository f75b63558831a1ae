"""`quantize --discard-source` against the fake hub: the same output, with a shard or two on the disk at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localmoe.cli.app import main
from localmoe.errors import GateError, LocalMoeError, StorageError, UsageError, VerificationError
from localmoe.hub import ModelRef, cache, pull
from localmoe.hub.download import pull_without_weights
from quantize import discard
from quantize.discard import SCRATCH_NAME, peak_bytes, quantize_from_hub
from quantize.following import Following
from quantize.gate import Gate
from quantize.progress import Progress

REPO = "maker/Tiny-MoE"
SHARDS = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]


@pytest.fixture
def hub(hub, sharded_demo):
    hub.files = dict(sharded_demo)
    return hub


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def size_or_gone(path: Path) -> int:
    """Another thread fetches and drops shards meanwhile."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def run(output: Path, **options):
    return quantize_from_hub(pull_without_weights(ModelRef(REPO, None, None)), output, "balanced", **options)


def bodies(hub) -> set[str]:
    """Shards of which more was sent than a header."""
    return {name for name, sent in hub.sent.items() if name in SHARDS and sent > 0.9 * len(hub.files[name])}


def test_the_output_is_the_ordinary_one_and_the_source_is_gone(hub, tmp_path, ordinary, monkeypatch):
    output = tmp_path / "output"
    most = 0
    foreseen = []
    honest = discard.peak_bytes
    monkeypatch.setattr(discard, "peak_bytes", lambda *given: foreseen.append(honest(*given)) or foreseen[-1])

    def watch(step: Progress) -> None:
        nonlocal most
        scratch = output / SCRATCH_NAME
        if scratch.is_dir():
            most = max(most, sum(map(size_or_gone, scratch.glob("model-*"))))

    report = run(output, progress=watch)
    found, wanted = contents(output), contents(ordinary)
    assert found.keys() == wanted.keys()
    same = [name for name in wanted if name not in ("localmoe.json", "README.md")]
    assert all(found[name] == wanted[name] for name in same)
    manifest, theirs = json.loads(found["localmoe.json"]), json.loads(wanted["localmoe.json"])
    assert manifest["tensors"] == theirs["tensors"]
    assert manifest["source"]["files"] == theirs["source"]["files"]
    assert (manifest["source"]["name"], manifest["source"]["revision"]) == (REPO, hub.commit)
    assert manifest["measured"] == theirs["measured"]
    assert manifest["notes"] == theirs["notes"]
    assert bodies(hub) == set(SHARDS)
    assert 0 < most <= foreseen[0] < sum(len(hub.files[name]) for name in SHARDS)
    snapshot = cache.repo_directory(REPO) / "snapshots" / hub.commit
    assert not list(snapshot.glob("*.safetensors"))
    assert report.source_bytes > 0
    hub.forget_requests()
    assert run(output).already_there
    assert not hub.sent.keys() & set(SHARDS)


@pytest.mark.parametrize("moment", [0.3, 0.8])
def test_an_interrupted_run_pulls_no_finished_shard_again(hub, tmp_path, ordinary, moment):
    output = tmp_path / "output"

    def interrupt(step: Progress) -> None:
        if step.stage == "quantize" and step.total_bytes and step.done_bytes > moment * step.total_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(output, progress=interrupt, gate=None)
    assert not (output / "localmoe.json").exists()
    hub.forget_requests()
    report = run(output, gate=None)
    assert report.resumed_bytes > 0
    assert SHARDS[0] not in bodies(hub)
    for name in ("model.safetensors", "config.json", "model.safetensors.index.json"):
        assert (output / name).read_bytes() == (ordinary / name).read_bytes()
    assert not (output / SCRATCH_NAME).exists()


def test_an_interrupted_measure_runs_no_layer_again(hub, tmp_path, ordinary, monkeypatch):
    output = tmp_path / "output"
    ran: list[int] = []
    honest = Following.run

    def run_step(self: Following, step: int) -> None:
        if step == 3 and not ran.count(-1):
            ran.append(-1)
            raise KeyboardInterrupt
        ran.append(step)
        honest(self, step)

    monkeypatch.setattr(Following, "run", run_step)
    with pytest.raises(KeyboardInterrupt):
        run(output)
    assert ran == [0, 1, 2, -1]
    run(output)
    layers = json.loads(hub.files["config.json"])["num_hidden_layers"]
    assert ran[4:] == [*range(3, layers + 1)]  # step 0 is the embedding
    found, theirs = (json.loads((path / "localmoe.json").read_text()) for path in (output, ordinary))
    assert found["measured"] == theirs["measured"]
    assert not (output / SCRATCH_NAME).exists()


def test_the_gate(hub, tmp_path):
    output = tmp_path / "output"
    with pytest.raises(GateError, match=r"above --gate 0\.001"):
        run(output, gate=Gate(0.001))
    assert not (output / "localmoe.json").exists()
    hub.forget_requests()
    assert run(output, gate=Gate(0.1)).manifest.measured.kld_mean > 0.001
    assert not bodies(hub)  # nothing was pulled again, and nothing made again
    with pytest.raises(GateError):  # of an output that is there
        run(output, gate=Gate(0.001))


def test_a_disk_without_room_for_a_layer_measures_the_perplexity_alone(hub, tmp_path, monkeypatch):
    def room(output: Path, decided, shards, checkpoint, following) -> int:
        sizes = {file.name: file.size for file in shards.found.weights}
        uses = discard.uses_of(decided.reading_order, checkpoint, following)
        states = 2 * following.states_bytes if following is not None else 0
        return sum(unit.nbytes for unit in decided.units) + peak_bytes([use.files for use in uses], sizes) + states

    honest = discard._has_space

    def tight(*given, optional):
        free = room(*given[:-1], None)
        assert free < room(*given)
        monkeypatch.setattr(discard.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
        return honest(*given, optional=optional)

    monkeypatch.setattr(discard, "_has_space", tight)
    with pytest.raises(StorageError, match="shards under way"):
        run(tmp_path / "strict", gate=Gate(0.1))
    manifest = run(tmp_path / "output").manifest
    assert manifest.measured.kld_mean is None
    (note,) = [note for note in manifest.notes if "divergence" in note]
    assert note == (
        "only the perplexity was measured, not the divergence from the source: "
        "the disk does not hold a layer of the source beside the output"
    )
    assert note in (tmp_path / "output" / "README.md").read_text()


def test_a_cut_connection_goes_on(hub, tmp_path, ordinary):
    hub.cuts = {SHARDS[2]: [len(hub.files[SHARDS[2]]), 900_000, 400_000]}  # the first answer is the header's
    run(tmp_path / "output", gate=None)
    assert (tmp_path / "output" / "model.safetensors").read_bytes() == (ordinary / "model.safetensors").read_bytes()


def test_a_shard_that_was_pulled_before_is_used_and_stays(hub, tmp_path, ordinary):
    path = pull(ModelRef(REPO, None, None)).path
    hub.forget_requests()
    run(tmp_path / "output", gate=None)
    assert not hub.sent.keys() & set(SHARDS)
    assert all((path / name).is_file() for name in SHARDS)
    assert (tmp_path / "output" / "model.safetensors").read_bytes() == (ordinary / "model.safetensors").read_bytes()


def test_bytes_that_are_not_the_listed_ones_are_refused(hub, tmp_path):
    data = bytearray(hub.files[SHARDS[1]])
    data[-1] ^= 1
    hub.other_bytes = {SHARDS[1]: bytes(data)}
    with pytest.raises(VerificationError, match=SHARDS[1]):
        run(tmp_path / "output", gate=None)
    assert not (tmp_path / "output" / "localmoe.json").exists()
    assert not (tmp_path / "output" / "model.safetensors").exists()


def test_space_is_checked_before_the_start(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(discard.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 12_000_000}))
    with pytest.raises(StorageError, match=r"[0-9,]{10} bytes are needed there \([0-9,]{10} for the output"):
        run(tmp_path / "output")
    assert not (tmp_path / "output").exists()
    assert not bodies(hub)


def test_the_most_bytes_at_a_time_by_hand():
    sizes = {"a": 10, "b": 20, "c": 30, "d": 5}
    assert peak_bytes([("a",), ("b",), ("c",), ("d",)], sizes) == 50  # c comes while b is worked on
    assert peak_bytes([("a", "b"), ("b",), ("c",), ("d",)], sizes) == 60  # a needs b's scale, and c comes with them
    assert peak_bytes([("a",), ("b",), ("c",), ("d", "a")], sizes) == 60  # a is kept to the end
    assert peak_bytes([], sizes) == 0


def test_what_cannot_be_had_without_the_source(hub, tmp_path, capsys, monkeypatch):
    for flags in (["--method", "gptq"], ["--round-scales"]):
        status = main(["quantize", REPO, "-o", str(tmp_path / "output"), "--discard-source", *flags])
        assert (status, "never has the whole source" in capsys.readouterr().err) == (2, True)
    assert main(["quantize", REPO, "--revision", "main"]) == 2
    assert "--revision goes with --discard-source" in capsys.readouterr().err
    assert main(["quantize", REPO, "--discard-source", "--revision", "no/../such"]) == 2
    assert "not a branch, tag or commit" in capsys.readouterr().err
    assert main(["quantize", "demo", "-o", str(tmp_path / "output"), "--discard-source"]) == 2
    assert "not on the hub" in capsys.readouterr().err
    with pytest.raises(UsageError):
        pull_without_weights(ModelRef("demo", None, None))
    config = json.loads(hub.files["config.json"])
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    hub.files["config.json"] = json.dumps(config).encode()
    with pytest.raises(LocalMoeError):
        run(tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_the_command(hub, tmp_path, capsys, ordinary):
    output = tmp_path / "output"
    command = ["quantize", REPO, "-o", str(output), "--discard-source"]
    assert main([*command, "--revision", "v9"]) == 1
    assert "has no revision v9" in capsys.readouterr().err
    assert main([*command, "--json", "--gate", "0.1", "--revision", "v1"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert 0 < record["measured"]["kld_mean"] < 0.05
    assert (output / "model.safetensors").read_bytes() == (ordinary / "model.safetensors").read_bytes()
