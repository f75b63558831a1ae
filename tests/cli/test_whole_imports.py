"""Ctrl-C while modules are imported that are broken for good when they are half there."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from localmoe.cli.whole_imports import uninterrupted

PROGRAM = """
import sys
from localmoe.cli import whole_imports
whole_imports.install()
whole_imports.install()
try:
    import torch
except KeyboardInterrupt:
    print("interrupted", sys.modules["numpy"].whole)
"""


@pytest.fixture(autouse=True)
def ctrl_c_raises():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_import_within_an_import_is_whole_too(tmp_path: Path) -> None:
    """A torch that, as the real one, goes on without numpy when that fails."""
    (tmp_path / "torch.py").write_text("try:\n    import numpy\nexcept BaseException:\n    pass\n")
    (tmp_path / "numpy.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\nwhole = True\n")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{PROGRAM}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("interrupted True\n", "")


def test_the_outermost_raises_and_puts_everything_back() -> None:
    reached = []

    def work() -> None:
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
                reached.append("inner")
            reached.append("outer")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["inner", "outer"]
    with uninterrupted():
        pass  # what was pressed before is forgotten
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with uninterrupted():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_another_thread_is_left_alone() -> None:
    failures: list[BaseException] = []

    def enter() -> None:
        try:
            with uninterrupted():
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not failures


@pytest.mark.parametrize("module", ["typer", "difflib"])
def test_ctrl_c_while_the_command_line_is_imported(tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from localmoe.cli.start import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "localmoe: interrupted\n")
