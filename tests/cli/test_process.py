"""The program as a process: exit statuses, closed and full streams, signals."""

from __future__ import annotations

import array
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from localmoe.cli import start

REAL = (sys.executable, "-m", "localmoe")


@pytest.mark.parametrize(
    ("given", "wanted"), [({}, "0"), ({"GOMP_SPINCOUNT": "9"}, "9"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_torchs_threads_do_not_spin_unless_asked_to(monkeypatch, given, wanted):
    monkeypatch.setattr("os.environ", dict(given))
    monkeypatch.setattr("localmoe.cli.app.main", lambda: 7)
    assert start.main() == 7
    assert os.environ.get("GOMP_SPINCOUNT") == wanted


def test_help_imports_nothing_heavy(program):
    """What makes --help quick; scripts and docs/benchmarks.md time it, on a machine that does nothing else."""
    code = (
        "import sys; from localmoe.cli.app import main; status = main(['--help']);"
        "heavy = [m for m in ('torch', 'numpy', 'rich', 'prompt_toolkit', 'huggingface_hub', 'tokenizers')"
        " if m in sys.modules]; print('HEAVY', heavy); sys.exit(status)"
    )
    program.command = (sys.executable, "-c", code)
    outcome = program.run(text=True)
    assert outcome.returncode == 0
    assert "HEAVY []" in outcome.stdout


def test_version(program):
    program.command = REAL
    outcome = program.run("--version", text=True)
    assert outcome.returncode == 0
    assert outcome.stdout.startswith("localmoe 0.")
    assert "\nkernels  " in outcome.stdout
    record = json.loads(program.run("--version", "--json", text=True).stdout)
    assert record["kernels"] == record["tiers"][-1]
    assert record["tiers"][0] == "portable"


@pytest.mark.parametrize(
    "arguments",
    [[], ["--nonsense"], ["nonsense"], ["run"], ["run", "demo:fast", "Hi"], ["quantize", "demo", "--recipe", "fast"]],
)
def test_wrong_usage_is_2(program, arguments):
    outcome = program.run(*arguments, text=True, stdin=subprocess.DEVNULL)
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.strip()


def test_a_reader_that_leaves(program):
    program.environment["FAKE_ANSWER"] = "word " * 50
    program.environment["FAKE_DELAY"] = "0.01"
    process = program.start("run", "demo", "Hi", stdin=subprocess.DEVNULL, stdout=-1, stderr=-1)
    assert process.stdout.read(20) == b"word word word word "
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "--json"], ["run", "demo", "Hi", "--json"]])
def test_a_reader_that_was_never_there(program, arguments):
    process = program.start(*arguments, stdin=subprocess.DEVNULL, stdout=-1, stderr=-1)
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("arguments", [["run", "demo", "Hi"], ["run", "demo", "Hi", "--json"], ["list"]])
def test_a_full_disk_at_stdout(program, arguments):
    with Path("/dev/full").open("wb") as full:
        outcome = program.run(*arguments, capture_output=False, stdin=subprocess.DEVNULL, stdout=full, stderr=-1)
    assert outcome.returncode == 1
    assert outcome.stderr.startswith(b"localmoe: standard output cannot be written: No space left on device")
    assert outcome.stderr.count(b"\n") == 1


def test_in_a_shell_pipe_with_head(program):
    program.environment |= {"FAKE_ANSWER": "word " * 5000, "FAKE_CONTEXT": "100000"}
    line = f"{' '.join(program.command)} run demo Hi </dev/null | head -c 9; echo :${{PIPESTATUS[0]}}"
    outcome = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=30, env=program.environment)
    assert (outcome.stdout, outcome.stderr) == ("word word:141\n", "")


def test_timeout_leaves_what_was_generated(program):
    program.environment |= {"FAKE_ANSWER": "one two " + "more " * 400, "FAKE_DELAY": "0.1"}
    process = program.start("run", "demo", "Hi", stdin=subprocess.DEVNULL, stdout=-1, stderr=-1)
    assert process.stdout.read(7) == b"one two"
    process.terminate()  # what timeout(1) sends
    rest, errors = process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert rest.strip() in (b"", b"more", b"more more")
    assert b"Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "status"), [(["run", "demo", "Hi"], 0), (["list"], 0), (["chat", "demo"], 2), (["run", "demo"], 1)]
)
def test_without_any_terminal(program, arguments, status):
    outcome = program.run(*arguments, stdin=subprocess.DEVNULL, start_new_session=True)
    assert outcome.returncode == status
    assert b"\x1b" not in outcome.stdout + outcome.stderr
    assert (outcome.stderr == b"") == (status == 0)


def test_ten_megabytes_that_are_no_text(program):
    outcome = program.run("run", "demo", "Hi", input=b"\0" * 10_000_000 + b"\xff")
    assert outcome.returncode == 1
    assert outcome.stderr.startswith(b"localmoe: standard input is not valid UTF-8 at byte 10000000 (0xff)")
    assert outcome.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("redirection", "status"), [("<&-", 0), ("2>&-", 0), (">&-", 1), ("<&- >&- 2>&-", 1), ("< /", 1)]
)
def test_closed_streams(program, redirection, status):
    line = " ".join([*program.command, "run demo Hi", redirection])
    outcome = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=30, env=program.environment)
    assert outcome.returncode == status
    assert outcome.stdout == ("" if status else "Once upon a time.\n")
    assert "Traceback" not in outcome.stderr
    assert "Exception ignored" not in outcome.stderr


def test_ctrl_c_leaves_what_was_generated(program):
    program.environment["FAKE_ANSWER"] = "one two three " + "more " * 40
    program.environment["FAKE_DELAY"] = "0.1"
    process = program.start("run", "demo", "Hi", stdin=subprocess.DEVNULL, stdout=-1, stderr=-1)
    assert process.stdout.read(7) == b"one two"
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert rest.startswith(b" three") or rest == b"\n"
    assert errors == b""


def test_ctrl_c_with_json(program):
    program.environment |= {"FAKE_TEMPLATE": "think", "FAKE_ANSWER": "more " * 40, "FAKE_DELAY": "0.1"}
    arguments = ("run", "demo", "two words", "--json", "--show-thinking")
    process = program.start(*arguments, stdin=subprocess.DEVNULL, stdout=-1, stderr=-1)
    assert process.stderr.read(9) == b"more more"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    record = json.loads(output)
    assert record["finish_reason"] == "interrupted"
    assert record["prompt_tokens"] == 2
    assert record["completion_tokens"] == len(record["thinking"].split()) >= 2


def test_ctrl_c_while_reading_stdin(program):
    process = program.start("run", "demo", "Hi", stdin=-1, stdout=-1, stderr=-1)
    process.stdin.write(b"more is to come")
    process.stdin.flush()
    waiting = array.array("i", [1])
    while waiting[0]:  # until the program has taken it and waits for the rest
        time.sleep(0.05)
        fcntl.ioctl(process.stdin, termios.FIONREAD, waiting)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert process.stdout.read() == b""
    assert process.stderr.read() == b"localmoe: interrupted\n"
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()


def test_large_stdin_and_nuls(program):
    program.environment["FAKE_CONTEXT"] = "100000000"
    outcome = program.run("run", "demo", "Hi", input=b"a\0 b\n" * 2_000_000)
    assert outcome.returncode == 0
    assert outcome.stdout == b"Once upon a time.\n"


def test_invalid_utf8_on_stdin(program):
    outcome = program.run("run", "demo", input=b"good \xc3\x28")
    assert outcome.returncode == 1
    assert outcome.stderr.startswith(b"localmoe: standard input is not valid UTF-8 at byte 5")


def test_chat_wants_a_terminal(program):
    outcome = program.run("chat", "demo", input=b"Hi\n")
    assert outcome.returncode == 2
    assert b"localmoe run" in outcome.stderr


def test_debug_shows_the_traceback(program):
    outcome = program.run("show", "/nowhere", "--debug", text=True)
    assert outcome.returncode == 1
    assert "Traceback" in outcome.stderr
    assert outcome.stderr.splitlines()[-1] == "localmoe: /nowhere is not a directory"


def test_thinking_to_a_file(program, tmp_path):
    program.environment |= {"FAKE_TEMPLATE": "think", "FAKE_ANSWER": "let me see</think>\n\nyes"}
    path = tmp_path / "thoughts.txt"
    path.write_text("something older and longer than what is to come")
    outcome = program.run("run", "demo", "Hi", "--think-to", str(path), text=True, stdin=subprocess.DEVNULL)
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "yes\n", "")
    assert path.read_text() == "let me see\n"
    outcome = program.run("run", "demo", "Hi", "--think-to", "/nowhere/x", text=True, stdin=subprocess.DEVNULL)
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert outcome.stderr == "localmoe: --think-to: /nowhere/x: cannot be written: No such file or directory\n"
    full = program.run("run", "demo", "Hi", "--think-to", "/dev/full", text=True, stdin=subprocess.DEVNULL)
    assert (full.returncode, full.stdout, full.stderr.count("\n")) == (1, "yes\n", 1)
    full = program.run("run", "demo", "Hi", "--json", "--think-to", "/dev/full", text=True, stdin=subprocess.DEVNULL)
    told = json.loads(full.stdout)
    assert (told["text"], told["thinking"], told["error"]["kind"]) == ("yes", "let me see", "storage")
    assert told["error"]["message"].startswith("--think-to: /dev/full: cannot be written: ")
    assert (full.returncode, full.stderr) == (1, f"localmoe: {told['error']['message']}\n")
