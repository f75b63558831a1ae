"""What every test needs of its surroundings."""

import os
import signal
from pathlib import Path

# Triton reads this once, when it is first imported, as other conftest files do through torch: without a GPU its kernels
# run in its interpreter
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    # A shell starts its background jobs with SIGINT ignored, and programs inherit that: CI may run the tests so.
    # The tests of Ctrl-C start programs which must not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
