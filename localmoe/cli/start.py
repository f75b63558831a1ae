"""Where the `localmoe` command begins: Ctrl-C while the command line is imported ends it as it does later."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the program on the process's arguments; returns the exit status."""
    try:
        from localmoe.cli.app import main as run
    except KeyboardInterrupt:
        sys.stderr.write("localmoe: interrupted\n")
        return 130
    return run()
