"""Whatever goes wrong: one line, a kind, an exit status."""

from __future__ import annotations

import errno

import pytest

from localmoe import store
from localmoe.cli.failure import describe
from localmoe.errors import DeviceError, GateError


@pytest.mark.parametrize(
    ("error", "kind", "status", "message"),
    [
        (DeviceError("no such card"), "device", 1, "no such card"),
        (GateError("two\nlines \x1b[31m"), "gate", 1, "two lines [31m"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "storage", 1, "/x: No space left on device; free"),
        (PermissionError(errno.EACCES, "Permission denied", "/y"), "storage", 1, "/y: Permission denied; check"),
        (MemoryError(), "memory", 1, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory", 1, "not enough memory"),
        (KeyboardInterrupt(), "interrupted", 130, "interrupted"),
        (ZeroDivisionError("division by zero"), "internal", 1, "ZeroDivisionError: division by zero"),
        (AssertionError(), "internal", 1, "AssertionError"),
    ],
)
def test_describe(error, kind, status, message):
    failure = describe(error)
    assert (failure.kind, failure.exit_code) == (kind, status)
    assert failure.message.startswith(message)
    assert failure.message.isprintable()


def test_an_unforeseen_failure_is_one_line_that_names_debug(invoke, engine, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(engine, "generate", fail)
    outcome = invoke("run", "demo", "Hi")
    assert outcome.status == 1
    assert outcome.err.startswith("localmoe: ZeroDivisionError: division by zero (")
    assert "--debug" in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_full_disk_is_one_line(invoke, monkeypatch):
    def fail(ref, *, all):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "remove", fail)
    outcome = invoke("rm", "demo", "--json")
    assert outcome.status == 1
    assert outcome.json["error"] == {
        "kind": "storage",
        "message": "No space left on device; free some space, then run the same command again",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu", "demo", "Hi"], "no such command: rnu; did you mean run?"),
        (["benhc"], "did you mean bench?"),
        (["\x1b[31m"], "no such command: [31m; localmoe --help lists them"),
        (["config", "lst"], "no such command: lst; did you mean list?"),
        (["templates", "shw", "x"], "did you mean show?"),
        (["run", "demo", "Hi", "--tepm", "1"], "No such option: --tepm. Did you mean --temp? See localmoe run --help"),
        (["run", "demo", "Hi", "--temperature", "1"], "Did you mean --temp?"),
        (["run", "demo", "Hi", "--ctx-size=1"], "Did you mean --ctx?"),
        (["run", "demo", "Hi", "--no-thnik"], "Did you mean --no-think?"),
        (["bench", "--repeat", "1"], "Did you mean --repeats?"),
        (["run", "demo", "Hi", "--xyzzy"], "No such option: --xyzzy. See localmoe run --help"),
        (["run", "demo", "Hi", "--device", "cdua"], "did you mean cuda?"),
        (["run", "demo", "Hi", "--kernels", "avx-512"], "did you mean avx512?"),
        (["run", "dmeo", "Hi"], "did you mean demo?"),
        (["run", "demo:balancd", "Hi"], "did you mean :balanced?"),
        (["run", "demo", "Hi", "--device", "gpu"], "did you mean cuda?"),
        (["run", "demo", "--hlp"], "Did you mean --help?"),
        (["run", "demo", "Hi", "there"], "; put a PROMPT of several words in quotation marks. See localmoe run --help"),
        (["run", "demo", "-f", "-"], "-f -: what is piped in is read without it; leave it out"),
        (["sessions", "lst"], "did you mean list?"),
        (["run", "demo:converted", "Hi"], "leave out :converted"),
        (["quantize", "demo", "--recipe", "compat"], "did you mean compact?"),
        (["plan", "demo", "--recipe", "experts"], "did you mean experts-only?"),
        (["quantize", "demo", "--method", "gtpq"], "did you mean gptq?"),
        (["run", "mine", "Hi"], "did you mean mined?"),
    ],
)
def test_the_near_miss_is_named(invoke, engine, home, arguments, message):
    (home / "models" / "mined" / "balanced").mkdir(parents=True)  # a model of the user's own
    outcome = invoke(*arguments)
    assert outcome.status in (1, 2)
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.err.rstrip("\n").isprintable()
    assert not engine.calls
