"""Where the `localmoe` command begins: Ctrl-C while the command line is imported ends it as it does later."""

from __future__ import annotations


def main() -> int:
    """Run the program on the process's arguments; returns the exit status."""
    try:
        from localmoe.cli.app import main as run
    except KeyboardInterrupt:
        from localmoe.cli import streams

        streams.tell("localmoe: interrupted")
        return 130
    return run()
