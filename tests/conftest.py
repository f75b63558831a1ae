"""What every test needs of its surroundings."""

import signal


def pytest_configure() -> None:
    # A shell starts its background jobs with SIGINT ignored, and programs inherit that: CI may run the tests so.
    # The tests of Ctrl-C start programs which must not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
