"""`run` and `chat` of a model that is not here: from nothing to an answer, against a hub on this machine."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections import namedtuple
from pathlib import Path

import pytest
from packing import pack_demo

from localmoe import hub as hub_package
from localmoe import store
from localmoe.errors import HubError
from localmoe.hub.verify import demo_directory

REPO = "maker/Tiny-MoE"
WEIGHTS = "model.safetensors"
PROGRAM = (sys.executable, "-m", "localmoe")
COLUMNS = 40
ASKED = (*PROGRAM, "run", REPO, "Tell me a story about a fox", "-n", "16", "--temp", "0")


@pytest.fixture
def demo_hub(server):
    """The hub with the demo's source as its one repository."""
    server.files = {
        path.name: path.read_bytes() for path in demo_directory().iterdir() if path.suffix in (".json", ".safetensors")
    }
    return server


@pytest.fixture
def machine(demo_hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a machine that has nothing."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS") if name in os.environ}
    return kept | {
        "HF_ENDPOINT": demo_hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "LOCALMOE_HOME": str(tmp_path / "home"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "NO_PROXY": "*",
        "TERM": "xterm",
    }


def run(machine: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ASKED, *more], env=machine, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )


def test_without_a_terminal_and_without_yes_nothing_is_asked_or_fetched(demo_hub, machine):
    outcome = run(machine)
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert outcome.stderr == (
        f"localmoe: {REPO} is not on this machine: type `localmoe pull {REPO}` and then `localmoe quantize {REPO}`; "
        "or add -y, which does both\n"
    )
    assert not demo_hub.requests


def test_interrupted_it_goes_on_and_then_it_is_here(demo_hub, machine, tmp_path):
    demo_hub.stall = {WEIGHTS: 5 << 20}
    process = subprocess.Popen([*ASKED, "-y"], env=machine, stdin=subprocess.DEVNULL, stdout=-1, stderr=-1, text=True)
    deadline = time.monotonic() + 60
    while not (parts := list((tmp_path / "hf").rglob("*.incomplete"))) or parts[0].stat().st_size < 5 << 20:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    demo_hub.release.set()
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert errors.splitlines()[-1] == "localmoe: interrupted; the same command goes on where it stopped"

    held = next((tmp_path / "hf").rglob("*.incomplete")).stat().st_size
    demo_hub.forget_requests()
    outcome = run(machine, "-y")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.strip()
    assert demo_hub.fetched()[WEIGHTS] == [f"bytes={held}-"]
    assert " of it is here already" in outcome.stderr
    assert (tmp_path / "home/models/maker--Tiny-MoE/balanced/localmoe.json").is_file()
    shards = (tmp_path / "home/models/maker--Tiny-MoE/balanced").glob("*.safetensors")
    said = re.search(r"quantize  to ([0-9.]+) MiB \(balanced\)", outcome.stderr)
    assert said is not None
    assert float(said[1]) == pytest.approx(sum(path.stat().st_size for path in shards) / 2**20, rel=0.02)

    demo_hub.forget_requests()
    again = run(machine)  # nothing left to ask or do
    assert (again.returncode, again.stdout, again.stderr) == (0, outcome.stdout, "")
    assert not demo_hub.requests


@pytest.mark.parametrize("packing", ["gptq", "compressed-tensors"])
def test_what_others_packed_is_converted(demo_hub, machine, tmp_path, packing):
    """Foreseen from its config.json alone and said so; a recipe for it is refused before anything is downloaded."""
    source = tmp_path / "packed"
    pack_demo(demo_directory(), source, packing)
    demo_hub.files |= {path.name: path.read_bytes() for path in source.iterdir()}
    refused = subprocess.run(
        [*PROGRAM, "run", f"{REPO}:compact", "Tell", "-y"],
        env=machine, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "can only be converted; leave out :compact" in " ".join(refused.stderr.split())
    assert set(demo_hub.fetched()) == {"config.json"}

    planned = subprocess.run(
        [*PROGRAM, "plan", REPO, "--json"], env=machine, capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(planned.stdout)["recipe"] == "converted"
    outcome = run(machine, "-y")
    assert outcome.returncode == 0, outcome.stderr
    made = tmp_path / "home/models/maker--Tiny-MoE/converted"
    said = re.search(r"\n  convert   to ([0-9.]+) MiB \(converted\)", outcome.stderr)
    assert said is not None, outcome.stderr
    size = sum(path.stat().st_size for path in made.glob("*.safetensors")) / 2**20
    assert float(said[1]) == pytest.approx(size, rel=0.05)
    again = run(machine)
    assert (again.returncode, again.stdout, again.stderr) == (0, outcome.stdout, "")
    assert json.loads(run(machine, "--json").stdout)["completion_tokens"] > 0  # such rounding may end it at once


@pytest.mark.parametrize(("typed", "status"), [("\n", 0), ("n\n", 1), ("\x03", 130)])
def test_a_person_is_asked_once(demo_hub, machine, tmp_path, typed, status):
    """The question and the progress are on the terminal, the answer alone in the pipe; a `:source` is not quantized."""
    process, master = at_a_terminal(TERMINAL_PROGRAM, machine, REPO if status else f"{REPO}:source")
    seen = read_until(master, "[Y/n]").replace("\r", "")
    for name in ("download", "disk", "runs on", "memory", "speed", *(["quantize"] if status else [])):
        assert f"\n  {name} " in seen, seen
    assert "stay on the disk" not in seen  # the MTP layer, mapped and hardly read, is no expert that memory lacks
    narrow = [line for line in seen.split("\n") if "/" not in line]  # paths stay whole, to be copied
    assert all(len(line) <= COLUMNS for line in narrow), seen
    assert re.search(r"\n  speed     about \d[\d,.]* tokens/s, bound\n            by ", seen), seen
    assert ("Download and quantize it?" if status else "Download it?") in seen
    assert set(demo_hub.fetched()) == {"config.json"}
    os.write(master, typed.encode())
    rest = read_until(master, None)
    output, _ = process.communicate(timeout=60)
    os.close(master)
    assert process.returncode == status, rest
    assert bool(output.strip()) == (status == 0)
    if status:
        assert set(demo_hub.fetched()) == {"config.json"}
    if status == 1:
        assert f"localmoe: {REPO} was not downloaded" in " ".join(rest.split())


TERMINAL_PROGRAM = """
import os, sys
os.close(os.open(os.ttyname(0), os.O_RDWR))  # a session's leader that opens a terminal gets it as its own: Ctrl-C
from localmoe.cli.app import main
sys.exit(main())
"""


# The tensors come slowly, so that there is time to press Ctrl-C between two of them
SLOW_PROGRAM = (
    """
import time
from quantize.progress import Meter
add = Meter.add
Meter.add = lambda *step: (time.sleep(0.05), add(*step))
"""
    + TERMINAL_PROGRAM
)


def at_a_terminal(program: str, machine: dict[str, str], model: str) -> tuple[subprocess.Popen[str], int]:
    """`run` with a terminal of its own, of `COLUMNS`, and the end of it that a person has; stdout is a pipe."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", program, "run", model, *ASKED[5:]],
        env=machine,
        stdin=slave,
        stdout=-1,
        stderr=slave,
        text=True,
        start_new_session=True,
    )
    os.close(slave)
    return process, master


def read_until(terminal: int, text: str | None) -> str:
    """What the terminal shows until `text`, or until the program is gone."""
    seen, deadline = "", time.monotonic() + 120
    while text is None or text not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([terminal], [], [], 1)[0]:
            try:
                seen += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # EIO: everybody has closed it
                assert text is None, seen
                break
    return seen


def test_a_checkpoint_in_shards_is_quantized_while_it_is_pulled(server, sharded_demo, machine, tmp_path):
    """Interrupted while one shard is still to come: by then others are quantized, and the next run goes on."""
    server.files = dict(sharded_demo)
    last = "model-00003-of-00004.safetensors"
    server.stall = {last: 2 << 20}
    process = subprocess.Popen([*ASKED, "-y"], env=machine, stdin=subprocess.DEVNULL, stdout=-1, stderr=-1, text=True)
    output = tmp_path / "home/models/maker--Tiny-MoE/balanced"
    deadline = time.monotonic() + 60
    while not written(output / "model.safetensors.partial"):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)  # for it to be noticed before the rest comes
    server.release.set()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "localmoe: interrupted; the same command goes on where it stopped"
    assert "maker/Tiny-MoE is not on this machine yet" in errors

    server.forget_requests()
    outcome = run(machine, "-y")
    assert outcome.returncode == 0, outcome.stderr
    assert re.search(r"quantize  to .* MiB \(balanced\) in .*, .* MiB of it is made already\n", outcome.stderr)
    assert "finishing it" not in outcome.stderr  # the plan has said it
    assert None not in server.fetched().get(last, [])  # it went on, after a look at the header
    assert (output / "localmoe.json").is_file()

    made = {path.name: path.read_bytes() for path in output.iterdir()}
    shutil.rmtree(output)
    again = run(machine)  # the source is here now
    assert (again.returncode, again.stdout) == (0, outcome.stdout)
    assert "is here but not quantized yet" in again.stderr
    assert made == {path.name: path.read_bytes() for path in output.iterdir()}


def test_interrupted_while_it_quantizes_it_goes_on_with_what_it_had(demo_hub, machine, tmp_path):
    process, master = at_a_terminal(SLOW_PROGRAM, machine, REPO)
    read_until(master, "[Y/n]")
    os.write(master, b"\n")
    output = tmp_path / "home/models/maker--Tiny-MoE/balanced"
    partial = output / "model.safetensors.partial"
    deadline = time.monotonic() + 120
    while not written(partial):
        assert time.monotonic() < deadline
        assert process.poll() is None
        select.select([master], [], [], 0.05)
    os.write(master, b"\x03")
    said = read_until(master, None).replace("\r", "").rpartition("localmoe: ")[2]
    answer, _ = process.communicate(timeout=60)
    os.close(master)
    assert (process.returncode, answer) == (130, "")
    assert said == "interrupted; the same command\ngoes on where it stopped\n"
    assert {path.name for path in output.iterdir()} == {"localmoe.journal", partial.name}

    held = partial.stat().st_ino
    demo_hub.forget_requests()
    outcome = run(machine)  # nothing to ask: the source is here
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr.splitlines()[0] == f"{REPO}:balanced is quantized in part: finishing it"
    assert not demo_hub.requests
    assert (output / "model.safetensors").stat().st_ino == held
    assert (output / "localmoe.json").is_file()


def written(partial: Path) -> bool:
    """Whether there is more in a file that is being filled than its header."""
    try:
        with partial.open("rb") as file:
            file.seek(1 << 17)
            return any(file.read())
    except OSError:
        return False


Usage = namedtuple("Usage", "total used free")


def test_a_disk_too_small_is_refused_before_the_download(demo_hub, hub, home, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 25 << 20))  # 20 MB and 12 MB do not fit
    from localmoe.cli.app import main

    monkeypatch.setattr(sys, "stdin", None)
    assert main(["run", REPO, "Hi", "-y"]) == 1
    said = capsys.readouterr().err
    missing = sum(map(len, demo_hub.files.values())) - len(demo_hub.files["config.json"])
    assert said.startswith(f"localmoe: {REPO} needs {missing / 2**20:.1f} MiB more for the download in ")
    assert " for the quantized model in " in said
    assert "has 25 MiB free: free some space" in said
    assert said.count("\n") == 1
    assert set(hub.fetched()) == {"config.json"}


def test_a_memory_too_small_is_refused_before_the_download(demo_hub, hub, home, capsys, monkeypatch):
    from localmoe.cli.app import main

    monkeypatch.setattr(sys, "stdin", None)
    assert main(["run", REPO, "Hi", "-y", "--ram", "1MiB"]) == 1
    assert "GiB of memory and there are" in capsys.readouterr().err
    assert set(hub.fetched()) == {"config.json"}


def test_survey_counts_what_is_missing(hub):
    ref = store.ModelRef(REPO, None, None)
    first = hub_package.survey(ref)
    listed = sum(
        len(data)
        for name, data in hub.files.items()
        if name.endswith(".json") or name.startswith(("model-", "LICENSE"))
    )
    assert first.size_bytes == listed
    assert not first.begun
    assert first.missing_bytes == listed - sum(
        len(hub.files[name]) for name in ("config.json", "model.safetensors.index.json")
    )
    shard = "model-00002-of-00003.safetensors"
    hub.other_bytes = {shard: b"x" * (3 << 20)}  # one shard is damaged on its way: the pull fails ...
    hub.stall = {shard: 0}

    def release(step: hub_package.Progress) -> None:
        if step.total_bytes - step.done_bytes <= 3 << 20:  # ... once all others are here, which it would cut short
            hub.release.set()

    with pytest.raises(Exception, match="does not have the hash"):
        hub_package.pull(ref, progress=release)
    second = hub_package.survey(ref)
    assert second.begun
    assert second.missing_bytes == 3 << 20


def test_survey_offline(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        hub_package.survey(store.ModelRef(REPO, None, None))


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "home"
