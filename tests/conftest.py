"""What every test needs of its surroundings."""

import os
import signal
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

# Triton reads this once, when it is first imported, as other conftest files do through torch: without a GPU its kernels
# run in its interpreter
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Beside other workers (pytest-xdist) each has a processor of its own: teams of threads that wait for each other by
# spinning must not share one with another team
_worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if _worker.startswith("gw"):
    _mine = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_mine[int(_worker[2:]) % len(_mine)]})


def pytest_configure() -> None:
    # A shell starts its background jobs with SIGINT ignored, and programs inherit that: CI may run the tests so.
    # The tests of Ctrl-C start programs which must not.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: beside other workers it should not be what all of them wait for."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Imports a script without an ending, by its name in scripts/."""

    def load(name: str) -> ModuleType:
        loader = SourceFileLoader(name, str(Path(__file__).resolve().parent.parent / "scripts" / name))
        spec = spec_from_loader(name, loader)
        assert spec is not None
        module = module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look there
        loader.exec_module(module)
        return module

    return load
