"""The `appo-jax` command. Ctrl-C and SIGTERM end it from its first line on: the rest is imported after this."""

import os
import signal
import sys


def main() -> int:
    """Run the command line; returns its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(130))
    from appo_jax.cli import guard_output, main
    from appo_jax.interrupt import leave

    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)
    guard_output()
    return main()


if __name__ == "__main__":
    sys.exit(main())
