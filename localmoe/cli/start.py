"""Where the `localmoe` command begins: Ctrl-C while the command line is imported ends it as it does later."""

from __future__ import annotations

import os


def main() -> int:
    """Run the program on the process's arguments; returns the exit status."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # Torch's threads would spin for milliseconds after each part of a prompt, where the kernels' threads work now
        os.environ.setdefault("GOMP_SPINCOUNT", "0")
    try:
        from localmoe.cli.app import main as run
    except KeyboardInterrupt:
        from localmoe.cli import streams

        streams.tell("localmoe: interrupted")
        return 130
    return run()
